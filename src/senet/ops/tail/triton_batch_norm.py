"""Batch norm + SE + shortcut + ReLU on a GPU with few launches: the most common tail, in one autograd node.

The general form (``senet.ops.tail.autograd``) leaves the (N, C) tables between the sweeps to autograd, about sixty
small operations per tail. They are bound by launch overhead: on an H200, a training step of SE-ResNet-50 with 256
images took 161 ms, of which kernels ran for 46 ms. Here, each sequence of table operations is one kernel, and the two
FC layers are four matrix products. The formulas are in docs/zero-tax.md.

If nothing is added before the ReLU, its sign is recomputed from u, and the output is neither saved nor read.
"""

# Triton evaluates annotations, so only the constexpr arguments of a kernel have one. By convention, they are uppercase.
# mypy: disallow-incomplete-defs=False
# ruff: noqa: N803, N806

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from senet.ops import reference
from senet.ops.layout import in_layout, prepared
from senet.ops.reference import FullyConnected
from senet.ops.tail.native_batch_norm import NO_DOUBLE_BACKWARD
from senet.ops.tail.native_batch_norm import unsuited as library_unsuited
from senet.ops.tail.norms import BatchNorm, Norm
from senet.ops.tail.reasons import Reason
from senet.ops.tail.triton import elementwise, sums_behind
from senet.ops.tail.triton_moments import moments

GATE_NUMBERS = {name: i for i, name in enumerate(("sigmoid", "relu", "hard_sigmoid"))}
GATE_NUMBERS |= {f"identity_{name}": number + 3 for name, number in GATE_NUMBERS.items()}
_CHANNELS = 16  # per program that loops over all images: rows of 64 bytes
_ROWS = 64
_BLOCK = 512


def unsuited(u: Tensor, norm: Norm | None, gate: object) -> Reason | None:
    """Why the kernels do not support this tail, or None: as the C++ library, with float32 tables and these gates."""
    if u.dtype == torch.float64:
        return Reason.DTYPE
    if isinstance(gate, FullyConnected) and gate.gate not in GATE_NUMBERS:
        return Reason.GATE
    return library_unsuited(u, norm, gate)


def joins(u: Tensor, shortcut: Tensor, shortcut_norm: Norm, relu: bool) -> bool:
    """Whether the kernels compute the norm of a projection, too; it is a tail of its own."""
    return unsuited(shortcut, shortcut_norm, None) is None


@triton.jit
def _gate(e, GATE: tl.constexpr):
    """A gate of ``reference.GATES`` and its slope, with PyTorch's values for NaN and at the kinks."""
    kind: tl.constexpr = GATE % 3
    if kind == 0:
        s = tl.sigmoid(e)
        slope = s * (1 - s)
    elif kind == 1:
        e = e + 1 if GATE >= 3 else e
        s = tl.where(e < 0, 0.0, e)
        slope = tl.where(e <= 0, 0.0, 1.0)
    else:
        s = tl.where(e < -3, 0.0, tl.where(e > 3, 1.0, e / 6 + 0.5))
        slope = tl.where((e > -3) & (e < 3), 1.0 / 6, 0.0)
    if GATE >= 3 and kind != 1:
        s, slope = 2 * s, 2 * slope
    return s, slope


