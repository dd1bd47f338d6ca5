"""The effect of freed memory on a training step in a process with one network: rows of results/allocator.csv.

    python benchmarks/allocator.py [--rounds 8] [--repeats 7]

`se_resnet50` and plain eager `resnet50`, channels_last, 224×224, batch size 8; each in a process that keeps freed
memory (`senet.keep_freed_memory`) and in an ordinary one. The steps of the four processes are interleaved. Each repeat
starts four new processes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from common import append_row
from torch import nn

import senet
from senet.system.timing import Timing, ratio

NETWORKS = {"plain": ("resnet50", "reference"), "se": ("se_resnet50", "auto")}
WORKERS = [f"{network}-{memory}" for network in NETWORKS for memory in ("keeps", "ordinary")]
PAIRS = (
    *(("se-keeps", "plain-keeps"), ("se-ordinary", "plain-ordinary")),
    *(("se-keeps", "se-ordinary"), ("plain-keeps", "plain-ordinary")),
)


def work(name: str, batch: int) -> None:
    """Run a training step per line of standard input; print its seconds, page faults, and the peak memory so far."""
    network, memory = name.split("-")
    if memory == "keeps" and not senet.keep_freed_memory():
        sys.exit("nothing to compare: there is no glibc, or the environment configures its allocator")
    model_name, backend = NETWORKS[network]
    torch.manual_seed(0)
    model = senet.create_model(model_name).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    y = torch.randint(1000, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    with senet.use_backend(backend):
        for _ in sys.stdin:
            faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            print(json.dumps([seconds, usage.ru_minflt - faults, usage.ru_maxrss / 1024]), flush=True)


def turn_by_turn(rounds: int, batch: int) -> dict[str, list[tuple[float, float, float]]]:
    """The steps of each worker: seconds, page faults, peak memory in MB."""
    command = [sys.executable, __file__, "--batch", str(batch), "--worker"]
    pipe = subprocess.PIPE
    workers = {name: subprocess.Popen([*command, name], stdin=pipe, stdout=pipe, text=True) for name in WORKERS}
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WORKERS}
    for turn in range(rounds + 3):
        for name in WORKERS if turn % 2 else WORKERS[::-1]:
            into, out = workers[name].stdin, workers[name].stdout
            assert into is not None
            assert out is not None
            print(file=into, flush=True)
            line = out.readline()
            if not line:
                sys.exit(1)  # the worker has printed the reason
            if turn >= 3:
                seen[name].append(json.loads(line))
    for process in workers.values():
        process.communicate()
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.batch)
        return 0
    ratios: dict[tuple[str, str], list[float]] = {pair: [] for pair in PAIRS}
    of_worker: dict[str, list[tuple[float, float]]] = {name: [] for name in WORKERS}
    for _ in range(args.repeats):
        seen = turn_by_turn(args.rounds, args.batch)
        for name, steps in seen.items():
            of_worker[name].append((statistics.median(step[1] for step in steps), steps[-1][2]))
        for pair in PAIRS:
            ratios[pair].append(ratio(*(Timing(tuple(step[0] for step in seen[name])) for name in pair)).median)
        print({"÷".join(pair): round(found[-1], 3) for pair, found in ratios.items()}, flush=True)
    for (numerator, denominator), found in ratios.items():
        q25, middle, q75 = statistics.quantiles(found, n=4, method="inclusive")
        faults, peak = (statistics.median(values) for values in zip(*of_worker[numerator], strict=True))
        row = {"batch": args.batch, "rounds": args.rounds, "repeats": args.repeats}
        row |= {"numerator": numerator, "denominator": denominator}
        row |= {"ratio": f"{middle:.4f}", "q25": f"{q25:.4f}", "q75": f"{q75:.4f}"}
        row |= {"faults_of_numerator": f"{faults:.0f}", "peak_mb_of_numerator": f"{peak:.0f}"}
        print(row)
        append_row("allocator.csv", **row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
