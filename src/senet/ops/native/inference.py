"""Inference on the CPU: the early gate, and gate, shortcut and ReLU in one sweep, in C++ (inference.hpp)."""

import torch
from torch import Tensor

from senet.ops.border import UnsuitedMapError, address, have, is_map
from senet.ops.layout import in_layout, is_last
from senet.ops.native import build
from senet.ops.native.arguments import Arguments, Excitation
from senet.ops.native.calls import TYPES, call, constant
from senet.ops.reference import FullyConnected, squeeze, table_dtype


def why_not(weight: Tensor) -> str | None:
    """Why this cannot run for a network with weights like ``weight``; None if it can."""
    if weight.device.type != "cpu":
        return "the network is not on the CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return "oneDNN takes float32 and bfloat16"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    return build.why_not()


def as_arguments(excitation: FullyConnected) -> Arguments:
    """The excitation as C++ takes it: only where its weights lie."""
    e = excitation
    return Excitation(
        hidden=e.w1.shape[0],
        gate=constant(f"gate {e.gate}"),
        activation=constant(f"activation {e.activation}"),
        w1=address(e.w1),
        b1=address(e.b1),
        w2=address(e.w2),
        b2=address(e.b2),
    )


def gate_of(h: Tensor, excitation: FullyConnected) -> Tensor:
    """See ``early_gate.gate_of``: one call instead of a dozen operations."""
    e, out, dtype = excitation, excitation.w2.shape[0], table_dtype(h.dtype)
    hidden, c = e.w1.shape
    if not is_map(h, c, h.dtype):
        raise UnsuitedMapError(f"this gate takes no map of {tuple(h.shape)} on {h.device}")
    weights = (e.w1, hidden * c), (e.b1, hidden), (e.w2, out * hidden), (e.b2, out)
    if h.dtype not in TYPES or not have(dtype, *weights):
        return e(squeeze(h))
    h = h if is_last(h) else h.contiguous()
    gate = torch.empty(h.shape[0], out, dtype=dtype, device=h.device)
    call("gate", h, h=h, out=out, excitation=as_arguments(e), gate=gate)
    return gate


def gated_sum_(u: Tensor, gate: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """δ(gate·u + shortcut) in place of ``u``."""
    last = not u.is_contiguous()
    shortcut = in_layout(shortcut, last)
    call("gated_sum", u, u=u, gate=gate, shortcut=shortcut, relu=relu)
    return u