@triton.jit(do_not_specialize=["N", "C", "count", "stride"])
def _norm_kernel(
    u, m, d, v, weight, bias, running_mean, running_var, kept, x, z, N, C, count, stride,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """From moments to batch norm: five rows of (C,), and two (N, C) tables if there is a gate.

    ``kept`` is (5, C): the rounded mean μ, the factor G = γ/√(σ² + ε), the offset in y = G·(u − μ) + offset,
    1/√(σ² + ε), and the rounding error of μ. x = m − μ and z = G·x + β, the squeeze of y, are (N, C). Means are
    compared through their differences from a pivot; see ``norm_tables``.
    """
    ACC: tl.constexpr = kept.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < C
    row = tl.arange(0, ROWS)
    sum_d = tl.zeros([ROWS, CHANNELS], ACC)
    sum_v = tl.zeros([ROWS, CHANNELS], ACC)
    for start in range(0, N, ROWS):
        inside = (start + row < N)[:, None] & real[None, :]
        at = (start + row)[:, None] * C + c[None, :]
        sum_d += tl.load(d + at, mask=inside, other=0.0)
        sum_v += tl.load(v + at, mask=inside, other=0.0)
    center = tl.sum(sum_d, 0) / N
    square = tl.zeros([ROWS, CHANNELS], ACC)
    for start in range(0, N, ROWS):
        inside = (start + row < N)[:, None] & real[None, :]
        apart = tl.load(d + (start + row)[:, None] * C + c[None, :], mask=inside, other=0.0) - center[None, :]
        square += tl.where(inside, apart * apart, 0.0)
    variance = (tl.sum(sum_v, 0) + tl.sum(square, 0)) / N
    inverse = tl.rsqrt(variance + EPS)
    factor = inverse
    if weight is not None:
        factor *= tl.load(weight + c, mask=real, other=0.0)
    beta = tl.zeros([CHANNELS], ACC)
    if bias is not None:
        beta = tl.load(bias + c, mask=real, other=0.0)
    pivot = tl.load(u + c.to(tl.int64) * stride, mask=real, other=0.0).to(ACC)
    mean = pivot + center
    lost = (mean - pivot) - center
    tl.store(kept + c, mean, mask=real)
    tl.store(kept + C + c, factor, mask=real)
    tl.store(kept + 2 * C + c, factor * lost + beta, mask=real)
    tl.store(kept + 3 * C + c, inverse, mask=real)
    tl.store(kept + 4 * C + c, lost, mask=real)
    if running_mean is not None:
        old = tl.load(running_mean + c, mask=real, other=0.0)
        tl.store(running_mean + c, old + MOMENTUM * (mean - old), mask=real)
        old = tl.load(running_var + c, mask=real, other=0.0)
        unbiased = variance * (count / (count - 1.0))
        tl.store(running_var + c, old + MOMENTUM * (unbiased - old), mask=real)
    if x is not None:
        for start in range(0, N, ROWS):
            inside = (start + row < N)[:, None] & real[None, :]
            at = (start + row)[:, None] * C + c[None, :]
            apart = (tl.load(m + at, mask=inside, other=0.0) - pivot[None, :]) - center[None, :]
            tl.store(x + at, apart, mask=inside)
            tl.store(z + at, factor[None, :] * apart + beta[None, :], mask=inside)


@triton.jit(do_not_specialize=["C", "tables"])
def _gate_kernel(e, z, factor, a, b, C, tables, GATE: tl.constexpr, BLOCK: tl.constexpr):
    """a = s·G and b = s·z, (N, C), where s is the gate of e."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < tables
    s, _ = _gate(tl.load(e + at, mask=real, other=0.0), GATE)
    tl.store(a + at, s * tl.load(factor + at % C, mask=real, other=0.0), mask=real)
    tl.store(b + at, s * tl.load(z + at, mask=real, other=0.0), mask=real)


@triton.jit(do_not_specialize=["C", "tables", "parts"])
def _gate_backward_kernel(da, db, e, z, factor, de, C, tables, parts, GATE: tl.constexpr, BLOCK: tl.constexpr):
    """de, from ds = da·G + db·z; the parts of da and db are summed into the first part."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < tables
    a = tl.load(da + at, mask=real, other=0.0)
    b = tl.load(db + at, mask=real, other=0.0)
    for part in range(1, parts):
        a += tl.load(da + part * tables + at, mask=real, other=0.0)
        b += tl.load(db + part * tables + at, mask=real, other=0.0)
    if parts > 1:
        tl.store(da + at, a, mask=real)
        tl.store(db + at, b, mask=real)
    _, slope = _gate(tl.load(e + at, mask=real, other=0.0), GATE)
    ds = a * tl.load(factor + at % C, mask=real, other=0.0) + b * tl.load(z + at, mask=real, other=0.0)
    tl.store(de + at, ds * slope, mask=real)


@triton.jit(do_not_specialize=["N", "C", "S"])
def _gated_norm_backward_kernel(
    da, db, dz, e, x, kept, a, c0, c1, dweight, dbias, N, C, S,
    GATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The (N, C) tables a, c0, and c1 in du = a·g + c0 + c1·(u − m), and the gradients of γ and β.

    dβ = Σₙ (db·s + dz) and dG = Σₙ (da·s + (db·s + dz)·x), where ``dz`` is the gradient through the FC layers.
    """
    ACC: tl.constexpr = kept.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < C
    row = tl.arange(0, ROWS)
    factor = tl.load(kept + C + c, mask=real, other=0.0)
    inverse = tl.load(kept + 3 * C + c, mask=real, other=0.0)
    sum_z = tl.zeros([ROWS, CHANNELS], ACC)
    sum_g = tl.zeros([ROWS, CHANNELS], ACC)
    for start in range(0, N, ROWS):
        inside = (start + row < N)[:, None] & real[None, :]
        at = (start + row)[:, None] * C + c[None, :]
        s, _ = _gate(tl.load(e + at, mask=inside, other=0.0), GATE)
        of_z = tl.load(db + at, mask=inside, other=0.0) * s + tl.load(dz + at, mask=inside, other=0.0)
        sum_z += of_z
        sum_g += tl.load(da + at, mask=inside, other=0.0) * s + of_z * tl.load(x + at, mask=inside, other=0.0)
    of_beta = tl.sum(sum_z, 0)
    of_factor = tl.sum(sum_g, 0)
    tl.store(dbias + c, of_beta, mask=real)
    tl.store(dweight + c, of_factor * inverse, mask=real)
    size = N.to(ACC) * S
    slope = -factor * inverse * inverse * of_factor / size
    shift = -factor * of_beta / size
    for start in range(0, N, ROWS):
        inside = (start + row < N)[:, None] & real[None, :]
        at = (start + row)[:, None] * C + c[None, :]
        s, _ = _gate(tl.load(e + at, mask=inside, other=0.0), GATE)
        from_sums = tl.load(db + at, mask=inside, other=0.0)
        of_z = from_sums * s + tl.load(dz + at, mask=inside, other=0.0)
        of_mean = factor[None, :] * (of_z - s * from_sums) / S
        tl.store(a + at, s * factor[None, :], mask=inside)
        tl.store(c0 + at, of_mean + shift[None, :] + slope[None, :] * tl.load(x + at, mask=inside, other=0.0), inside)
        tl.store(c1 + at, tl.zeros([ROWS, CHANNELS], ACC) + slope[None, :], mask=inside)


@triton.jit(do_not_specialize=["rows", "C", "count"])
def _norm_backward_kernel(
    da, db, kept, c0, c1, dweight, dbias, rows, C, count, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The same without a gate: du = G·g + c0 + c1·(u − μ), where c0 and c1 are (C,)."""
    ACC: tl.constexpr = kept.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < C
    row = tl.arange(0, ROWS)
    sum_a = tl.zeros([ROWS, CHANNELS], ACC)
    sum_b = tl.zeros([ROWS, CHANNELS], ACC)
    for start in range(0, rows, ROWS):
        inside = (start + row < rows)[:, None] & real[None, :]
        at = (start + row)[:, None] * C + c[None, :]
        sum_a += tl.load(da + at, mask=inside, other=0.0)
        sum_b += tl.load(db + at, mask=inside, other=0.0)
    factor = tl.load(kept + C + c, mask=real, other=0.0)
    inverse = tl.load(kept + 3 * C + c, mask=real, other=0.0)
    lost = tl.load(kept + 4 * C + c, mask=real, other=0.0)
    of_beta = tl.sum(sum_b, 0)
    of_factor = tl.sum(sum_a, 0) + lost * of_beta
    tl.store(dbias + c, of_beta, mask=real)
    tl.store(dweight + c, of_factor * inverse, mask=real)
    slope = -factor * inverse * inverse * of_factor / count
    tl.store(c1 + c, slope, mask=real)
    tl.store(c0 + c, slope * lost - factor * of_beta / count, mask=real)


def batch_norm_tail(
    u: Tensor,
    norm: BatchNorm,
    gate: FullyConnected | None,
    shortcut: Tensor | None,
    relu: bool,
    shortcut_norm: BatchNorm | None = None,
) -> Tensor:
    """δ(SE(norm(u)) + shortcut), if not ``unsuited``. With ``shortcut_norm``, if it ``joins``, that of the shortcut."""
    if u.shape[0] * math.prod(u.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(u.shape)}")
    if shortcut is not None and shortcut_norm is not None:
        shortcut = batch_norm_tail(shortcut, shortcut_norm, None, None, relu=False)
    u, last = prepared(u)
    shortcut = None if shortcut is None else in_layout(shortcut.to(u.dtype), last)
    if gate is None:
        return _Tail.apply(u, shortcut, *norm[:2], None, None, None, None, norm, 0, relu)
    weights = (gate.w1.flatten(1), gate.b1, gate.w2.flatten(1), gate.b2)
    with reference.without_autocast(u.device.type):
        return _Tail.apply(u, shortcut, *norm[:2], *weights, norm, GATE_NUMBERS[gate.gate], relu)


def _walk(c: int) -> tuple[int]:
    return (triton.cdiv(c, _CHANNELS),)


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        shortcut: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        w1: Tensor | None,
        b1: Tensor | None,
        w2: Tensor | None,
        b2: Tensor | None,
        norm: BatchNorm,
        gate: int,
        relu: bool,
    ) -> Tensor:
        n, c = u.shape[:2]
        m, d, v = moments(u)
        kept = m.new_empty(5, c)
        x, z = (m.new_empty(2, n, c)) if w1 is not None else (None, None)
        count, stride = u.numel() // c, u.stride(1) if u.shape[1] > 1 else 1
        with torch.cuda.device_of(u):
            _norm_kernel[_walk(c)](
                u, m, d, v, weight, bias, norm.running_mean, norm.running_var, kept, x, z, n, c, count, stride,
                norm.eps, norm.momentum, min(_ROWS, triton.next_power_of_2(n)), _CHANNELS,
            )  # fmt: skip
        if w1 is None or w2 is None:
            hidden = e = None
            out = elementwise(u, kept[0], kept[1], kept[2], shortcut, None, relu=relu)
        else:
            hidden = torch.relu_(_fc(z, w1, b1))
            e = _fc(hidden, w2, b2)
            a, b = torch.empty_like(m), torch.empty_like(m)
            with torch.cuda.device_of(u):
                _gate_kernel[(triton.cdiv(n * c, _BLOCK),)](e, z, kept[1], a, b, c, n * c, gate, _BLOCK)
            out = elementwise(u, m, a, b, shortcut, None, relu=relu)
        # Without a gate and a shortcut, the sign of the output is recomputed from u.
        bare = w1 is None and shortcut is None
        ctx.save_for_backward(
            u, out if relu and not bare else None, m if w1 is not None else None, kept, x, z, hidden, e, w1, w2
        )
        ctx.gate, ctx.by_affine = gate, relu and bare
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DOUBLE_BACKWARD)
        u, out, m, kept, x, z, hidden, e, w1, w2 = ctx.saved_tensors
        needs, (n, c) = ctx.needs_input_grad, u.shape[:2]
        grads: list[Tensor | None] = [None] * 8
        dweight, dbias = kept.new_empty(2, c)
        if w1 is None:
            offset = kept[2] if ctx.by_affine else None
            g, da, db = sums_behind(dout, out, u, kept[0], kept[1] if ctx.by_affine else None, offset)
            c0, c1 = kept.new_empty(2, c)
            with torch.cuda.device_of(u):
                _norm_backward_kernel[_walk(c)](
                    da, db, kept, c0, c1, dweight, dbias, len(da) * n, c, u.numel() // c, _ROWS, _CHANNELS
                )
            if needs[0]:
                grads[0] = elementwise(u, kept[0], c1, c0, g, kept[1], offset)
        else:
            g, da, db = sums_behind(dout, out, u, m)
            de, a, c0, c1 = kept.new_empty(4, n, c)
            rows = min(_ROWS, triton.next_power_of_2(n))
            with torch.cuda.device_of(u):
                _gate_backward_kernel[(triton.cdiv(n * c, _BLOCK),)](
                    da, db, e, z, kept[1], de, c, n * c, len(da), ctx.gate, _BLOCK
                )
                dz = _fc_backward(grads, de, z, hidden, w1, w2, needs)
                _gated_norm_backward_kernel[_walk(c)](
                    da, db, dz, e, x, kept, a, c0, c1, dweight, dbias, n, c, u.numel() // (n * c),
                    ctx.gate, rows, _CHANNELS,
                )  # fmt: skip
            if needs[0]:
                grads[0] = elementwise(u, m, c1, c0, g, a)
        grads[1] = g if needs[1] else None
        grads[2], grads[3] = (grad if need else None for grad, need in zip((dweight, dbias), needs[2:4], strict=True))
        return *grads, None, None, None


def _fc(x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _fc_backward(
    grads: list[Tensor | None], de: Tensor, z: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor, needs: tuple[bool, ...]
) -> Tensor:
    """Write the gradients of both FC layers into ``grads``; return that of the squeezed channels z."""
    with reference.without_autocast(de.device.type):
        dh = torch.ops.aten.threshold_backward(de.mm(w2), hidden, 0)
        if needs[6]:
            grads[6] = de.t().mm(hidden)
        if needs[7]:
            grads[7] = de.sum(0)
        if needs[4]:
            grads[4] = dh.t().mm(z)
        if needs[5]:
            grads[5] = dh.sum(0)
        return dh.mm(w1)
