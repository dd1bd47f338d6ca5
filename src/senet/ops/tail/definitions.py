"""The four sweeps over feature maps that training needs, in plain PyTorch (derivation: docs/zero-tax.md).

Everything else of a residual tail happens on (N, C) tables. A *sweep* reads its maps once and writes at most one.
These definitions are what the compiled backend compiles, what an outer ``torch.compile`` traces, and what the Triton
kernels are tested against.

Shapes: maps (N, C, *S) of any layout; tables (N, C) in float32, or float64 for float64 maps.
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
    """Where differences of means are measured from: each channel's first value in the first image, (C,)."""
    if not u.shape[0]:
        return u.new_zeros(u.shape[1], dtype=table_dtype(u.dtype))
    x = u.detach()[0]
    while x.ndim > 1:
        x = x.select(1, 0)
    return x.to(table_dtype(u.dtype))


def moments(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward sweep 1: m, d and v of each channel of each image, three (N, C) tables.

    m is the mean, v the centred (biased) variance, and d = m − ``pivot(u)``, to all its digits: where the mean is large
    beside the deviation, m has few left to tell images apart. All are taken from the first position's value, free in a
    fused sweep: compilers add one value after the other, and would round each sum to the digits of the mean.
    """
    spatial = tuple(range(2, u.ndim))
    if not u.shape[0]:  # a rank without images; torch.var_mean warns
        return mean(u), mean(u), mean(u)
    first = u.detach().to(table_dtype(u.dtype))
    for axis in spatial:
        first = first.narrow(axis, 0, 1)
    variance, from_first = torch.var_mean(u - first, spatial, correction=0)
    first = first.flatten(1)
    return from_first + first, from_first + (first - first[:1]), variance


def mean(u: Tensor) -> Tensor:
    """Forward sweep 1 where no variance is asked for: the mean of each channel of each image, (N, C)."""
    return u.mean(tuple(range(2, u.ndim)), dtype=table_dtype(u.dtype))


def affine(u: Tensor, m: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """Forward sweep 2: δ(a·(u − m) + b + shortcut), computed in the tables' type and rounded once, to the map's.

    Centring on m keeps it well conditioned for maps whose mean is large beside their deviation.
    """
    y = _over(a, u) * (u - _over(m, u)) + _over(b, u)
    if shortcut is not None:
        y = y + shortcut
    return (torch.relu(y) if relu else y).to(u.dtype)


def affine_backward(dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward sweep 1: g = dout where out > 0, else 0, with Σg·(u − m) and Σg over the positions, two (N, C) tables.

    ``out`` None: there was no ReLU, and g is ``dout`` itself. g is also the shortcut's gradient.
    """
    g = dout if out is None else torch.where(out <= 0, 0, dout)  # NaN passes, as in PyTorch's own ReLU
    return g, *product_sums(g, u, m)


def product_sums(g: Tensor, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Σg·(u − m) and Σg over the positions, two (N, C) tables."""
    spatial, wide = tuple(range(2, u.ndim)), g.to(m.dtype)
    return (wide * (u - _over(m, u))).sum(spatial), wide.sum(spatial)


def moments_backward(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor) -> Tensor:
    """Backward sweep 2: du = a·g + dm/S + (2·dv/S)·(u − m), the whole gradient of u, written once."""
    size = positions(u)
    du = _over(a, u) * g + _over(dm / size, u) + _over(2 * dv / size, u) * (u - _over(m, u))
    return du.to(u.dtype)
