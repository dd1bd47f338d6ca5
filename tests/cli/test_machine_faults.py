"""Memory that runs out and processes that are killed: one line with the remedy, exit code 2, and the state stays."""

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.command import command
from senet.cli.main import describe

pytestmark = pytest.mark.filterwarnings(
    # From Python 3.12 on; DataLoader forks by default and its workers do not touch the parent's threads.
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)
IN_WORKER = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
        RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_names_what_to_make_smaller(error):
    code, message = describe(error, ["train", "--data", "photos"])
    assert code == 2
    assert "--set batch_size=" in message
    assert "--set accumulate=2" in message
    assert "--set" not in describe(error, ["eval"])[1]


def test_memory_that_really_runs_out():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert "batch_size" in describe(caught.value, ["train"])[1]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "--workers 0"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "--workers 0"),
        (RuntimeError("received 0 items of ancdata"), "--workers 0"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "--shm-size"),
        (RuntimeError(IN_WORKER + "RuntimeError: unable to write to file </torch_7_8_9>: No space left"), "--shm-size"),
        (RuntimeError("DataLoader worker cannot be started: [Errno 28] No space left on device"), "--shm-size"),
    ],
)
def test_lost_loaders_name_the_remedy_and_the_way_on(error, remedy):
    words = ["train", "--data", "my photos", "--overwrite", "-o", "run"]
    code, message = describe(error, words)
    assert code == 2
    assert remedy in message
    assert message.endswith("continue with: senet train --data 'my photos' -o run --resume --workers 0")
    assert "\n" not in message
    assert describe(error, ["compare"])[1].endswith("senet compare --resume --workers 0")
    assert "--resume" not in describe(error, ["predict", "photo.jpg"])[1]


def test_a_fault_of_ours_is_no_fault_of_the_machine():
    with pytest.raises(RuntimeError, match="shapes"):
        describe(RuntimeError(IN_WORKER + "RuntimeError: shapes do not match"), ["train"])


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_shared_memory_that_runs_out(senet, photos, trained, tmp_path, monkeypatch, command):
    def full(*size):
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)  # workers are forked, and see it
    weights = trained / "last.safetensors"
    words = {
        "train": ["--data", photos, "--model", "resnet8", "--epochs", 1, "-o", tmp_path / "run"],
        "eval": ["--data", photos, "--checkpoint", weights],
        "predict": ["--checkpoint", weights, photos / "warm"],
    }[command]
    code, _, said = senet(command, *words, "--workers", 1)
    assert code == 2
    lines = [line for line in said.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    assert "--shm-size" in lines[0]
    assert ("--resume" in lines[0]) == (command == "train")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the worker through /proc")
def test_a_killed_loader_is_one_line_and_the_run_goes_on(photos, tmp_path):
    words = ["--data", photos, "--model", "se_resnet8", "--epochs", 5000, "--set", "batch_size=4", "--workers", 1]
    process = subprocess.Popen(command("train", *words, "-o", "run"), stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        next(line for line in process.stderr if "epoch 2/" in line)
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == 2
    finally:
        process.kill()
    error = [line for line in rest.splitlines() if "epoch" not in line or "error:" in line]
    assert len(error) == 1, rest
    assert "--workers 0" in error[0]
    assert "continue with: senet train" in error[0]
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert state["epoch"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_processes_end_together_at_a_bad_image(two_shares, tmp_path, seed):
    """Whichever of them meets it: the first or the second process."""
    done = train_on_two(two_shares, tmp_path / "run", "--on-bad-image", "fail", "--seed", seed)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("--on-bad-image skip") == 1


@pytest.mark.slow
def test_two_processes_train_on_with_a_bad_image(two_shares, tmp_path):
    """An odd number of images to validate on, too: the second process has one batch less."""
    done = train_on_two(two_shares, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "after 2 epochs" in done.stdout


@pytest.fixture
def two_shares(photos, tmp_path):
    """264 images to train on, one of them bad, and 17 to validate on."""
    shutil.copytree(photos, tmp_path / "data" / "train")
    shutil.copytree(photos, tmp_path / "data" / "val")
    for number in range(7):
        (tmp_path / "data" / "val" / "warm" / f"{number}.png").unlink()
    for number in range(20, 140):
        for name in ("warm", "cold"):
            folder = tmp_path / "data" / "train" / name
            shutil.copy(folder / "0.png", folder / f"{number}.png")
    (tmp_path / "data" / "train" / "warm" / "5.png").write_bytes(b"")
    return tmp_path / "data"


def train_on_two(data, output, *more):
    words = ["--data", data, "--model", "resnet8", "--epochs", 2, "--set", "batch_size=8", "--set", "accumulate=4"]
    words += ["--device", "cpu", "--devices", 2, "-o", output, *more]
    return subprocess.run(command("train", *words), capture_output=True, text=True, timeout=300)
