"""Training without a tax: norm + SE + shortcut + ReLU in two sweeps forward and two backward (docs/zero-tax.md).

Only two primitives access feature maps (*maps*): ``moments`` (mean and variance of each channel of each image) and
``affine``. Everything in between (batch norm's statistics, the squeeze, the excitation) works on (N, C) tables with
ordinary autograd, so any excitation module can be used and trained.

Both primitives contribute to the gradient of u. It is written once, by the backward pass of ``moments``. What this
needs from ``affine`` is passed as the "gradients" of two *handles*, which are outputs of ``moments`` without content.
So there is no state outside the graph, and checkpointing, retained graphs, and ``torch.compile`` see pure functions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from senet.ops.dispatch import sweeps_of
from senet.ops.layout import in_layout
from senet.ops.reference import table_dtype
from senet.ops.tail import definitions as sweeps
from senet.ops.tail.definitions import positions
from senet.ops.tail.native_batch_norm import NO_DOUBLE_BACKWARD
from senet.ops.tail.norms import BatchNorm, Norm, frozen_tables, norm_tables


def _as_map(x: Tensor, u: Tensor) -> Tensor:
    """A result in the layout that the operators promise: contiguous as u is, otherwise channels_last."""
    return in_layout(x, not u.is_contiguous())


def _empty_map(u: Tensor) -> Tensor:
    if u.is_contiguous():
        return torch.empty_like(u)
    return torch.empty_like(u.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)


@torch.library.custom_op("senet::moments", mutates_args=())
def _moments(u: Tensor, variance: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(m, d, v, map handle, table handle) of a map; d and v are empty without ``variance``."""
    run = sweeps_of(backend)
    m, d, v = run.moments(u) if variance else (run.mean(u), u.new_empty(0), u.new_empty(0))
    return m, d, v, u.new_zeros(()).expand(u.shape), m.new_zeros(()).expand(m.shape)


