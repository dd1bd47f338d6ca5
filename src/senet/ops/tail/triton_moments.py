"""The moments of a feature map (a *map*) as Triton kernels: mean and variance of each channel of each image."""

# Triton evaluates annotations, so only the constexpr arguments of a kernel have one. By convention, they are uppercase.
# mypy: disallow-incomplete-defs=False
# ruff: noqa: N803, N806

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from senet.ops.reference import table_dtype
from senet.ops.triton_tiles import PIPELINE, REDUCTION, Plan, block, place, planned, tuned

SMALL = 256  # the most positions of a channels_last map that one tile holds; enough for 14×14


@REDUCTION
@triton.jit(do_not_specialize=["channels", "S", "C", "parts", "length", "tables", "bucket"])
def _moments_kernel(
    u, mean, from_pivot, variance, channels, S, C, parts, length, tables, bucket,
    LAST: tl.constexpr, LIMIT: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean, mean − pivot, and variance of each (n, c) over one part of S, written to row ``part`` of the tables.

    Sums u − c and its square, where c is the mean of the first tile of the part. The subtraction is exact for data far
    from zero. By Cauchy's inequality, c is at most √(positions ÷ rows of a tile) standard deviations from the mean for
    any data, so only a few digits can be lost. This takes four instructions per element. Welford's update takes eight,
    which would be slower than the memory.
    The pivot is the value at the first position of the first image. If S has several parts, the means stay relative to
    the pilot (the value at the first position of the (n, c)) for `_combine_kernel`, and ``from_pivot`` is None.
    """
    ACC: tl.constexpr = mean.dtype.element_ty
    s, c = block(LAST, LIMIT, TILE, WIDTH)
    length = length // 16 * 16
    part, first, s_stride, c_stride, count, at, real = place(S, C, parts, length, c, LAST, VECTOR)
    element = s[:, None] * s_stride + c[None, :] * c_stride
    pilot = tl.load(u + (first - (part * length).to(tl.int64) * s_stride) + c * c_stride, mask=real, other=0.0).to(ACC)
    inside = (s < count)[:, None] & real[None, :]
    x = tl.load(u + first + element, mask=inside, other=0.0).to(ACC)
    start_mean = tl.sum(tl.where(inside, x - pilot[None, :], 0.0), 0) / tl.minimum(count, s.shape[0])
    center = pilot + start_mean
    total = tl.zeros([s.shape[0], c.shape[0]], ACC)
    squares = tl.zeros([s.shape[0], c.shape[0]], ACC)
    whole = count // s.shape[0] * s.shape[0]
    for _ in tl.range(0, whole, s.shape[0], num_stages=PIPELINE):
        apart = tl.load(u + first + element, mask=real[None, :], other=0.0).to(ACC) - center[None, :]
        first += s.shape[0] * s_stride
        total += apart
        if variance is not None:
            squares += apart * apart
    inside = (whole + s < count)[:, None] & real[None, :]
    x = tl.load(u + first + element, mask=inside, other=0.0).to(ACC)
    apart = tl.where(inside, x - center[None, :], 0.0)
    from_center = tl.sum(total + apart, 0) / count
    merged = (center - pilot) + from_center
    if from_pivot is not None:
        pivot = tl.load(u + at % channels * c_stride, mask=real, other=0.0).to(ACC)
        tl.store(from_pivot + at, merged + (pilot - pivot), mask=real)
    at += part * tables
    tl.store(mean + at, tl.where(parts == 1, merged + pilot, merged), mask=real)
    if variance is not None:
        square = tl.sum(squares + apart * apart, 0) / count - from_center * from_center
        tl.store(variance + at, tl.where(square < 0, 0.0, square), mask=real)  # NaN propagates


@tuned(
    [triton.Config({"WIDTH": width}, num_warps=warps) for width, warps in ((64, 4), (32, 4))],
    {"WIDTH": 64},
    ["ROWS", "LIMIT", "VECTOR", "bucket"],
)
@triton.jit(do_not_specialize=["channels", "S", "C", "bucket"])
def _small_moments_kernel(
    u, mean, from_pivot, variance, channels, S, C, bucket,
    ROWS: tl.constexpr, LIMIT: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same for small channels_last maps, whose S positions fit into one tile: two passes over a single load."""
    ACC: tl.constexpr = mean.dtype.element_ty
    C = (C // VECTOR) * VECTOR
    width: tl.constexpr = WIDTH if WIDTH < LIMIT else LIMIT
    s = tl.arange(0, ROWS)
    blocks = tl.cdiv(C, width)
    n = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * width + tl.arange(0, width)
    real = c < C
    inside = (s < S)[:, None] & real[None, :]
    here = u + n.to(tl.int64) * S * C
    x = tl.load(here + s[:, None] * C + c[None, :], mask=inside, other=0.0).to(ACC)
    pilot = tl.load(here + c, mask=real, other=0.0).to(ACC)
    x = tl.where(inside, x - pilot[None, :], 0.0)
    merged = tl.sum(x, 0) / S
    at = n * C + c
    if from_pivot is not None:
        pivot = tl.load(u + at % channels, mask=real, other=0.0).to(ACC)
        tl.store(from_pivot + at, merged + (pilot - pivot), mask=real)
    tl.store(mean + at, merged + pilot, mask=real)
    if variance is not None:
        apart = tl.where(inside, x - merged[None, :], 0.0)
        tl.store(variance + at, tl.sum(apart * apart, 0) / S, mask=real)


@triton.jit(do_not_specialize=["channels", "S", "C", "parts", "length", "tables"])
def _combine_kernel(
    u, part_mean, part_variance, mean, from_pivot, variance, channels, S, C, parts, length, tables,
    LAST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the parts of S by Chan's rule. All parts but the last have ``length`` positions."""
    ACC: tl.constexpr = mean.dtype.element_ty
    part = tl.arange(0, PARTS)[:, None]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = at < tables
    inside = (part < parts) & real
    weight = tl.where(part < parts, tl.minimum(length, S - part * length), 0).to(ACC)
    m = tl.load(part_mean + part * tables + at, mask=inside, other=0.0)
    merged = tl.sum(weight * m, 0, keep_dims=True) / S
    first = (at // C).to(tl.int64) * S * C + at % C if LAST else at.to(tl.int64) * S
    pilot = tl.load(u + first, mask=real, other=0.0).to(ACC)
    tl.store(mean + at, merged + pilot, mask=real)
    if from_pivot is not None:
        channel = at % channels
        pivot = tl.load(u + (channel if LAST else channel.to(tl.int64) * S), mask=real, other=0.0).to(ACC)
        tl.store(from_pivot + at, merged + (pilot - pivot), mask=real)
    if variance is not None:
        v = tl.load(part_variance + part * tables + at, mask=inside, other=0.0)
        v = tl.sum(weight * (v + (m - merged) * (m - merged)), 0, keep_dims=True) / S
        tl.store(variance + at, v, mask=real)


def _statistics(u: Tensor, variance: bool) -> list[Any]:
    """Mean, mean − pivot, and variance; the last two are None without ``variance``."""
    u, plan = planned(u)

    def tables(wanted: tuple[bool, bool, bool], *parts: int) -> list[Tensor | None]:
        shape, dtype = (*parts, *u.shape[:2]), table_dtype(u.dtype)
        return [torch.empty(shape, dtype=dtype, device=u.device) if table else None for table in wanted]

    result = tables((True, variance, variance))
    if u.numel() == 0:
        return result
    count, channels = plan.split[2], u.shape[1]
    parts = result if count == 1 else tables((True, False, variance), count)
    with torch.cuda.device_of(u):
        if plan.last and plan.s <= SMALL:
            _small_moments(u, result, plan)
            return result
        _moments_kernel[plan.grid(count)](u, *parts, channels, *plan.split, *plan.constants)
        if count > 1:
            rows = triton.next_power_of_2(count)
            block = max(4, 1024 // rows)
            grid = (triton.cdiv(plan.n * plan.c, block),)
            sizes = (channels, *plan.split)
            _combine_kernel[grid](u, parts[0], parts[2], *result, *sizes, plan.last, rows, block, enable_fp_fusion=True)
    return result


def _small_moments(u: Tensor, result: list[Tensor | None], plan: Plan) -> None:
    bucket, _, limit, vector = plan.constants
    rows = max(16, triton.next_power_of_2(plan.s))
    _small_moments_kernel[lambda meta: (plan.n * triton.cdiv(plan.c, min(meta["WIDTH"], limit)),)](
        u, *result, plan.c, plan.s, plan.c, bucket, rows, limit, vector
    )


def moments(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``definitions.moments``: (N, C, *S) → three (N, C) tables."""
    mean, from_pivot, variance = _statistics(u, variance=True)
    return mean, from_pivot, variance


def mean(h: Tensor) -> Tensor:
    """The squeeze (section 3.1, equation 2): the mean of each (n, c) over the positions, (N, C, *S) → (N, C)."""
    return _statistics(h, variance=False)[0]
