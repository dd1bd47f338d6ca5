"""The four sweeps over feature maps that training needs, in plain PyTorch (derivation: docs/zero-tax.md).

The rest of a residual tail works on (N, C) tables. A *sweep* reads its feature maps (*maps*) once and writes at most
one. The compiled backend compiles these definitions, an outer ``torch.compile`` traces them, and the Triton kernels are
tested against them.

Shapes: maps (N, C, *S) in any layout; tables (N, C) in float32, or float64 for float64 maps.
"""

import torch
from torch import Tensor

from senet.ops.reference import table_dtype


def positions(u: Tensor) -> int:
    """S, the number of positions of a map."""
    return u[0, 0].numel() if u.shape[0] else u.shape[2:].numel()


def _over(table: Tensor, u: Tensor) -> Tensor:
    """The table, broadcast over the positions of the map."""
    return table.reshape(*table.shape, *(1,) * (u.ndim - 2))


def pivot(u: Tensor) -> Tensor:
    """The origin for differences of means: the first value of each channel in the first image, (C,)."""
    if not u.shape[0]:
        return u.new_zeros(u.shape[1], dtype=table_dtype(u.dtype))
    x = u.detach()[0]
    while x.ndim > 1:
        x = x.select(1, 0)
    return x.to(table_dtype(u.dtype))


def moments(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward sweep 1: m, d, and v of each channel of each image, three (N, C) tables.

    m is the mean, v the centered (biased) variance, and d = m − ``pivot(u)`` at full precision: if the mean is large
    relative to the standard deviation, too few digits of m are left to distinguish the images. All three are computed
    relative to the value at the first position, which is free in a fused sweep. Otherwise, compiled code, which sums
    sequentially, would round each sum to the precision of the mean.
    """
    spatial = tuple(range(2, u.ndim))
    if not u.shape[0]:  # a rank without images, for which torch.var_mean would warn
        return mean(u), mean(u), mean(u)
    first = u.detach().to(table_dtype(u.dtype))
    for axis in spatial:
        first = first.narrow(axis, 0, 1)
    variance, from_first = torch.var_mean(u - first, spatial, correction=0)
    first = first.flatten(1)
    return from_first + first, from_first + (first - first[:1]), variance


def mean(u: Tensor) -> Tensor:
    """Forward sweep 1 without the variance: the mean of each channel of each image, (N, C)."""
    return u.mean(tuple(range(2, u.ndim)), dtype=table_dtype(u.dtype))


def affine(u: Tensor, m: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """Forward sweep 2: δ(a·(u − m) + b + shortcut), computed in the dtype of the tables and rounded once to that of u.

    Subtracting m first keeps it well conditioned if the mean is large relative to the standard deviation.
    """
    y = _over(a, u) * (u - _over(m, u)) + _over(b, u)
    if shortcut is not None:
        y = y + shortcut
    return (torch.relu(y) if relu else y).to(u.dtype)


def affine_backward(dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward sweep 1: g = dout where out > 0, else 0; and Σg·(u − m) and Σg over the positions, two (N, C) tables.

    If ``out`` is None, there was no ReLU, and g is ``dout``. g is also the gradient of the shortcut.
    """
    g = dout if out is None else torch.where(out <= 0, 0, dout)  # NaN propagates, as in PyTorch's ReLU
    return g, *product_sums(g, u, m)


def product_sums(g: Tensor, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Σg·(u − m) and Σg over the positions, two (N, C) tables."""
    spatial, wide = tuple(range(2, u.ndim)), g.to(m.dtype)
    return (wide * (u - _over(m, u))).sum(spatial), wide.sum(spatial)


def moments_backward(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor) -> Tensor:
    """Backward sweep 2: du = a·g + dm/S + (2·dv/S)·(u − m), the complete gradient of u, written once."""
    size = positions(u)
    du = _over(a, u) * g + _over(dm / size, u) + _over(2 * dv / size, u) * (u - _over(m, u))
    return du.to(u.dtype)
