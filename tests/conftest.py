"""What all tests share: one seed, no signal handlers left behind, and code in two processes."""

import os
import signal
import subprocess
import sys

import pytest

# For pytest-xdist. Two processes with a thread per core each wait for one another, twice as long in all.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

# Commands run networks uncompiled, since a capture takes longer than most tests; tests of compilation unset it.
os.environ.setdefault("SENET_COMPILE", "off")

pytest.register_assert_rewrite("helpers")  # their assertions show values as a test's own do

import torch  # noqa: E402 - OpenMP reads it once
from torch.utils.data._utils import signal_handling  # noqa: E402

from senet.ops.csrc import build  # noqa: E402

pytest_plugins = ["helpers.runs", "helpers.compilation"]  # fixtures of all tests that need a run, or compilation


def pytest_configure(config):
    """Without a compiler the fast CPU code says once that it is not there; the tests of all else run all the same."""
    if build.compiler() is None:
        config.addinivalue_line("filterwarnings", "ignore:senet. the fast CPU code is not used:UserWarning")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_child_handler_of_a_loader():
    """Take PyTorch's SIGCHLD handler back, which its loader leaves behind for good.

    Once OpenVINO or ONNX Runtime is loaded, the process is killed when that handler is entered: at the end of any
    child, a compiler's say. No user of one command meets both.
    """
    yield
    if getattr(signal_handling, "_SIGCHLD_handler_set", False):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal_handling._SIGCHLD_handler_set = False


# Before it leaves, a rank waits for the other: gloo may drop what a closed connection had still to deliver. Then it
# leaves at once: taking gloo's threads down ends now and then in "terminate called without an active exception".
_RANK = """
import datetime, os, sys, torch.distributed as dist
folder, rank, *settings = sys.argv[1:]
store = dist.FileStore(f"{{folder}}/meet", 2)
dist.init_process_group("gloo", store=store, rank=int(rank), world_size=2)
{code}
store.set(f"done {{rank}}", "")
store.wait([f"done {{1 - int(rank)}}"], datetime.timedelta(seconds=60))
os._exit(0)
"""


def _two_processes(folder, code, *settings):
    """Exit codes of two ranks that run ``code``, and what they said."""
    # Their addresses are this machine's own, whatever its name resolves to, or not.
    environment = os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    command = [sys.executable, "-c", _RANK.format(code=code), str(folder)]
    both = [
        subprocess.Popen([*command, rank, *settings], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    return [process.returncode for process in both], "\n".join(said)


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory):
    """A function that runs code in two gloo processes, which see ``folder``, ``rank`` (a text) and ``settings``.

    Where even a bare sum over two ranks is impossible, a sandbox without a loopback say, the test is skipped.
    """

    def run(folder, code, *settings):
        codes, said = _two_processes(folder, code, *settings)
        if codes == [0, 0]:
            return
        bare, reason = _two_processes(tmp_path_factory.mktemp("bare"), "import torch\ndist.all_reduce(torch.ones(1))")
        if bare != [0, 0]:
            pytest.skip(f"two processes cannot talk here: {reason.strip().splitlines()[-1:]}")
        pytest.fail(said)

    return run
