"""From which size of map the C++ tail is faster than PyTorch's own operations: rows of results/crossover.csv.

    python benchmarks/crossover.py [--rounds 15]

Forward and backward of batch norm (+ SE) + shortcut + ReLU, float32, 64 channels, a batch of 4; maps of 2^10 to 2^22
elements in both layouts. `senet.ops.backend.SMALLEST_NATIVE` is the smallest size from which all four stay below 1:
one size for plain and SE, so that twins take the same form.
"""

import argparse
from collections.abc import Callable

import torch
from common import append_row
from torch import nn

import senet
from senet.measure.timing import Timing, interleaved, ratio

BATCH, CHANNELS = 4, 64
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ENOUGH = 2**19  # elements a timing: small maps are done several times, so that the clock is not what is measured


def tail_step(backend: str, elements: int, layout: str, with_se: bool) -> Callable[[], None]:
    """Passes of one tail, forward and backward, as often as makes a time."""
    shape = (BATCH, CHANNELS, elements // (BATCH * CHANNELS), 1)
    if shape[2] > 4:
        shape = (BATCH, CHANNELS, shape[2] // 4, 4)
    memory_format = LAYOUTS[layout]
    u, shortcut = (torch.randn(shape).to(memory_format=memory_format).requires_grad_() for _ in range(2))
    dout = torch.randn(shape).to(memory_format=memory_format)
    tail, norm = senet.ResidualTail(), nn.BatchNorm2d(CHANNELS)
    se = senet.SqueezeExcite(CHANNELS) if with_se else None
    leaves = [u, shortcut, *norm.parameters(), *(se.parameters() if se is not None else ())]

    def run() -> None:
        with senet.use_backend(backend):
            for _ in range(max(1, ENOUGH // elements)):
                torch.autograd.grad(tail(u, norm, se, shortcut), leaves, dout)

    return run


def measure(elements: int, layout: str, with_se: bool, rounds: int) -> dict[str, Timing]:
    candidates = {name: tail_step(name, elements, layout, with_se) for name in ("reference", "native")}
    return interleaved(candidates, rounds, warmup=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    slower = 0
    for exponent in range(10, 23):
        for layout in LAYOUTS:
            for with_se in (True, False):
                times = measure(2**exponent, layout, with_se, rounds)
                result = ratio(times["native"], times["reference"])
                tail = "se" if with_se else "plain"
                values = {"ratio": result.median, "q25": result.q25, "q75": result.q75}
                shown = {name: round(value, 3) for name, value in values.items()}
                print(f"2^{exponent:<3} {layout:14} {tail:6} native / reference {shown}", flush=True)
                append_row("crossover.csv", tail=tail, layout=layout, elements=2**exponent, rounds=rounds, **shown)
                if result.median >= 1:
                    slower = 2**exponent
    print(f"native is faster for all from {slower * 2 if slower else 2**10} elements on")


if __name__ == "__main__":
    main()
