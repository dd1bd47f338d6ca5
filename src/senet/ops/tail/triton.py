"""The sweeps as Triton kernels: affine and the backward sweeps. The moments are in ``triton_moments``.

This file has only kernels and thin launchers; the math between the sweeps is ordinary PyTorch on (N, C) tables. Feature
maps (*maps*) are float32, float16, bfloat16, or float64 with one to three spatial axes; tables are float32, or float64
for float64 maps. All arithmetic is in the dtype of the tables and is rounded once.
"""

# Triton evaluates annotations, so only the constexpr arguments of a kernel have one. By convention, they are uppercase.
# mypy: disallow-incomplete-defs=False
# ruff: noqa: N803, N806

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from senet.ops.reference import table_dtype
from senet.ops.tail.triton_moments import mean, moments
from senet.ops.triton_tiles import ELEMENTWISE, PIPELINE, REDUCTION, block, like, place, planned

__all__ = [
    "affine",
    "affine_backward",
    "elementwise",
    "mean",
    "moments",
    "moments_backward",
    "scale_add_relu",
    "sums_behind",
]


@ELEMENTWISE
@triton.jit(do_not_specialize=["channels", "S", "C", "bucket"])
def _affine_kernel(
    u, center, factor, constant, other, other_factor, offset, out, channels, S, C, bucket,
    LAST: tl.constexpr, LIMIT: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr, AVERAGED: tl.constexpr, RELU: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = act(factor·(u − center) + constant + other_factor·other); all arguments but u and factor are optional.

    One tile per program. SHARED: the tables are (C,), not (N, C). AVERAGED: factor and constant are gradients of a
    variance and a mean over S positions. With ``offset``, ``other`` is the gradient of the output of a ReLU of
    other_factor·(u − center) + offset, and is masked to where that was positive.
    """
    ACC: tl.constexpr = tl.float64 if u.dtype.element_ty == tl.float64 else tl.float32
    s, c = block(LAST, LIMIT, TILE, WIDTH)
    parts = tl.cdiv(S, s.shape[0])
    _, first, s_stride, c_stride, count, at, real = place(S, C, parts, s.shape[0], c, LAST, VECTOR)
    if SHARED:
        at %= channels
    element = s[:, None] * s_stride + c[None, :] * c_stride
    inside = (s < count)[:, None] & real[None, :]
    # All loads are issued before the first value is used.
    x = tl.load(u + first + element, mask=inside, other=0.0)
    if other is not None:
        y = tl.load(other + first + element, mask=inside, other=0.0)
        if other_factor is not None:
            k = tl.load(other_factor + at, mask=real, other=0.0)
        if offset is not None:
            z = tl.load(offset + at, mask=real, other=0.0)
    a = tl.load(factor + at, mask=real, other=0.0).to(ACC)
    if center is not None:
        m = tl.load(center + at, mask=real, other=0.0)
    if constant is not None:
        b = tl.load(constant + at, mask=real, other=0.0).to(ACC)
    x = x.to(ACC)
    if center is not None:
        x -= m.to(ACC)[None, :]
    if offset is not None:  # NaN propagates, as in PyTorch
        y = tl.where(k.to(ACC)[None, :] * x + z.to(ACC)[None, :] <= 0, 0.0, y)
    x *= (a * 2 / S if AVERAGED else a)[None, :]
    if constant is not None:
        x += (b / S if AVERAGED else b)[None, :]
    if other is not None:
        y = y.to(ACC)
        if other_factor is not None:
            y *= k.to(ACC)[None, :]
        x += y
    if RELU:
        x = tl.where(x < 0, 0.0, x)  # NaN propagates, as in torch.relu
    tl.store(out + first + element, x.to(out.dtype.element_ty), mask=inside)


@REDUCTION
@triton.jit(do_not_specialize=["channels", "S", "C", "parts", "length", "tables", "bucket"])
def _affine_backward_kernel(
    dout, out, u, m, factor, offset, g, da, db, channels, S, C, parts, length, tables, bucket,
    LAST: tl.constexpr, LIMIT: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """g = dout·(out > 0), if ``out`` is given; Σg·(u − m) and Σg over one part of S, written to row ``part``.

    SHARED: the tables are (C,), not (N, C). With ``offset``, out is recomputed as factor·(u − m) + offset, and g is
    not written.
    """
    ACC: tl.constexpr = da.dtype.element_ty
    s, c = block(LAST, LIMIT, TILE, WIDTH)
    length = length // 16 * 16
    part, first, s_stride, c_stride, count, at, real = place(S, C, parts, length, c, LAST, VECTOR)
    element = s[:, None] * s_stride + c[None, :] * c_stride
    entry = at % channels if SHARED else at
    center = tl.load(m + entry, mask=real, other=0.0).to(ACC)
    if offset is not None:
        a = tl.load(factor + entry, mask=real, other=0.0).to(ACC)
        z = tl.load(offset + entry, mask=real, other=0.0).to(ACC)
    sum_gu = tl.zeros([s.shape[0], c.shape[0]], ACC)
    sum_g = tl.zeros([s.shape[0], c.shape[0]], ACC)
    for start in tl.range(0, count, s.shape[0], num_stages=PIPELINE):
        inside = (start + s < count)[:, None] & real[None, :]
        d = tl.load(dout + first + element, mask=inside, other=0.0).to(ACC)
        x = tl.load(u + first + element, mask=inside, other=0.0).to(ACC)
        if out is not None:
            y = tl.load(out + first + element, mask=inside, other=0.0).to(ACC)
            d = tl.where(y <= 0, 0.0, d)  # NaN propagates, as in PyTorch
            tl.store(g + first + element, d.to(g.dtype.element_ty), mask=inside)
        first += s.shape[0] * s_stride
        x -= center[None, :]
        if offset is not None:
            d = tl.where(a[None, :] * x + z[None, :] <= 0, 0.0, d)
        sum_gu += d * x
        sum_g += d
    at += part * tables
    tl.store(da + at, tl.sum(sum_gu, 0), mask=real)
    tl.store(db + at, tl.sum(sum_g, 0), mask=real)


def elementwise(
    u: Tensor, m: Tensor | None, a: Tensor, b: Tensor | None, other: Tensor | None, factor: Tensor | None,
    offset: Tensor | None = None, *, averaged: bool = False, relu: bool = False,
) -> Tensor:  # fmt: skip
    """A map like ``u``, as computed by ``_affine_kernel``. The tables are all (N, C) or all (C,)."""
    u, plan = planned(u)
    out = torch.empty_like(u)
    if u.numel() == 0:
        return out
    other = None if other is None else like(other, u, plan)
    shared = a.ndim == 1
    m, b, factor = (None if table is None else table.contiguous() for table in (m, b, factor))
    with torch.cuda.device_of(u):
        _affine_kernel[plan.grid(None)](
            u, m, a.contiguous(), b, other, factor, offset, out, u.shape[1], plan.s, plan.c, *plan.constants,
            shared, averaged, relu,
        )  # fmt: skip
    return out


def affine(u: Tensor, m: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """act(a·(u − m) + b + shortcut): a map with the dtype and layout of ``u``; m, a, b are (N, C) tables."""
    return elementwise(u, m, a, b, shortcut, None, relu=relu)


def scale_add_relu(u: Tensor, gate_nc: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """act(gate·u + shortcut), a map like ``u``: for inference if the last convolution is not 1×1."""
    return elementwise(u, None, gate_nc, None, shortcut, None, relu=relu)


def moments_backward(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor) -> Tensor:
    """du = a·g + dm/S + (2·dv/S)·(u − m), a map like ``u``: the gradient through `affine` and `moments` together."""
    return elementwise(u, m, dv, dm, g, a, averaged=True)


def affine_backward(dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(g, da, db): g = dout·(out > 0), or dout if ``out`` is None; da = Σg·(u − m) and db = Σg over the positions."""
    g, da, db = sums_behind(dout, out, u, m)
    return (g, da[0], db[0]) if len(da) == 1 else (g, da.sum(0), db.sum(0))


def sums_behind(
    dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor, factor: Tensor | None = None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """g, a map, and two sums for each part of S, (parts, N, C), as computed by ``_affine_backward_kernel``.

    ``m`` is (N, C) or (C,). Without ``out``, g is ``dout`` in the layout of ``u``, and the sums are those of ``dout``.
    With ``factor`` and ``offset``, (C,), they are those of ``dout`` masked to where factor·(u − m) + offset > 0.
    """
    u, plan = planned(u)
    parts = plan.split[2]
    da = torch.empty((parts, *u.shape[:2]), dtype=table_dtype(u.dtype), device=u.device)
    db = torch.empty_like(da)
    dout = like(dout, u, plan)
    g = dout if out is None else torch.empty_like(u)
    if u.numel() == 0:
        return g, da.zero_(), db.zero_()
    out = None if out is None else like(out, u, plan)
    with torch.cuda.device_of(u):
        _affine_backward_kernel[plan.grid(parts)](
            dout, out, u, m.contiguous(), factor, offset, g, da, db, u.shape[1], *plan.split, *plan.constants,
            m.ndim == 1,
        )  # fmt: skip
    return g, da, db
