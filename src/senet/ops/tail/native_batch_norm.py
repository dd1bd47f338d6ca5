"""Batch norm + SE + shortcut + ReLU on the CPU: one library call forward and one backward (tail.hpp).

The general form (``senet.ops.tail.autograd``) uses autograd for the tables and supports any norm and any excitation.
This form supports only the most common case, batch norm with the paper's excitation, and avoids the overhead of many
small operations on tables.
"""

import math
from typing import Any

import torch
from torch import Tensor

from senet.ops.border import have
from senet.ops.csrc.calls import call, constant, kept_size
from senet.ops.layout import in_layout, prepared
from senet.ops.reference import FullyConnected, table_dtype
from senet.ops.tail.norms import BatchNorm, Norm
from senet.ops.tail.reasons import Reason

NO_DOUBLE_BACKWARD = (
    "senet: the fast sweeps have no second derivative; for a double backward run the forward pass in "
    "`with senet.use_backend('reference'):` or set SENET_BACKEND=reference"
)


def unsuited(u: Tensor, norm: Norm | None, gate: object) -> Reason | None:
    """Why the library does not support this tail, or None: batch norm with batch statistics and the paper's gate.

    The dtypes and sizes of the parameters are checked, too: with wrong sizes, C++ would read past the end, whereas
    PyTorch raises an error. Empty feature maps are not supported, because they have no pivot.
    """
    if not isinstance(norm, BatchNorm) or norm.group is not None:
        return Reason.NORM
    if not norm.training:
        return Reason.FROZEN
    if not u.numel():
        return Reason.EMPTY
    c = u.shape[1]
    tensors = [(norm.weight, c), (norm.bias, c), (norm.running_mean, c), (norm.running_var, c)]
    if gate is not None:
        if not isinstance(gate, FullyConnected) or gate.activation != "relu":
            return Reason.GATE
        hidden = gate.w1.shape[0]
        tensors += [(gate.w1, hidden * c), (gate.b1, hidden), (gate.w2, c * hidden), (gate.b2, c)]
    return None if have(table_dtype(u.dtype), *tensors) else Reason.PARAMETERS


def joins(u: Tensor, shortcut: Tensor, shortcut_norm: Norm, relu: bool) -> bool:
    """Whether the call computes the norm of a projection, too.

    The backward pass needs the signs of the output, which the library keeps for whole vectors of channels only.
    """
    if not relu or shortcut.dtype != u.dtype or unsuited(shortcut, shortcut_norm, None) is not None:
        return False
    return u.is_contiguous() or u.shape[1] % constant("lanes") == 0


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
    u, last = prepared(u)
    shortcut = None if shortcut is None else in_layout(shortcut.to(u.dtype), last)
    weights = (None, None, None, None) if gate is None else gate[:4]
    function = 0 if gate is None else constant(f"gate {gate.gate}")
    of_shortcut = (None, None) if shortcut_norm is None else shortcut_norm[:2]
    return _Tail.apply(u, shortcut, *norm[:2], *weights, *of_shortcut, norm, shortcut_norm, function, relu)


