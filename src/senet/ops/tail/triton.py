"""The four sweeps over feature maps as Triton kernels: moments, affine, and the backward sweep of each.

Kernels and thin launchers only; the mathematics between the sweeps is ordinary PyTorch on (N, C) tables. Maps are
float32, float16, bfloat16 or float64 with one to three spatial axes; tables are float32 (float64 for float64 maps),
and all arithmetic is done in the type of the tables and rounded once.

One source serves both memory layouts. A kernel sees a map as (n, s, c) and is told which axis is contiguous:
channels_last is (N, S, C); contiguous is a single sample of N·C channels, each a row of S positions.

What limits a sweep is bytes, so the design is for bytes in flight (Little's law on an H100: about 20 kB an SM) and for
full 128-byte lines: a thread moves 16 bytes at once where the alignment allows it, a row of a tile is 64 or 128
elements, a thread owns about 16 elements of every map, few enough registers for many programs on an SM. Accumulators
are kept for each element of the tile, so the loop of a reduction adds nothing up across threads; they meet once, after
the loop. Reductions of few (n, c) are split along S and combined from small tables in a fixed order: no atomics,
the same bits every time.
"""

# Triton reads annotations, so only the constexpr arguments of a kernel have one; by its custom they are in capitals.
# mypy: disallow-incomplete-defs=False
# ruff: noqa: N803, N806

from collections.abc import Callable
from functools import lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from senet.ops.reference import table_dtype

WIDEST = 128  # elements of the contiguous axis in the widest tile
# Split a reduction until there are about this many programs: 16 for each of 128 SMs, two full waves.
ENOUGH_PROGRAMS = 2048
MOST_PARTS = 1024
SMALL = 256  # positions of a channels_last map that one tile holds, 14×14 among them
# A reduction copies its next tiles to shared memory in the background. Left to the compiler, a thread asks for 16
# bytes, adds them up, and only then asks for the next (seen in the machine code).
PIPELINE = tl.constexpr(3)


def tuned(configs: list[triton.Config], small: dict[str, int], key: list[str]) -> Callable[[Any], Any]:
    """Autotuning, its choice kept on disk; the interpreter takes the ``small`` tile and times nothing."""
    if triton.knobs.runtime.interpret:
        configs = [triton.Config(small)]
    for config in configs:
        config.kwargs["enable_fp_fusion"] = True  # Triton's default is about to change
    return triton.autotune(configs, key=key, cache_results=True)


def _tiles(*choices: tuple[int, int, int]) -> Callable[[Any], Any]:
    """Tiles of so many elements, rows so wide, so many warps."""
    configs = [triton.Config({"TILE": tile, "WIDTH": width}, num_warps=warps) for tile, width, warps in choices]
    return tuned(configs, {"TILE": 256, "WIDTH": 64}, ["LAST", "LIMIT", "VECTOR", "bucket"])


# A row of a tile has fewer elements than the program has threads: then every thread loads the entries of the tables
# that it needs, otherwise Triton passes them on through shared memory and barriers.
_REDUCTION = _tiles((2048, 64, 4), (1024, 64, 4), (4096, 128, 8), (512, 64, 4))
_ELEMENTWISE = _tiles((2048, 64, 4), (1024, 64, 4), (4096, 128, 8), (4096, 64, 4))


