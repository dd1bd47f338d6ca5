"""The ground truth: Squeeze-and-Excitation in plain PyTorch, short enough to read beside the paper.

Everything faster is compared with these functions. Shape suffixes: N batch, C channels, R bottleneck channels,
S one or more spatial axes (1-D, 2-D or 3-D).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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


# Section 6.3 and Table 12: the function that replaces the final sigmoid; hard sigmoid is MobileNetV3's, slope 1/6.
# The `identity_` forms are moved so that an excitation of zero opens the gate to exactly 1 and still passes a gradient.
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


# What may stand between the two FCs: the paper's ReLU, or what other libraries' networks were trained with.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish}


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which per-channel tables are computed: float32, or float64 for float64 maps."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block in which operations keep the types of what they are given."""
    # The meta device knows no autocast and refuses even to have it switched off. (Not is_autocast_available: it breaks
    # the graph of torch.compile of older torch.)
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def squeeze(x_ncs: Tensor, how: str = "avg") -> Tensor:
    """Global information embedding (section 3.1, equation 2): one number a channel, (N, C, *S) → (N, C).

    Accumulates in float32 whatever the type of the map. ``how`` is ``"avg"`` or ``"max"`` (Table 11).
    """
    spatial = tuple(range(2, x_ncs.ndim))
    if how == "avg":
        return x_ncs.mean(spatial, dtype=table_dtype(x_ncs.dtype))
    return x_ncs.amax(spatial).to(table_dtype(x_ncs.dtype))


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


def excite_map(x_ncs: Tensor, w1_rc: Tensor, b1_r: Tensor | None, w2_cr: Tensor, b2_c: Tensor | None) -> Tensor:
    """NoSqueeze (section 7.1, Table 16): the two FCs as 1×1 convolutions at full resolution, (N, C, *S) → same."""
    check_device(x_ncs, w1_rc, b1_r, w2_cr, b2_c)
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x_ncs.ndim]
    ones = (1,) * (x_ncs.ndim - 2)
    hidden = F.relu(convolution(x_ncs, w1_rc.reshape(*w1_rc.shape, *ones), b1_r))
    return convolution(hidden, w2_cr.reshape(*w2_cr.shape, *ones), b2_c)


def scale(x_ncs: Tensor, gate: Tensor) -> Tensor:
    """Channel-wise rescaling (equation 4). ``gate`` is (N, C), or (N, C, *S) for NoSqueeze; keeps x's type."""
    gate = gate.to(x_ncs.dtype)
    if gate.ndim == 2:
        gate = gate.reshape(*gate.shape, *(1,) * (x_ncs.ndim - 2))
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
    """The gate of squeezed channels (equation 3), (N, C) → (N, C), in the type of ``z`` also under autocast."""
    check_device(z_nc, w1_rc, b1_r, w2_cr, b2_c)
    with without_autocast(z_nc.device.type):
        return GATES[gate](excite(z_nc, w1_rc, b1_r, w2_cr, b2_c, ACTIVATIONS[activation]))


@dataclass(frozen=True)
class FullyConnected:
    """An excitation as its weights, for implementations that take it in one piece; called, it is ``excitation``.

    ``w1`` is (R, C) or (R, C, 1, 1), ``w2`` (C, R) or (C, R, 1, 1); ``gate`` is a name of ``GATES``, ``activation`` one
    of ``ACTIVATIONS``.
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
    """The map itself, if it is (N, channels, *S) with one to three spatial axes; else ``ValueError``."""
    if not 3 <= x_ncs.ndim <= 5 or x_ncs.shape[1] != channels:
        raise ValueError(
            f"SqueezeExcite: the input has shape {tuple(x_ncs.shape)}; it must be (N, {channels}, *spatial) "
            "with one, two or three spatial axes"
        )
    return x_ncs


def gate_map(
    x_ncs: Tensor,
    w1_rc: Tensor,
    b1_r: Tensor | None,
    w2_cr: Tensor,
    b2_c: Tensor | None,
    how: str = "avg",
    gate: str = "sigmoid",
) -> Tensor:
    """The gate of a map (equations 2 and 3): (N, C, *S) → (N, C), or (N, C, *S) with ``how="none"``.

    Raises:
        ValueError: the map has another number of channels than the weights, or not one to three spatial axes.
    """
    check_map(x_ncs, w1_rc.shape[1])
    if how == "none":
        return GATES[gate](excite_map(x_ncs, w1_rc, b1_r, w2_cr, b2_c))
    return excitation(squeeze(x_ncs, how), w1_rc, b1_r, w2_cr, b2_c, gate)


# To torch.fx these are single operations: they look at the type and shape of their input, which a trace does not have.
torch.fx.wrap("check_map")
torch.fx.wrap("gate_map")
torch.fx.wrap("squeeze")
torch.fx.wrap("scale")


def residual_tail(
    u_ncs: Tensor,
    norm: Callable[[Tensor], Tensor] | None,
    se: Callable[[Tensor], Tensor] | None,
    shortcut_ncs: Tensor | None,
    activation: bool,
) -> Tensor:
    """The end of a residual block (section 3.3, Fig. 3): δ(SE(norm(u)) + shortcut), every part optional.

    The sum and the ReLU reuse the memory of a map made here, as every well-tuned ResNet does; ``u`` is never written.
    """
    y = u_ncs if norm is None else norm(u_ncs)
    if se is not None:
        y = se(y)
    # A module with backward hooks returns a view that must not be written to.
    writable = y is not u_ncs and not _has_backward_hooks(norm) and not _has_backward_hooks(se)
    if shortcut_ncs is not None:
        # In place, PyTorch adds even what is on the meta device.
        y = y.add_(shortcut_ncs) if writable and not _are_apart(y, shortcut_ncs) else y + shortcut_ncs
        writable = True
    if activation:
        y = torch.relu_(y) if writable else torch.relu(y)
    return y


def _are_apart(y: object, other: object) -> bool:
    return isinstance(y, Tensor) and isinstance(other, Tensor) and y.device != other.device


def _has_backward_hooks(module: object) -> bool:
    return bool(getattr(module, "_backward_hooks", None) or getattr(module, "_backward_pre_hooks", None))
