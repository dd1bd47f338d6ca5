"""Our convolutions and FC layers for inference ÷ PyTorch's (oneDNN with packed weights, F.linear), one by one.

    python benchmarks/convolutions.py [--rounds 60]

Both include bias and ReLU. As in a network, weights are not in the cache, and feature maps are. Correctness comes
first: the results must agree, or nothing is timed. Each ratio becomes a row of results/convolutions.csv, from which the
rules in `src/senet/ops/conv/native.py` were chosen. With `--all`, ours are also measured where oneDNN is used.
"""

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from common import append_row

from senet.ops.conv import native as convolutions
from senet.ops.conv.native import OwnConv2d, PackedConv2d, PackedLinear
from senet.system.timing import interleaved, ratio

# kernel, stride, channels, output channels, side of the feature map: those of ResNet-50, then those of other networks.
SHAPES = (
    (3, 1, 64, 64, 56), (3, 1, 128, 128, 28), (3, 1, 256, 256, 14), (3, 1, 512, 512, 7),
    (3, 2, 128, 128, 56), (3, 2, 256, 256, 28), (3, 2, 512, 512, 14),
    (1, 1, 64, 256, 56), (1, 1, 256, 64, 56), (1, 1, 128, 512, 28), (1, 1, 512, 128, 28),
    (1, 1, 256, 1024, 14), (1, 1, 1024, 256, 14), (1, 1, 512, 2048, 7), (1, 1, 2048, 512, 7),
    (1, 2, 256, 512, 56), (1, 2, 512, 1024, 28), (1, 2, 1024, 2048, 14),
    (3, 1, 16, 16, 32), (3, 1, 16, 32, 32), (3, 1, 32, 32, 16), (3, 1, 64, 64, 8), (3, 1, 64, 64, 224),
    (3, 1, 64, 16, 56), (3, 1, 192, 48, 28), (3, 1, 160, 224, 14), (3, 2, 192, 48, 28), (1, 1, 192, 48, 28),
    (1, 1, 64, 64, 224), (5, 1, 64, 96, 28),
)  # fmt: skip
LINEAR = ((2048, 1000), (512, 1000), (25088, 4096), (4096, 4096), (64, 10))
COPIES = 6  # copies of the weights, used in rotation
COLD = 24 * 2**20  # bytes that are read in between, to evict the weights


def time_pair(mine: list[Any], theirs: list[Any], x: torch.Tensor, rounds: int) -> Any:
    """The ratio of the times of two lists of equivalent functions of x, called in rotation."""
    other, turn = torch.randn(COLD // 4), 0

    def step(functions: list[Any]) -> Any:
        def run() -> None:
            functions[turn % COPIES](x)

        return run

    def cool() -> None:
        nonlocal turn
        turn += 1
        other.sum()
        x.sum()

    want = theirs[0](x)
    if not torch.allclose(mine[0](x), want, rtol=1e-4, atol=1e-4 * want.abs().max().item()):
        raise SystemExit("our result differs from PyTorch's; nothing is timed")
    times = interleaved({"own": step(mine), "theirs": step(theirs)}, rounds, warmup=3, before=cool)
    return ratio(times["own"], times["theirs"])


def measure_convolution(shape: tuple[int, ...], batch: int, everything: bool, rounds: int) -> None:
    kernel, stride, c, out, side = shape
    weight, bias = torch.randn(out, c, kernel, kernel) / (kernel * c**0.5), torch.randn(out)
    x = torch.randn(batch, c, side, side).contiguous(memory_format=torch.channels_last)
    sides, pad = ([stride] * 2, [kernel // 2] * 2, [1, 1]), kernel // 2
    packed = [PackedConv2d(weight.clone(), bias, *sides, 1, "relu", []) for _ in range(COPIES)]
    mine: list[Any] = [conv.own for conv in packed]
    used = mine[0] is not None and mine[0].takes(x, alone=True)
    if not used and not everything:
        return
    if mine[0] is None:
        mine = [OwnConv2d(weight.clone(), bias, stride, pad, 1, 0.0, math.inf) for _ in range(COPIES)]
    for conv in packed:
        conv.own = None
    method = "Winograd" if mine[0].winograd else "direct"
    what = f"{kernel}×{kernel}, stride {stride}, {c} → {out}, {side}²"
    record(what, method, batch, used, time_pair(mine, packed, x, rounds), rounds)


def measure_linear(c: int, out: int, batch: int, everything: bool, rounds: int) -> None:
    weight, bias = torch.randn(out, c) / c**0.5, torch.randn(out)
    fcs = [PackedLinear(weight.clone(), bias) for _ in range(COPIES)]
    if fcs[0].own is None and not everything:
        return
    used = fcs[0].own is not None
    for fc in fcs:
        fc.own = fc.own or OwnConv2d(weight[:, :, None, None], bias, 1, 0, 1, *convolutions.UNBOUNDED)
    theirs = [lambda x, fc=fc: F.linear(x, fc.weight, fc.bias) for fc in fcs]
    record(f"FC, {c} → {out}", "direct", batch, used, time_pair(fcs, theirs, torch.randn(batch, c), rounds), rounds)


def record(what: str, method: str, batch: int, used: bool, r: Any, rounds: int) -> None:
    print(f"{what}, batch {batch}, {method}{'' if used else ', not used'}: {r.median:.2f} ({r.q25:.2f}–{r.q75:.2f})")
    values = {"what": what, "method": method, "batch": batch, "used": int(used), "rounds": rounds}
    append_row("convolutions.csv", **values, ratio=f"{r.median:.4f}", q25=f"{r.q25:.4f}", q75=f"{r.q75:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--all", action="store_true", help="measure ours also where oneDNN is used")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for batch in (1, 8):
            for shape in SHAPES:
                measure_convolution(shape, batch, args.all, args.rounds)
            for c, out in LINEAR:
                measure_linear(c, out, batch, args.all, args.rounds)


if __name__ == "__main__":
    main()
