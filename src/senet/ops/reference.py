"""The reference implementation: Squeeze-and-Excitation in plain PyTorch, short enough to read next to the paper.

Every faster implementation is tested against these functions. A *map* is a feature map (N, C, *S). Shape suffixes: N
batch, C channels, R bottleneck channels, S one or more spatial axes (1-D, 2-D, or 3-D).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from senet.ops.border import check_device

SQUEEZES = ("avg", "max", "none")


def _twice_sigmoid(e: Tensor) -> Tensor:
    return 2 * torch.sigmoid(e)


def _one_plus_tanh(e: Tensor) -> Tensor:
    return 1 + torch.tanh(e)


def _relu_of_one_plus(e: Tensor) -> Tensor:
    return torch.relu(1 + e)


def _twice_hard_sigmoid(e: Tensor) -> Tensor:
    return 2 * F.hardsigmoid(e)


# Section 6.3 and Table 12: the function in place of the final sigmoid. The hard sigmoid is MobileNetV3's, with slope
# 1/6. The `identity_` forms are shifted or scaled so that an input of 0 gives a gate of exactly 1 with a gradient.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "hard_sigmoid": F.hardsigmoid,
    "identity_sigmoid": _twice_sigmoid,
    "identity_tanh": _one_plus_tanh,
    "identity_relu": _relu_of_one_plus,
    "identity_hard_sigmoid": _twice_hard_sigmoid,
}


# The activation between the two FC layers: the paper's ReLU, or those that other libraries' networks were trained with.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish}


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which per-channel tables are computed: float32, or float64 for float64 maps."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which operations keep the dtypes of their inputs."""
    # The meta device does not support autocast, and raises even if it is being disabled. (is_autocast_available causes
    # a graph break in torch.compile of older PyTorch versions.)
    off = device_type == "meta" or not torch.is_autocast_enabled(device_type)
    return nullcontext() if off else torch.autocast(device_type, enabled=False)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, but no operation in a captured graph if ``x`` has the dtype."""
    return x if x.dtype == dtype else x.to(dtype)


def squeeze(x_ncs: Tensor, how: str = "avg", keepdim: bool = False) -> Tensor:
    """Global information embedding (section 3.1, equation 2): one number per channel, (N, C, *S) → (N, C).

    The result and its accumulation have the dtype of ``table_dtype``. ``how`` is ``"avg"`` or ``"max"`` (Table 11).
    With ``keepdim``, the spatial axes stay, with size 1.
    """
    spatial = tuple(range(2, x_ncs.ndim))
    if how == "avg":
        return x_ncs.mean(spatial, keepdim, dtype=table_dtype(x_ncs.dtype))
    return cast(x_ncs.amax(spatial, keepdim), table_dtype(x_ncs.dtype))


def as_image(x_ncs: Tensor) -> Tensor:
    """The map with two spatial axes, (N, C, *S) → (N, C, H, W), for layers that are 2-D convolutions."""
    return x_ncs if x_ncs.ndim == 4 else x_ncs.flatten(2).unsqueeze(-1)


def excite(
    z_nc: Tensor,
    w1_rc: Tensor,
    b1_r: Tensor | None,
    w2_cr: Tensor,
    b2_c: Tensor | None,
    delta: Callable[[Tensor], Tensor] = F.relu,
) -> Tensor:
    """Adaptive recalibration before the gate (section 3.2, equation 3): W₂·δ(W₁·z), δ = ReLU, (N, C) → (N, C)."""
    w1_rc, w2_cr = w1_rc.to(z_nc.dtype), w2_cr.to(z_nc.dtype)
    b1_r = None if b1_r is None else b1_r.to(z_nc.dtype)
    b2_c = None if b2_c is None else b2_c.to(z_nc.dtype)
    return F.linear(delta(F.linear(z_nc, w1_rc, b1_r)), w2_cr, b2_c)


def scale(x_ncs: Tensor, gate: Tensor) -> Tensor:
    """Channel-wise rescaling (equation 4), in the dtype of x. The gate has one value per channel or per position.

    Its shape is (N, C) or (N, C, 1, 1), or (N, C, H, W) with as many positions as x (NoSqueeze).
    """
    gate = cast(gate, x_ncs.dtype)
    if gate.ndim != x_ncs.ndim:
        whole = gate.ndim == 4 and gate.shape[2] != 1
        gate = gate.reshape(x_ncs.shape if whole else (*gate.shape[:2], *(1,) * (x_ncs.ndim - 2)))
    return x_ncs * gate


def excitation(
    z_nc: Tensor,
    w1_rc: Tensor,
    b1_r: Tensor | None,
    w2_cr: Tensor,
    b2_c: Tensor | None,
    gate: str = "sigmoid",
    activation: str = "relu",
) -> Tensor:
    """The gate of squeezed channels (equation 3), (N, C) → (N, C), in the dtype of ``z`` even under autocast."""
    check_device(z_nc, w1_rc, b1_r, w2_cr, b2_c)
    with without_autocast(z_nc.device.type):
        return GATES[gate](excite(z_nc, w1_rc, b1_r, w2_cr, b2_c, ACTIVATIONS[activation]))


class FullyConnected(NamedTuple):
    """An excitation given by its weights, for implementations that fuse it. Calling it computes ``excitation``.

    ``w1`` is (R, C) or (R, C, 1, 1), ``w2`` is (C, R) or (C, R, 1, 1). ``gate`` is a key of ``GATES``, ``activation``
    a key of ``ACTIVATIONS``.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gate: str
    activation: str = "relu"

    def __call__(self, z_nc: Tensor) -> Tensor:
        """The gate of squeezed channels, (N, C) → (N, C)."""
        w1, w2 = self.w1.flatten(1), self.w2.flatten(1)
        return excitation(z_nc, w1, self.b1, w2, self.b2, self.gate, self.activation)


