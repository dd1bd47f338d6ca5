"""The prebuilt C++ code of a wheel ÷ the same code compiled on this machine, in separate processes.

    make wheel && python benchmarks/prebuilt.py [--wheel dist/senet-….whl] [--rounds 40] [--processes 3]

Both run the wheel's Python code; `SENET_NATIVE` selects the library. Rounds are interleaved, one process at a time. The
control is a second process with the compiled code ÷ the first, which shows the noise of the measurement. Each workload
becomes a row of results/prebuilt.csv: median and quartiles over all rounds, the lowest and highest median of a process,
and the ratio of the fastest rounds, which other processes on the machine affected least.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

import senet
from senet.ops.tail.tail import norm_tail
from senet.system.timing import Timing, ratio

PAUSE = 0.02  # seconds before each call, in which the threads of the other process go to sleep
WAYS = {"prebuilt": "prebuilt", "built": "build", "control": "build"}  # name of a process → SENET_NATIVE
WORKS = ("train step's tail, 16x256x56x56", "accelerated se_resnet50, batch 1", "accelerated se_resnet50, batch 8")


def tail() -> Callable[[], object]:
    """Norm + SE + shortcut + ReLU, forward and backward."""
    u = torch.randn(16, 256, 56, 56).contiguous(memory_format=torch.channels_last).requires_grad_()
    shortcut = torch.randn_like(u).requires_grad_()
    norm, gate = torch.nn.BatchNorm2d(256), senet.SqueezeExcite(256).fully_connected()
    dout = torch.randn_like(u)

    def step() -> None:
        u.grad = shortcut.grad = None
        norm_tail(u, norm, gate, shortcut, True, "auto").backward(dout)

    return step


def inference(batch: int) -> Callable[[], object]:
    network = senet.accelerate(senet.create_model("se_resnet50", 1000).eval())
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad():
            network(x)

    return step


def work(name: str) -> None:
    """The worker process: run one step per line of standard input, and print its seconds."""
    from senet.ops.csrc import build

    torch.manual_seed(0)
    step = tail() if name == WORKS[0] else inference(int(name.rpartition(" ")[2]))
    step()
    print(build.loaded_from().name, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def start(name: str, native: str, packages: Path) -> tuple[subprocess.Popen[str], str]:
    environment = {**os.environ, "PYTHONPATH": str(packages), "SENET_NATIVE": native}
    command = [sys.executable, __file__, "--work", name]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def measured(name: str, rounds: int, packages: Path) -> tuple[dict[str, Timing], str]:
    """The times of the three processes, round by round, and the name of the prebuilt file."""
    started = {way: start(name, native, packages) for way, native in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(rounds + 3):
        for way in list(WAYS)[index % 3 :] + list(WAYS)[: index % 3]:
            process = started[way][0]
            assert process.stdin is not None
            assert process.stdout is not None
            time.sleep(PAUSE)
            process.stdin.write("\n")
            process.stdin.flush()
            seconds = float(process.stdout.readline())
            if index >= 3:
                times[way].append(seconds)
    for process, _ in started.values():
        process.communicate()
    return {way: Timing(tuple(values)) for way, values in times.items()}, started["prebuilt"][1]


def together(parts: list[Timing]) -> Timing:
    return Timing(tuple(seconds for part in parts for seconds in part.rounds))


def row(name: str, rounds: int, processes: int, packages: Path) -> dict[str, object]:
    runs = [measured(name, rounds, packages) for _ in range(processes)]
    values: dict[str, object] = {"work": name, "form": runs[0][1].removesuffix(".so"), "rounds": rounds * processes}
    built = together([times["built"] for times, _ in runs])
    values["built_ms"] = f"{built.median * 1000:.2f}"
    for way in ("prebuilt", "control"):
        own = together([times[way] for times, _ in runs])
        of_all = ratio(own, built)
        each = [ratio(times[way], times["built"]).median for times, _ in runs]
        values |= {way: f"{of_all.median:.3f}", f"{way}_q25": f"{of_all.q25:.3f}", f"{way}_q75": f"{of_all.q75:.3f}"}
        values |= {f"{way}_lowest": f"{min(each):.3f}", f"{way}_highest": f"{max(each):.3f}"}
        values[f"{way}_fastest"] = f"{own.fastest / built.fastest:.3f}"
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="default: the wheel for this machine in dist/")
    parser.add_argument("--rounds", type=int, default=40, help="rounds per process")
    parser.add_argument("--processes", type=int, default=3, help="successive processes per variant")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    from common import append_row

    wheel = args.wheel or next(iter(sorted(Path("dist").glob(f"*_{os.uname().machine}.whl"), reverse=True)), None)
    if wheel is None:
        raise SystemExit("dist/ has no wheel for this machine: run `make wheel`, or name one with --wheel")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        for name in WORKS:
            values = row(name, args.rounds, args.processes, Path(folder))
            print(values)
            append_row("prebuilt.csv", **values)
    return None


if __name__ == "__main__":
    main()