@triton.jit
def _block(LAST: tl.constexpr, LIMIT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Positions and channels of a tile: WIDTH of the contiguous axis, or LIMIT where that is all there is."""
    width: tl.constexpr = WIDTH if WIDTH < LIMIT else LIMIT
    s: tl.constexpr = TILE // width if LAST else width
    c: tl.constexpr = width if LAST else TILE // width
    return tl.arange(0, s), tl.arange(0, c)


@triton.jit
def _place(S, C, parts, length, c, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Where this program works: ``length`` positions of a block of channels (``c`` counts them from 0).

    Returns the part of S, the offset of its first element, the strides, how many positions there are, the entries of
    an (n, c) table, and which of them exist. Programs side by side in the grid are so in memory.
    """
    # Put so that the compiler sees how the rows are aligned: this is what makes 16-byte accesses possible.
    if LAST:
        C = (C // VECTOR) * VECTOR
        s_stride, c_stride = C, 1
    else:
        S = (S // VECTOR) * VECTOR
        s_stride, c_stride = 1, S.to(tl.int64)  # a few rows of a large volume pass 2³¹ elements
    blocks = tl.cdiv(C, c.shape[0])
    pid = tl.program_id(0)
    if LAST:
        part = (pid // blocks) % parts
        first_c = pid % blocks * c.shape[0]
    else:
        part = pid % parts
        first_c = (pid // parts) % blocks * c.shape[0]
    n = pid // (parts * blocks)
    first = n.to(tl.int64) * S * C + (part * length).to(tl.int64) * s_stride + first_c.to(tl.int64) * c_stride
    count = tl.minimum(length, S - part * length)
    return part, first, s_stride, c_stride, count, n * C + first_c + c, first_c + c < C


@_REDUCTION
@triton.jit(do_not_specialize=["channels", "S", "C", "parts", "length", "tables", "bucket"])
def _moments_kernel(
    u, mean, from_pivot, variance, channels, S, C, parts, length, tables, bucket,
    LAST: tl.constexpr, LIMIT: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean, mean − pivot and variance of each (n, c) over one part of S, into row ``part`` of the tables.

    Sums of u − c and of its square, where c is the mean of the part's first tile: the subtraction is exact for data far
    from zero. By Cauchy's inequality c is at most √(positions ÷ rows of a tile) deviations from the mean, whatever the
    data, so a few digits at most are lost; and an element costs four instructions, where Welford's update costs eight,
    which is more than a GPU has time for while memory delivers the next.
    The pivot is the first position of the first image. Where S has several parts, the means stay relative to the pilot,
    the first position of the (n, c), for `_combine_kernel`, and there is no ``from_pivot``.
    """
    ACC: tl.constexpr = mean.dtype.element_ty
    s, c = _block(LAST, LIMIT, TILE, WIDTH)
    length = length // 16 * 16
    part, first, s_stride, c_stride, count, at, real = _place(S, C, parts, length, c, LAST, VECTOR)
    element = s[:, None] * s_stride + c[None, :] * c_stride
    pilot = tl.load(u + (first - (part * length).to(tl.int64) * s_stride) + c * c_stride, mask=real, other=0.0).to(ACC)
    inside = (s < count)[:, None] & real[None, :]
    x = tl.load(u + first + element, mask=inside, other=0.0).to(ACC)
    start_mean = tl.sum(tl.where(inside, x - pilot[None, :], 0.0), 0) / tl.minimum(count, s.shape[0])
    centre = pilot + start_mean
    total = tl.zeros([s.shape[0], c.shape[0]], ACC)
    squares = tl.zeros([s.shape[0], c.shape[0]], ACC)
    whole = count // s.shape[0] * s.shape[0]
    for _ in tl.range(0, whole, s.shape[0], num_stages=PIPELINE):
        apart = tl.load(u + first + element, mask=real[None, :], other=0.0).to(ACC) - centre[None, :]
        first += s.shape[0] * s_stride
        total += apart
        if variance is not None:
            squares += apart * apart
    inside = (whole + s < count)[:, None] & real[None, :]
    x = tl.load(u + first + element, mask=inside, other=0.0).to(ACC)
    apart = tl.where(inside, x - centre[None, :], 0.0)
    from_centre = tl.sum(total + apart, 0) / count
    merged = (centre - pilot) + from_centre
    if from_pivot is not None:
        pivot = tl.load(u + at % channels * c_stride, mask=real, other=0.0).to(ACC)
        tl.store(from_pivot + at, merged + (pilot - pivot), mask=real)
    at += part * tables
    tl.store(mean + at, tl.where(parts == 1, merged + pilot, merged), mask=real)
    if variance is not None:
        square = tl.sum(squares + apart * apart, 0) / count - from_centre * from_centre
        tl.store(variance + at, tl.where(square < 0, 0.0, square), mask=real)  # keeps NaN


@tuned(
    [triton.Config({"WIDTH": width}, num_warps=warps) for width, warps in ((64, 4), (64, 8), (32, 4), (32, 8))],
    {"WIDTH": 64},
    ["ROWS", "LIMIT", "VECTOR", "bucket"],
)
@triton.jit(do_not_specialize=["channels", "S", "C", "bucket"])
def _small_moments_kernel(
    u, mean, from_pivot, variance, channels, S, C, bucket,
    ROWS: tl.constexpr, LIMIT: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same for small channels_last maps, whose S positions are one tile: read once, averaged, then squared."""
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
    """Chan's merge of the parts of S, each ``length`` positions long but the last."""
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


@_ELEMENTWISE
@triton.jit(do_not_specialize=["channels", "S", "C", "bucket"])
def _affine_kernel(
    u, centre, factor, constant, other, other_factor, offset, out, channels, S, C, bucket,
    LAST: tl.constexpr, LIMIT: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr, AVERAGED: tl.constexpr, RELU: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = act(factor·(u − centre) + constant + other_factor·other); all but u and factor may be absent.

    One tile a program. SHARED: the tables are (C,), not (N, C). AVERAGED: factor and constant are gradients of a
    variance and a mean over S positions. With ``offset``, ``other`` is the gradient of a ReLU of
    other_factor·(u − centre) + offset, and counts only where that was positive.
    """
    ACC: tl.constexpr = tl.float64 if u.dtype.element_ty == tl.float64 else tl.float32
    s, c = _block(LAST, LIMIT, TILE, WIDTH)
    parts = tl.cdiv(S, s.shape[0])
    _, first, s_stride, c_stride, count, at, real = _place(S, C, parts, s.shape[0], c, LAST, VECTOR)
    if SHARED:
        at %= channels
    element = s[:, None] * s_stride + c[None, :] * c_stride
    inside = (s < count)[:, None] & real[None, :]
    # Everything is asked for before anything is waited for.
    x = tl.load(u + first + element, mask=inside, other=0.0)
    if other is not None:
        y = tl.load(other + first + element, mask=inside, other=0.0)
        if other_factor is not None:
            k = tl.load(other_factor + at, mask=real, other=0.0)
        if offset is not None:
            z = tl.load(offset + at, mask=real, other=0.0)
    a = tl.load(factor + at, mask=real, other=0.0).to(ACC)
    if centre is not None:
        m = tl.load(centre + at, mask=real, other=0.0)
    if constant is not None:
        b = tl.load(constant + at, mask=real, other=0.0).to(ACC)
    x = x.to(ACC)
    if centre is not None:
        x -= m.to(ACC)[None, :]
    if offset is not None:  # NaN passes, as in PyTorch
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
        x = tl.where(x < 0, 0.0, x)  # keeps NaN, as torch.relu does
    tl.store(out + first + element, x.to(out.dtype.element_ty), mask=inside)


@_REDUCTION
@triton.jit(do_not_specialize=["channels", "S", "C", "parts", "length", "tables", "bucket"])
def _affine_backward_kernel(
    dout, out, u, m, factor, offset, g, da, db, channels, S, C, parts, length, tables, bucket,
    LAST: tl.constexpr, LIMIT: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """g = dout·(out > 0) where there is an ``out``; Σg·(u − m) and Σg over one part of S, into row ``part``.

    SHARED: the tables are (C,), not (N, C). With ``offset``, out is found again as factor·(u − m) + offset, and g is
    not written.
    """
    ACC: tl.constexpr = da.dtype.element_ty
    s, c = _block(LAST, LIMIT, TILE, WIDTH)
    length = length // 16 * 16
    part, first, s_stride, c_stride, count, at, real = _place(S, C, parts, length, c, LAST, VECTOR)
    element = s[:, None] * s_stride + c[None, :] * c_stride
    entry = at % channels if SHARED else at
    centre = tl.load(m + entry, mask=real, other=0.0).to(ACC)
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
            d = tl.where(y <= 0, 0.0, d)  # NaN passes, as in PyTorch
            tl.store(g + first + element, d.to(g.dtype.element_ty), mask=inside)
        first += s.shape[0] * s_stride
        x -= centre[None, :]
        if offset is not None:
            d = tl.where(a[None, :] * x + z[None, :] <= 0, 0.0, d)
        sum_gu += d * x
        sum_g += d
    at += part * tables
    tl.store(da + at, tl.sum(sum_gu, 0), mask=real)
    tl.store(db + at, tl.sum(sum_g, 0), mask=real)


class _Plan(NamedTuple):
    """How the kernels see a map of one shape, and how a reduction over it is split along S."""

    last: bool
    n: int
    s: int
    c: int
    split: tuple[int, int, int, int, int]  # arguments S, C, parts, length (positions of a part, 16·k), tables
    constants: tuple[int, bool, int, int]  # arguments bucket, LAST, LIMIT, VECTOR

    def grid(self, parts: int | None) -> Callable[[dict[str, int]], tuple[int]]:
        """Programs for ``parts`` of S, or for one tile each."""
        limit = self.constants[2]

        def programs(meta: dict[str, int]) -> tuple[int]:
            width = min(meta["WIDTH"], limit)
            across = meta["TILE"] // width
            block_s, block_c = (across, width) if self.last else (width, across)
            return (self.n * (parts or triton.cdiv(self.s, block_s)) * triton.cdiv(self.c, block_c),)

        return programs


@lru_cache(maxsize=4096)
def _plan(n: int, c: int, s: int, last: bool) -> _Plan:
    contiguous = c if last else s
    bucket = (n * c * s).bit_length() // 2  # tuned again when a map grows fourfold
    if not last:
        n, c = 1, n * c
    limit = min(WIDEST, triton.next_power_of_2(contiguous))
    # Programs without a split, with a middling tile; how a reduction is split does not depend on the tuning.
    width = min(64, limit)
    columns = triton.cdiv(c, width if last else 2048 // width)
    # A part writes two numbers a column, so it is at least 64 positions long: a few per cent of the traffic.
    step = max(64, 2048 // width) if last else 512
    parts = min(triton.cdiv(s, step), MOST_PARTS, triton.cdiv(ENOUGH_PROGRAMS, max(n * columns, 1)))
    length = triton.cdiv(s, step * parts) * step
    split = (s, c, triton.cdiv(s, length), length, n * c)
    return _Plan(last, n, s, c, split, (bucket, last, limit, gcd(contiguous, 16)))


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1 and x.movedim(1, -1).is_contiguous()


def _planned(u: Tensor) -> tuple[Tensor, _Plan]:
    """The map in one of the two layouts, and its plan."""
    last = _is_channels_last(u)
    if not last:
        u = u.contiguous()
    return u, _plan(u.shape[0], u.shape[1], prod(u.shape[2:]), last)


def _like(x: Tensor, u: Tensor, plan: _Plan) -> Tensor:
    """``x`` in the layout of ``u``: itself, or a copy."""
    if x.shape == u.shape and (_is_channels_last(x) if plan.last else x.is_contiguous()):
        return x
    return torch.empty_like(u, dtype=x.dtype).copy_(x)


def _statistics(u: Tensor, variance: bool) -> list[Any]:
    """Mean, mean − pivot and variance; the last two are None if ``variance`` is not asked for."""
    u, plan = _planned(u)

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


def _small_moments(u: Tensor, result: list[Tensor | None], plan: _Plan) -> None:
    bucket, _, limit, vector = plan.constants
    rows = max(16, triton.next_power_of_2(plan.s))
    _small_moments_kernel[lambda meta: (plan.n * triton.cdiv(plan.c, min(meta["WIDTH"], limit)),)](
        u, *result, plan.c, plan.s, plan.c, bucket, rows, limit, vector
    )


def moments(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sweeps.moments``: (N, C, *S) → three (N, C) tables."""
    mean, from_pivot, variance = _statistics(u, variance=True)
    return mean, from_pivot, variance


def mean(h: Tensor) -> Tensor:
    """The mean of each (n, c) over the positions: the squeeze (section 3.1, equation 2), (N, C, *S) → (N, C)."""
    return _statistics(h, variance=False)[0]


def elementwise(
    u: Tensor, m: Tensor | None, a: Tensor, b: Tensor | None, other: Tensor | None, factor: Tensor | None,
    offset: Tensor | None = None, *, averaged: bool = False, relu: bool = False,
) -> Tensor:  # fmt: skip
    """See ``_affine_kernel``: a map like ``u``. The tables are all (N, C), or all (C,)."""
    u, plan = _planned(u)
    out = torch.empty_like(u)
    if u.numel() == 0:
        return out
    other = None if other is None else _like(other, u, plan)
    shared = a.ndim == 1
    m, b, factor = (None if table is None else table.contiguous() for table in (m, b, factor))
    with torch.cuda.device_of(u):
        _affine_kernel[plan.grid(None)](
            u, m, a.contiguous(), b, other, factor, offset, out, u.shape[1], plan.s, plan.c, *plan.constants,
            shared, averaged, relu,
        )  # fmt: skip
    return out


def affine(u: Tensor, m: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """act(a·(u − m) + b + shortcut): a map in the type and layout of ``u``; m, a, b are (N, C) tables."""
    return elementwise(u, m, a, b, shortcut, None, relu=relu)


def scale_add_relu(u: Tensor, gate_nc: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """act(gate·u + shortcut), at inference where the last convolution is not 1×1: a map like ``u``."""
    return elementwise(u, None, gate_nc, None, shortcut, None, relu=relu)


def moments_backward(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor) -> Tensor:
    """du = a·g + dm/S + (2·dv/S)·(u − m): the gradient of `affine` and of `moments` together, a map like ``u``."""
    return elementwise(u, m, dv, dm, g, a, averaged=True)


def affine_backward(dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(g, da, db): g = dout·(out > 0), or dout itself without ``out``; da = Σg·(u − m) and db = Σg over positions."""
    g, da, db = sums_behind(dout, out, u, m)
    return (g, da[0], db[0]) if len(da) == 1 else (g, da.sum(0), db.sum(0))


def sums_behind(
    dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor, factor: Tensor | None = None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``_affine_backward_kernel``: g, a map, and two sums for each part of S, (parts, N, C).

    ``m`` is (N, C) or (C,). Without ``out`` g is ``dout`` as it came, in the layout of ``u``; the sums are then of it,
    or with ``factor`` and ``offset``, (C,), of what a ReLU of factor·(u − m) + offset lets through.
    """
    u, plan = _planned(u)
    parts = plan.split[2]
    da = torch.empty((parts, *u.shape[:2]), dtype=table_dtype(u.dtype), device=u.device)
    db = torch.empty_like(da)
    dout = _like(dout, u, plan)
    g = dout if out is None else torch.empty_like(u)
    if u.numel() == 0:
        return g, da.zero_(), db.zero_()
    out = None if out is None else _like(out, u, plan)
    with torch.cuda.device_of(u):
        _affine_backward_kernel[plan.grid(parts)](
            dout, out, u, m.contiguous(), factor, offset, g, da, db, u.shape[1], *plan.split, *plan.constants,
            m.ndim == 1,
        )  # fmt: skip
    return g, da, db