def check_map(x_ncs: Tensor, channels: int) -> Tensor:
    """Return the map if it is (N, channels, *S) with one to three spatial axes; otherwise raise ``ValueError``."""
    if not 3 <= x_ncs.ndim <= 5 or x_ncs.shape[1] != channels:
        raise ValueError(
            f"SqueezeExcite: the input has shape {tuple(x_ncs.shape)}; it must be (N, {channels}, *spatial) "
            "with one, two, or three spatial axes"
        )
    return x_ncs


# torch.fx records these as single operations: they inspect the dtype and shape of their input, unknown while tracing.
for name in ("check_map", "cast", "squeeze", "as_image", "scale"):
    torch.fx.wrap(name)


def residual_tail(
    u_ncs: Tensor,
    norm: Callable[[Tensor], Tensor] | None,
    se: Callable[[Tensor], Tensor] | None,
    shortcut_ncs: Tensor | None,
    activation: bool,
) -> Tensor:
    """The end of a residual block (section 3.3, Fig. 3): δ(SE(norm(u)) + shortcut), where every part is optional.

    As in other ResNet implementations, the sum and the ReLU are in place if the tensor was created here. ``u`` is never
    overwritten.
    """
    y = u_ncs if norm is None else norm(u_ncs)
    if se is not None:
        y = se(y)
    # A module with backward hooks returns a view that must not be modified in place.
    writable = y is not u_ncs and not _has_backward_hooks(norm) and not _has_backward_hooks(se)
    if shortcut_ncs is not None:
        # The in-place addition of PyTorch accepts even a tensor on the meta device.
        y = y.add_(shortcut_ncs) if writable and not _are_apart(y, shortcut_ncs) else y + shortcut_ncs
        writable = True
    if activation:
        y = torch.relu_(y) if writable else torch.relu(y)
    return y


def _are_apart(y: object, other: object) -> bool:
    return isinstance(y, Tensor) and isinstance(other, Tensor) and y.device != other.device


def _has_backward_hooks(module: object) -> bool:
    return bool(getattr(module, "_backward_hooks", None) or getattr(module, "_backward_pre_hooks", None))
