"""Inference on the CPU in C++ (inference.hpp): the early gate; and gate, shortcut, and ReLU in one sweep."""

import functools

import torch
from torch import Tensor

from senet.ops.border import UnsuitedMapError, addresses, is_map
from senet.ops.csrc import build
from senet.ops.csrc.arguments import Arguments, Excitation
from senet.ops.csrc.calls import TYPES, call, constant
from senet.ops.layout import in_layout, is_last
from senet.ops.reference import FullyConnected, squeeze, table_dtype


def why_not(weight: Tensor) -> str | None:
    """Why this backend cannot run for the device and dtype of ``weight``, or None if it can."""
    if weight.device.type != "cpu":
        return "the network is not on the CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return "oneDNN requires float32 or bfloat16"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    return build.why_not()


def as_arguments(excitation: FullyConnected) -> Arguments:
    """The excitation as the C++ structure, which holds only the addresses of its weights."""
    e = excitation
    gate, activation = _numbers(e.gate, e.activation)
    return Excitation(e.w1.shape[0], gate, activation, *addresses((e.w1, e.b1, e.w2, e.b2)))


@functools.cache
def _numbers(gate: str, activation: str) -> tuple[int, int]:
    return constant(f"gate {gate}"), constant(f"activation {activation}")


def gate_of(h: Tensor, excitation: FullyConnected) -> Tensor:
    """See ``early_gate.gate_of``; here, one call replaces a dozen operations."""
    e, out, dtype = excitation, excitation.w2.shape[0], table_dtype(h.dtype)
    hidden, c = e.w1.shape
    if not is_map(h, c, h.dtype):
        raise UnsuitedMapError(f"this gate does not support a feature map of shape {tuple(h.shape)} on {h.device}")
    if h.dtype not in TYPES or e.w1.dtype != dtype:
        return e(squeeze(h))
    h = h if is_last(h) else h.contiguous()
    values = torch.empty(h.shape[0], out, dtype=dtype, device=h.device)
    gate, activation = _numbers(e.gate, e.activation)
    call(
        "gate",
        h,
        h=h,
        out=out,
        hidden=hidden,
        gate=gate,
        activation=activation,
        w1=e.w1,
        b1=e.b1,
        w2=e.w2,
        b2=e.b2,
        values=values,
    )
    return values


def gated_sum_(u: Tensor, gate: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """δ(gate·u + shortcut), in place in ``u``."""
    last = not u.is_contiguous()
    shortcut = in_layout(shortcut, last)
    call("gated_sum", u, u=u, gate=gate, shortcut=shortcut, relu=relu)
    return u
