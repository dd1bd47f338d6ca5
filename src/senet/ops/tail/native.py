"""The sweeps of ``senet.ops.tail.definitions`` in C++ (sweeps.hpp): float32, float64 and bfloat16 maps on the CPU."""

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from senet.ops.csrc.build import library, why_not
from senet.ops.layout import in_layout, prepared
from senet.ops.reference import table_dtype
from senet.ops.tail import definitions as sweeps

__all__ = ["TYPES", "affine", "affine_backward", "mean", "moments", "moments_backward", "why_not"]

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p

TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(library(), f"{name}_{TYPES[dtype]}")
    function.restype = None
    return function


def address(x: Tensor | None) -> int | None:
    """Where a tensor lies; None, the null pointer, where there is none."""
    if x is None:
        return None
    if not x.is_cpu:
        raise RuntimeError(
            f"senet: Expected all tensors to be on the same device, but found at least two devices, cpu and {x.device}!"
        )
    return x.data_ptr()


def call(name: str, u: Tensor, *args: Tensor | float | None) -> None:
    """Call a function of the library for a map: it gets shape, threads, layout, then numbers and pointers of tensors.

    ``u`` is in one of the two layouts (see ``prepared``), tables are contiguous; an ``int`` is passed as C's int.
    """
    n, c, *s = u.shape
    values: list[Any] = [_int64(n), _int64(c), _int64(math.prod(s)), torch.get_num_threads(), not u.is_contiguous()]
    for x in args:
        if isinstance(x, Tensor):
            values.append(_pointer(address(x)))
        else:
            values.append(ctypes.c_double(x) if isinstance(x, float) else x)  # None is the null pointer
    _function(name, u.dtype)(*values)


def _table(u: Tensor) -> Tensor:
    return torch.empty(u.shape[:2], dtype=table_dtype(u.dtype))


def _are_tables(u: Tensor, *tables: Tensor) -> bool:
    dtype, shape = table_dtype(u.dtype), u.shape[:2]
    return all(table.is_cpu and table.dtype == dtype and table.shape == shape for table in tables)


def moments(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sweeps.moments``."""
    u, _ = prepared(u)
    m, d, v = _table(u), _table(u), _table(u)
    call("moments", u, u, m, d, v)
    return m, d, v


def mean(u: Tensor) -> Tensor:
    """See ``sweeps.mean``."""
    u, _ = prepared(u)
    m = _table(u)
    call("mean", u, u, m)
    return m


def affine(u: Tensor, m: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """See ``sweeps.affine``."""
    if not _are_tables(u, m, a, b) or (shortcut is not None and shortcut.shape != u.shape):
        return sweeps.affine(u, m, a, b, shortcut, relu)  # C++ would read past the end
    u, last = prepared(u)
    shortcut = None if shortcut is None else in_layout(shortcut.to(u.dtype), last)
    out = torch.empty_like(u)
    call("affine", u, u, m.contiguous(), a.contiguous(), b.contiguous(), shortcut, int(relu), out)
    return out


def affine_backward(dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sweeps.affine_backward``."""
    u, last = prepared(u)
    dout, out = in_layout(dout, last), in_layout(out, last)
    g = dout if out is None else torch.empty_like(u)
    da, db = _table(u), _table(u)
    call("affine_backward", u, dout, out, u, m.contiguous(), g, da, db)
    return g, da, db


def moments_backward(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor) -> Tensor:
    """See ``sweeps.moments_backward``."""
    u, last = prepared(u)
    du = torch.empty_like(u)
    size = u.shape[2:].numel()
    offset, slope = dm / size, dv * (2 / size)
    call("moments_backward", u, in_layout(g, last), u, m.contiguous(), a.contiguous(), offset, slope, du)
    return du