def _signs(u: Tensor) -> Tensor | None:
    """Memory for the signs of the output, one bit per element (behind_relu.hpp): 1/32 of a float32 feature map."""
    lanes = constant("lanes")
    if u.is_contiguous() or u.shape[1] % lanes:
        return None
    return torch.empty(u.numel() // lanes, dtype=torch.int16)


def _of_norm(norm: BatchNorm | None) -> tuple[float, float, Tensor | None, Tensor | None]:
    """The eps, momentum, and running statistics of a norm, as the library expects them."""
    return (0.0, 0.0, None, None) if norm is None else (norm.eps, norm.momentum, norm.running_mean, norm.running_var)


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
        shortcut_weight: Tensor | None,
        shortcut_bias: Tensor | None,
        norm: BatchNorm,
        shortcut_norm: BatchNorm | None,
        gate: int,
        relu: bool,
    ) -> Tensor:
        n, c = u.shape[:2]
        hidden = 0 if w1 is None else w1.shape[0]
        kept = torch.empty(kept_size(n, c, hidden), dtype=table_dtype(u.dtype))
        shortcut_kept = None if shortcut_norm is None else kept.new_empty(kept_size(n, c, 0))
        out = torch.empty_like(u)
        adds = relu and shortcut is not None
        signs = _signs(u) if adds else None
        eps, momentum, mean, var = _of_norm(norm)
        shortcut_eps, shortcut_momentum, shortcut_mean, shortcut_var = _of_norm(shortcut_norm)
        call(
            "tail",
            u,
            u=u,
            norm_weight=weight,
            norm_bias=bias,
            norm_eps=eps,
            norm_momentum=momentum,
            norm_running_mean=mean,
            norm_running_var=var,
            hidden=hidden,
            gate=gate,
            activation=constant("activation relu"),
            w1=w1,
            b1=b1,
            w2=w2,
            b2=b2,
            shortcut=shortcut,
            shortcut_norm_weight=shortcut_weight,
            shortcut_norm_bias=shortcut_bias,
            shortcut_norm_eps=shortcut_eps,
            shortcut_norm_momentum=shortcut_momentum,
            shortcut_norm_running_mean=shortcut_mean,
            shortcut_norm_running_var=shortcut_var,
            relu=relu,
            kept=kept,
            shortcut_kept=shortcut_kept,
            out=out,
            signs=signs,
        )
        # Without a shortcut, the backward pass recomputes the ReLU's sign from u and writes no masked gradient.
        ctx.mask = "by_out" if adds else "by_affine" if relu else "none"
        ctx.save_for_backward(
            u, weight, w1, w2, kept, out if adds and signs is None else None, signs,
            None if shortcut_norm is None else shortcut, shortcut_weight, shortcut_kept,
        )  # fmt: skip
        ctx.gate = gate
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DOUBLE_BACKWARD)
        u, weight, w1, w2, kept, out, signs, shortcut, shortcut_weight, shortcut_kept = ctx.saved_tensors
        needs, c, hidden = ctx.needs_input_grad, u.shape[1], 0 if w1 is None else w1.shape[0]
        projects = shortcut is not None
        dout = in_layout(dout, not u.is_contiguous())
        du = torch.empty_like(u) if needs[0] or projects else None
        dshortcut = dout if ctx.mask == "none" else torch.empty_like(u) if ctx.mask == "by_out" else None
        dweight, dbias = kept.new_empty(c), kept.new_empty(c)
        dw1, db1, dw2, db2 = None, None, None, None
        if hidden:
            dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
            db1, db2 = kept.new_empty(hidden), kept.new_empty(c)
        of_norm = (kept.new_empty(c), kept.new_empty(c)) if projects else (None, None)
        call(
            "tail_backward",
            u,
            mask=constant(f"mask {ctx.mask}"),
            dout=dout,
            out=out,
            signs=signs,
            u=u,
            weight=weight,
            hidden=hidden,
            gate=ctx.gate,
            activation=constant("activation relu"),
            w1=w1,
            b1=None,
            w2=w2,
            b2=None,
            kept=kept,
            shortcut=shortcut,
            shortcut_weight=shortcut_weight,
            shortcut_kept=shortcut_kept,
            dsum=None if projects else dshortcut,
            du=du,
            dshortcut=dshortcut if projects else None,
            dweight=dweight,
            dbias=dbias,
            dw1=dw1,
            db1=db1,
            dw2=dw2,
            db2=db2,
            shortcut_dweight=of_norm[0],
            shortcut_dbias=of_norm[1],
        )
        grads = (du, dshortcut, dweight, dbias, dw1, db1, dw2, db2, *of_norm)
        return *(g if need else None for g, need in zip(grads, needs[:10], strict=True)), None, None, None, None
