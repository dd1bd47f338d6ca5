"""Batch norm + SE + shortcut + ReLU on the CPU: one library call forward and one backward (tail.hpp).

The general form (``senet.ops.tail.autograd``) uses autograd for the tables and supports any norm and any excitation.
This form supports only the most common case, batch norm with the paper's excitation, and avoids the overhead of many
small operations on tables.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet.ops.border import have
from senet.ops.csrc.calls import call, constant, kept_size
from senet.ops.layout import in_layout, prepared
from senet.ops.reference import FullyConnected, table_dtype

NO_DOUBLE_BACKWARD = (
    "senet: the fast sweeps have no second derivative; for a double backward run the forward pass in "
    "`with senet.use_backend('reference'):` or set SENET_BACKEND=reference"
)


def suits(norm: nn.Module | None, excitation: object, u: Tensor) -> bool:
    """Whether the library supports this tail: batch norm with batch statistics and the paper's excitation.

    The dtypes and sizes of the parameters are checked, too: with wrong sizes, C++ would read past the end, whereas
    PyTorch raises an error. Empty feature maps are not supported, because they have no pivot.
    """
    if not isinstance(norm, _BatchNorm) or isinstance(norm, nn.SyncBatchNorm):
        return False
    if not norm.training or norm.momentum is None or not u.numel():
        return False
    c = u.shape[1]
    tensors = [(norm.weight, c), (norm.bias, c), (norm.running_mean, c), (norm.running_var, c)]
    if excitation is not None:
        if not isinstance(excitation, FullyConnected) or excitation.activation != "relu":
            return False
        e, hidden = excitation, excitation.w1.shape[0]
        tensors += [(e.w1, hidden * c), (e.b1, hidden), (e.w2, c * hidden), (e.b2, c)]
    return have(table_dtype(u.dtype), *tensors)


def batch_norm_tail(
    u: Tensor, norm: Any, excitation: Any, shortcut: Tensor | None, relu: bool, shortcut_norm: Any = None
) -> Tensor:
    """δ(SE(norm(u)) + shortcut), for arguments that ``suits`` accepts; errors as in ``autograd.norm_tail``.

    With ``shortcut_norm``, shortcut_norm(shortcut) is added instead, and a ReLU always follows. ``suits`` must accept
    the shortcut and its norm, too.
    """
    if u.shape[0] * math.prod(u.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(u.shape)}")
    u, last = prepared(u)
    if shortcut_norm is not None and last and u.shape[1] % constant("lanes"):  # the backward pass would need the signs
        shortcut, shortcut_norm = shortcut_norm(shortcut), None
    for each in (norm, shortcut_norm):
        if each is not None and each.track_running_stats and each.num_batches_tracked is not None:
            each.num_batches_tracked.add_(1)
    shortcut = None if shortcut is None else in_layout(shortcut.to(u.dtype), last)
    e = excitation
    weights = (None, None, None, None) if e is None else (e.w1, e.b1, e.w2, e.b2)
    gate = 0 if e is None else constant(f"gate {e.gate}")
    of_shortcut = (None, None) if shortcut_norm is None else (shortcut_norm.weight, shortcut_norm.bias)
    return _Tail.apply(u, shortcut, norm.weight, norm.bias, *weights, *of_shortcut, norm, shortcut_norm, gate, relu)


def _signs(u: Tensor) -> Tensor | None:
    """Memory for the signs of the output, one bit per element (behind_relu.hpp): 1/32 of a float32 feature map."""
    lanes = constant("lanes")
    if u.is_contiguous() or u.shape[1] % lanes:
        return None
    return torch.empty(u.numel() // lanes, dtype=torch.int16)


def _of_norm(norm: Any) -> tuple[float, float, Tensor | None, Tensor | None]:
    """The eps, momentum, and running statistics of a norm, as the library expects them."""
    if norm is None:
        return 0.0, 0.0, None, None
    tracked = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
    return norm.eps, norm.momentum, *tracked


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
        norm: Any,
        shortcut_norm: Any,
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
