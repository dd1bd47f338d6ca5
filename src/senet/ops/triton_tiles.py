"""Shared parts of all Triton kernels over feature maps: indexing, tiling, and autotuning.

One source covers both memory layouts. A kernel indexes a feature map (a *map*) as (n, s, c) and is told which axis is
contiguous: channels_last is (N, S, C); contiguous is a single sample of N·C channels, each a row of S positions.

A sweep is bound by memory bandwidth. The design therefore maximizes bytes in flight (by Little's law, about 20 kB per
SM on an H100) and uses full 128-byte cache lines: loads and stores are 16 bytes per thread if the alignment allows it,
a row of a tile has 64 or 128 elements, and a thread owns about 16 elements of each map, which leaves enough registers
for many programs per SM. There is one accumulator per element of the tile, so the loop of a reduction needs no
communication between threads; one reduction follows after the loop. Reductions with few (n, c) are split along S and
combined from small tables in a fixed order. Without atomics, the result is bit-reproducible.
"""

# Triton evaluates annotations, so only the constexpr arguments of a kernel have one. By convention, they are uppercase.
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

WIDEST = 128  # elements of the contiguous axis in the widest tile
# A reduction is split until there are about this many programs: 16 for each of 128 SMs, two full waves.
ENOUGH_PROGRAMS = 2048
MOST_PARTS = 1024
# A reduction prefetches its next tiles to shared memory asynchronously. By default, the compiler emits a 16-byte load,
# its additions, and only then the next load (seen in the machine code).
PIPELINE = tl.constexpr(3)


def tuned(configs: list[triton.Config], small: dict[str, int], key: list[str]) -> Callable[[Any], Any]:
    """Autotuning with results cached on disk. The interpreter uses the ``small`` tile, without timing."""
    if triton.knobs.runtime.interpret:
        configs = [triton.Config(small)]
    for config in configs:
        config.kwargs["enable_fp_fusion"] = True  # explicit, because Triton's default is going to change
    return triton.autotune(configs, key=key, cache_results=True, do_bench=_do_bench)


def _do_bench(call: Callable[[], object], quantiles: Any = None) -> Any:
    """A tenth of Triton's default time: the first step of a network tunes for about sixty feature maps."""
    return triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)


def _tiles(*choices: tuple[int, int, int]) -> Callable[[Any], Any]:
    """Autotuning over (elements of the tile, elements of a row, warps)."""
    configs = [triton.Config({"TILE": tile, "WIDTH": width}, num_warps=warps) for tile, width, warps in choices]
    return tuned(configs, {"TILE": 256, "WIDTH": 64}, ["LAST", "LIMIT", "VECTOR", "bucket"])


# A row of a tile has fewer elements than the program has threads. Then each thread loads the table entries that it
# needs; otherwise, Triton would exchange them through shared memory and barriers.
REDUCTION = _tiles((2048, 64, 4), (4096, 128, 8))
ELEMENTWISE = _tiles((2048, 64, 4), (4096, 64, 4))


@triton.jit
def block(LAST: tl.constexpr, LIMIT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Positions and channels of a tile. The contiguous axis gets min(WIDTH, LIMIT) elements."""
    width: tl.constexpr = WIDTH if WIDTH < LIMIT else LIMIT
    s: tl.constexpr = TILE // width if LAST else width
    c: tl.constexpr = width if LAST else TILE // width
    return tl.arange(0, s), tl.arange(0, c)


@triton.jit
def place(S, C, parts, length, c, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """The part of the map that this program processes: ``length`` positions of a block of channels (``c``, from 0).

    Returns the part of S, the offset of its first element, the strides of s and c, the number of positions, the
    indices into an (n, c) table, and the mask of the valid ones. Neighboring programs work on neighboring memory.
    """
    # This form tells the compiler how the rows are aligned, which enables 16-byte accesses.
    if LAST:
        C = (C // VECTOR) * VECTOR
        s_stride, c_stride = C, 1
    else:
        S = (S // VECTOR) * VECTOR
        s_stride, c_stride = 1, S.to(tl.int64)  # a few rows of a large volume exceed 2³¹ elements
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


class Plan(NamedTuple):
    """How the kernels index a map of one shape, and how a reduction over it is split along S."""

    last: bool
    n: int
    s: int
    c: int
    split: tuple[int, int, int, int, int]  # arguments S, C, parts, length (positions of a part, 16·k), tables
    constants: tuple[int, bool, int, int]  # arguments bucket, LAST, LIMIT, VECTOR

    def grid(self, parts: int | None) -> Callable[[dict[str, int]], tuple[int]]:
        """The grid: one program per part of S, or, without ``parts``, one program per tile."""
        limit = self.constants[2]

        def programs(meta: dict[str, int]) -> tuple[int]:
            width = min(meta["WIDTH"], limit)
            across = meta["TILE"] // width
            block_s, block_c = (across, width) if self.last else (width, across)
            return (self.n * (parts or triton.cdiv(self.s, block_s)) * triton.cdiv(self.c, block_c),)

        return programs


@lru_cache(maxsize=4096)
def _plan(n: int, c: int, s: int, last: bool) -> Plan:
    contiguous = c if last else s
    bucket = (n * c * s).bit_length() // 2  # tuned again when a map is four times as large
    if not last:
        n, c = 1, n * c
    limit = min(WIDEST, triton.next_power_of_2(contiguous))
    # The number of programs without a split, for a medium tile: the split must not depend on the tuning.
    width = min(64, limit)
    columns = triton.cdiv(c, width if last else 2048 // width)
    # A part writes two numbers per column. With at least 64 positions per part, this is a few percent of the traffic.
    step = max(64, 2048 // width) if last else 512
    parts = min(triton.cdiv(s, step), MOST_PARTS, triton.cdiv(ENOUGH_PROGRAMS, max(n * columns, 1)))
    length = triton.cdiv(s, step * parts) * step
    split = (s, c, triton.cdiv(s, length), length, n * c)
    return Plan(last, n, s, c, split, (bucket, last, limit, gcd(contiguous, 16)))


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1 and x.movedim(1, -1).is_contiguous()


def planned(u: Tensor) -> tuple[Tensor, Plan]:
    """The map in one of the two layouts, and its plan."""
    last = _is_channels_last(u)
    if not last:
        u = u.contiguous()
    return u, _plan(u.shape[0], u.shape[1], prod(u.shape[2:]), last)


def like(x: Tensor, u: Tensor, plan: Plan) -> Tensor:
    """``x`` in the layout of ``u``, copied only if necessary."""
    if x.shape == u.shape and (_is_channels_last(x) if plan.last else x.is_contiguous()):
        return x
    return torch.empty_like(u, dtype=x.dtype).copy_(x)