@_moments.register_fake
def _(u: Tensor, variance: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m = u.new_empty(u.shape[:2], dtype=table_dtype(u.dtype))
    d, v = (torch.empty_like(m) if variance else u.new_empty(0) for _ in range(2))
    return m, d, v, u.new_empty(()).expand(u.shape), m.new_empty(()).expand(m.shape)


@torch.library.custom_op("senet::moments_backward", mutates_args=())
def _moments_backward(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor, backend: str) -> Tensor:
    return _as_map(sweeps_of(backend).moments_backward(g, u, m, a, dm, dv), u)


@_moments_backward.register_fake
def _(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor, backend: str) -> Tensor:
    return _empty_map(u)


@torch.library.custom_op("senet::affine", mutates_args=())
def _affine(
    u: Tensor,
    m: Tensor,
    a: Tensor,
    b: Tensor,
    shortcut: Tensor | None,
    relu: bool,
    map_handle: Tensor | None,
    table_handle: Tensor | None,
    backend: str,
) -> Tensor:
    """δ(a·(u − m) + b + shortcut). With handles, ``u`` is detached: ``moments`` computes its gradient."""
    return _as_map(sweeps_of(backend).affine(u, m, a, b, shortcut, relu), u)


@_affine.register_fake
def _(
    u: Tensor,
    m: Tensor,
    a: Tensor,
    b: Tensor,
    shortcut: Tensor | None,
    relu: bool,
    map_handle: Tensor | None,
    table_handle: Tensor | None,
    backend: str,
) -> Tensor:
    return _empty_map(u)


@torch.library.custom_op("senet::affine_backward", mutates_args=())
def _affine_backward(dout: Tensor, out: Tensor, u: Tensor, m: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    g, da, db = sweeps_of(backend).affine_backward(dout, out, u, m)
    return _as_map(g, u), da, db


@_affine_backward.register_fake
def _(dout: Tensor, out: Tensor, u: Tensor, m: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_map(u), torch.empty_like(m), torch.empty_like(m)


@torch.library.custom_op("senet::product_sums", mutates_args=())
def _product_sums(g: Tensor, u: Tensor, m: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    _, da, db = sweeps_of(backend).affine_backward(g, None, u, m)
    return da, db


@_product_sums.register_fake
def _(g: Tensor, u: Tensor, m: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(m), torch.empty_like(m)


def _save_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.backend = inputs[2]
    ctx.set_materialize_grads(False)


def _grad_of_moments(
    ctx: Any, dm: Tensor | None, dd: Tensor | None, dv: Tensor | None, g: Tensor | None, a: Tensor | None
) -> tuple[Tensor | None, None, None]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(NO_DOUBLE_BACKWARD)
    u, m = ctx.saved_tensors
    zero = torch.zeros_like(m)
    of_means = [x for x in (dm, dd) if x is not None and x.numel()]  # m and d differ by a constant
    dm = sum(of_means[1:], of_means[0]) if of_means else zero
    dv = zero if dv is None or not dv.numel() else dv
    if g is None or a is None:  # only the tables were used, not the map
        g, a = u.new_zeros(()).expand(u.shape), zero
    return _moments_backward(g, u, m, a, dm, dv, ctx.backend), None, None


def _save_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, m, a, _, shortcut, relu, map_handle, _, ctx.backend = inputs
    ctx.save_for_backward(u, m, a, *((output,) if relu else ()))
    ctx.shared = map_handle is not None
    ctx.shortcut_dtype = None if shortcut is None else shortcut.dtype


def _grad_of_affine(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(NO_DOUBLE_BACKWARD)
    u, m, a, *relu_out = ctx.saved_tensors
    if relu_out:
        g, da, db = _affine_backward(dout, relu_out[0], u, m, ctx.backend)
    else:
        g, (da, db) = dout, _product_sums(dout, u, m, ctx.backend)
    dm = -a * db if ctx.needs_input_grad[1] else None
    du = None
    if ctx.needs_input_grad[0] and not ctx.shared:
        zero = torch.zeros_like(a)
        du = _moments_backward(g, u, m, a, zero, zero, ctx.backend)
    dshortcut = None if ctx.shortcut_dtype is None else g.to(ctx.shortcut_dtype)
    handles = (g, a) if ctx.shared else (None, None)
    return du, dm, da, db, dshortcut, None, *handles, None


_moments.register_autograd(_grad_of_moments, setup_context=_save_moments)
_affine.register_autograd(_grad_of_affine, setup_context=_save_affine)


def two_sweeps(
    u: Tensor,
    norm: Norm | None,
    gate: Callable[[Tensor], Tensor] | None,
    shortcut: Tensor | None,
    relu: bool,
    backend: str | None,
) -> Tensor:
    """The tail in two sweeps, for any norm and any gate; arguments as those of ``tail.tail``.

    The squeeze needs no extra sweep: with batch norm y = g·(u − μ) + β, the squeeze of y (equation 2) is
    z = g·(m − μ) + β, where m is the mean that batch norm computes anyway. ``backend`` is the implementation of the
    sweeps. None traces their definitions for a compiler, which fuses them with neighboring operations.
    """
    if norm is None or (isinstance(norm, BatchNorm) and norm.frozen):
        return _frozen_tail(u, norm, gate, shortcut, relu, backend)
    m, d, v, handles = _moments_of(u, True, backend)
    g, z = norm_tables(norm, m, d, v, sweeps.pivot(u), positions(u))
    if gate is None:
        a, b = g.expand_as(m).contiguous(), z
    else:
        s = gate(z)
        a, b = s * g, s * z
    return _affine_of(u, m, a, b, shortcut, relu, handles, backend)


def _frozen_tail(
    u: Tensor,
    norm: BatchNorm | None,
    gate: Callable[[Tensor], Tensor] | None,
    shortcut: Tensor | None,
    relu: bool,
    backend: str | None,
) -> Tensor:
    """Without a norm, or with frozen statistics: y = g·(u − center) + offset does not depend on statistics of u.

    Subtracting this center rather than the mean of u makes a gate of exactly 1 bit-equal to the plain network.
    """
    table = u.new_zeros(u.shape[:2], dtype=table_dtype(u.dtype))
    center, g, offset = table, table + 1, table
    if norm is not None:
        assert norm.running_mean is not None
        center = norm.running_mean.to(table.dtype).expand_as(table).contiguous()
        g, offset = (t.expand_as(table).contiguous() for t in frozen_tables(norm, center))
    if gate is None:
        return _affine_of(u, center, g, offset, shortcut, relu, None, backend)
    m, _, _, handles = _moments_of(u, False, backend)
    s = gate(g * (m - center) + offset)
    return _affine_of(u, center, s * g, s * offset, shortcut, relu, handles, backend)


def _moments_of(
    u: Tensor, variance: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    if backend is None:
        m, d, v = sweeps.moments(u) if variance else (sweeps.mean(u), u, u)
        return m, d, v, None
    m, d, v, *handles = _moments(u, variance, backend)
    return m, d, v, (handles[0], handles[1])


def _affine_of(
    u: Tensor,
    m: Tensor,
    a: Tensor,
    b: Tensor,
    shortcut: Tensor | None,
    relu: bool,
    handles: tuple[Tensor, Tensor] | None,
    backend: str | None,
) -> Tensor:
    if backend is None:
        return sweeps.affine(u, m, a, b, shortcut, relu)
    if handles is None:
        return _affine(u, m, a, b, shortcut, relu, None, None, backend)
    return _affine(u.detach(), m, a, b, shortcut, relu, *handles, backend)
