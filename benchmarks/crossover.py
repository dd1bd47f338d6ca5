"""The feature-map size from which the C++ form is faster than PyTorch's operations: rows of results/crossover.csv.

    python benchmarks/crossover.py [--rounds 15]

Forward and backward passes of batch norm (+ SE) + shortcut + ReLU, and of batch norm + ReLU alone: float32, 64
channels, batch size 4, 2^12 to 2^23 elements, both layouts. The caches are evicted before each pass, as convolutions do
in a network. `senet.ops.dispatch.SMALLEST_NATIVE` and `SMALLEST_NATIVE_BARE` are chosen from these rows.
"""

import argparse
import time
from collections.abc import Callable

import torch
from common import append_row
from torch import nn

import senet
from senet.ops.tail.tail import norm_tail
from senet.system.timing import Timing, ratio

BATCH, CHANNELS = 4, 64
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
KINDS = ("se", "plain", "norm+relu")
OTHER = torch.empty(2**24)  # 64 MB, more than the private caches of a core


def one_pass(backend: str, elements: int, layout: str, kind: str) -> Callable[[], float]:
    """A function that returns the seconds of one form, forward and backward, each with cold caches."""
    shape = (BATCH, CHANNELS, elements // (BATCH * CHANNELS * 4), 4)
    u, shortcut, dout = (torch.randn(shape).to(memory_format=LAYOUTS[layout]) for _ in range(3))
    norm = nn.BatchNorm2d(CHANNELS)
    se = senet.SqueezeExcite(CHANNELS) if kind == "se" else None
    gate = None if se is None else se.fully_connected()
    leaves = [u.requires_grad_(), *norm.parameters(), *(se.parameters() if se is not None else ())]
    if kind != "norm+relu":
        leaves.append(shortcut.requires_grad_())
    added = None if kind == "norm+relu" else shortcut

    def run() -> float:
        with senet.use_backend(backend):
            OTHER.fill_(1)
            start = time.perf_counter()
            out = norm_tail(u, norm, gate, added, True, "auto")
            forward = time.perf_counter() - start
            OTHER.fill_(2)
            start = time.perf_counter()
            torch.autograd.grad(out, leaves, dout)
            return forward + time.perf_counter() - start

    return run


def measure(elements: int, layout: str, kind: str, rounds: int) -> dict[str, Timing]:
    candidates = {name: one_pass(name, elements, layout, kind) for name in ("reference", "native")}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 2):
        for name, run in candidates.items():
            taken = run()
            if turn >= 2:
                seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    slower = dict.fromkeys(KINDS, 0)
    for exponent in range(12, 24):
        for layout in LAYOUTS:
            for kind in KINDS:
                times = measure(2**exponent, layout, kind, rounds)
                result = ratio(times["native"], times["reference"])
                values = {"ratio": result.median, "q25": result.q25, "q75": result.q75}
                shown = {name: round(value, 3) for name, value in values.items()}
                print(f"2^{exponent:<3} {layout:14} {kind:10} native / reference {shown}", flush=True)
                append_row("crossover.csv", tail=kind, layout=layout, elements=2**exponent, rounds=rounds, **shown)
                if result.median >= 1:
                    slower[kind] = 2**exponent
    for kind, largest in slower.items():
        print(f"{kind}: native is faster from {largest * 2 if largest else 2**12} elements on")


if __name__ == "__main__":
    main()
