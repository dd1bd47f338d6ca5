"""The sweeps of ``senet.ops.tail.definitions`` in C++ (sweeps.hpp): float32, float64, or bfloat16 on the CPU."""

import torch
from torch import Tensor

from senet.ops.border import have
from senet.ops.csrc.build import why_not
from senet.ops.csrc.calls import TYPES, call
from senet.ops.layout import in_layout, prepared
from senet.ops.reference import table_dtype
from senet.ops.tail import definitions as sweeps

__all__ = ["TYPES", "affine", "affine_backward", "mean", "moments", "moments_backward", "why_not"]


def _table(u: Tensor) -> Tensor:
    return torch.empty(u.shape[:2], dtype=table_dtype(u.dtype))


def _are_tables(u: Tensor, *tables: Tensor) -> bool:
    dtype, shape = table_dtype(u.dtype), u.shape[:2]
    return have(dtype, *((table, shape.numel()) for table in tables)) and all(t.shape == shape for t in tables)


def moments(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sweeps.moments``."""
    if not u.numel():  # there is no pivot
        return sweeps.moments(u)
    u, _ = prepared(u)
    m, d, v = _table(u), _table(u), _table(u)
    call("moments", u, u=u, mean=m, from_pivot=d, variance=v)
    return m, d, v


def mean(u: Tensor) -> Tensor:
    """See ``sweeps.mean``."""
    u, _ = prepared(u)
    m = _table(u)
    call("mean", u, u=u, mean=m)
    return m


def affine(u: Tensor, m: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """See ``sweeps.affine``."""
    m, a, b = m.contiguous(), a.contiguous(), b.contiguous()
    if not _are_tables(u, m, a, b) or (shortcut is not None and shortcut.shape != u.shape):
        return sweeps.affine(u, m, a, b, shortcut, relu)  # C++ would read past the end
    u, last = prepared(u)
    shortcut = None if shortcut is None else in_layout(shortcut.to(u.dtype), last)
    out = torch.empty_like(u)
    call("affine", u, u=u, m=m, a=a, b=b, shortcut=shortcut, relu=relu, out=out)
    return out


def affine_backward(dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sweeps.affine_backward``."""
    u, last = prepared(u)
    dout, out = in_layout(dout, last), in_layout(out, last)
    g = dout if out is None else torch.empty_like(u)
    da, db = _table(u), _table(u)
    call("affine_backward", u, dout=dout, out=out, u=u, m=m.contiguous(), g=g, da=da, db=db)
    return g, da, db


def moments_backward(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor) -> Tensor:
    """See ``sweeps.moments_backward``."""
    u, last = prepared(u)
    du = torch.empty_like(u)
    size = u.shape[2:].numel()
    offset, slope = (dm / size).contiguous(), (dv * (2 / size)).contiguous()
    g, m, a = in_layout(g, last), m.contiguous(), a.contiguous()
    call("moments_backward", u, g=g, u=u, m=m, a=a, offset=offset, slope=slope, du=du)
    return du
