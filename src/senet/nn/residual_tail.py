"""The end of a residual block, where SE meets the shortcut: the one place that faster maths replaces."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from senet.nn.attachment import gate_of_output
from senet.nn.plain import has_hooks, refuse_to_script
from senet.nn.squeeze_excite import SqueezeExcite
from senet.ops import reference
from senet.ops.dispatch import backend_for, current_backend, traces_reference
from senet.ops.tail.autograd import norm_tail
from senet.ops.tail.norms import NORMS, gathers, uses_batch_statistics


class ResidualTail(nn.Module):
    """Last norm + SE + shortcut + activation of a residual block, for the placements that concern its end (Fig. 5).

    It owns no parameters: the block hands over its own norm and SE module at each call. So checkpoint keys stay the
    block's (``bn3``, ``se``), and whatever replaces those modules later (SyncBatchNorm, a detached gate) is seen.

    Args:
        placement: that of the block's ``SEConfig``. ``"standard"`` scales the branch, ``"identity"`` the shortcut,
            ``"post"`` the activated sum; with ``"pre"`` and ``"3x3"`` the block has used SE already, the tail does not.
        activation: whether a ReLU follows the addition (pre-activation networks have none).
    """

    __prepare_scriptable__ = refuse_to_script

    def __init__(self, placement: str = "standard", activation: bool = True) -> None:
        super().__init__()
        self.placement = placement
        self.activation = activation

    def forward(
        self,
        u: Tensor,
        norm: nn.Module | None,
        se: SqueezeExcite | None,
        shortcut: Tensor | None,
        shortcut_norm: nn.Module | None = None,
    ) -> Tensor:
        """``u`` (N, C, *spatial), the output of the block's last convolution, and ``shortcut`` of the same shape.

        With ``shortcut_norm``, the norm of a projection, ``shortcut`` is the output of the projection's convolution.
        """
        on_branch = se if self.placement == "standard" else None
        if se is not None and self.placement == "identity" and shortcut is not None:
            shortcut, shortcut_norm = se(shortcut if shortcut_norm is None else shortcut_norm(shortcut)), None
        out = _tail(u, norm, on_branch, shortcut, self.activation, shortcut_norm)
        return se(out) if se is not None and self.placement == "post" else out

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}, activation={self.activation}"


def norm_act(u: Tensor, norm: nn.Module, activation: nn.Module, se: SqueezeExcite | None = None) -> Tensor:
    """``activation(se(norm(u)))`` of a convolution's output ``u`` within a block: a tail without a shortcut.

    Without SE, small maps on a CPU take PyTorch's own operations, which are as fast; and compilers are left PyTorch's
    own batch norm, which they fuse with the ReLU by themselves.
    """
    by_itself = se is None and torch.compiler.is_compiling()
    if type(activation) is nn.ReLU and not has_hooks(activation) and not by_itself:
        return _tail(u, norm, se, None, True)
    y = norm(u)
    return activation(y if se is None else se(y))


def projected(x: Tensor, projection: nn.Module | None) -> tuple[Tensor, nn.Module | None]:
    """The shortcut of a block and, if the tail may take it, the norm that is still to be applied to it.

    ``projection`` is None or a module of a convolution and a norm. Where somebody wants to see its output or to fuse
    its operations (hooks, torch.fx, compilers), it is called as it is.
    """
    if projection is None:
        return x, None
    apart = type(projection) is nn.Sequential and len(projection) == 2 and isinstance(projection[1], nn.BatchNorm2d)
    if not apart or type(x) is not Tensor or torch.compiler.is_compiling() or has_hooks(projection):
        return projection(x), None
    convolution, norm = cast(nn.Sequential, projection)
    return convolution(x), norm


def _tail(
    u: Tensor,
    norm: nn.Module | None,
    se: SqueezeExcite | None,
    shortcut: Tensor | None,
    relu: bool,
    shortcut_norm: nn.Module | None = None,
) -> Tensor:
    """The residual tail in the fastest form that means the same; the reference where there is none."""
    gate = gate_of_output(norm) if norm is not None and se is None else se
    backend = _backend(u, norm, gate, bare=se is None and shortcut is None)
    if backend != "reference" and shortcut is not None and shortcut.shape != u.shape:
        backend = "reference"  # broadcasts, or says what is wrong
    if (
        shortcut is not None
        and shortcut_norm is not None
        and (backend not in ("native", "triton") or not _is_known(shortcut_norm, None))
    ):
        shortcut, shortcut_norm = shortcut_norm(shortcut), None
    if backend == "reference":
        return reference.residual_tail(u, norm, se, shortcut, relu)
    excitation = None
    if gate is not None:
        in_one_piece = backend in ("native", "triton") and gate.is_plain()
        excitation = gate.fully_connected() if in_one_piece else gate.excitation
    return norm_tail(u, norm, excitation, shortcut, relu, None if backend == "traced" else backend, shortcut_norm)


def _backend(u: Tensor, norm: nn.Module | None, se: SqueezeExcite | None, bare: bool) -> str:
    if norm is None and se is None:
        return "reference"  # a sum and a ReLU
    if torch.compiler.is_compiling():
        # Not is_exporting(): to Dynamo before torch 2.12 it is always true.
        exporting = torch.compiler._is_exporting_flag
        if norm is None or exporting or traces_reference() or not _is_known(norm, se):
            return "reference"
        # Frozen statistics are left as they are: compilers know how to fold them into the convolution.
        return "traced" if uses_batch_statistics(norm) and type(norm) is not nn.SyncBatchNorm else "reference"
    if type(u) not in (Tensor, nn.Parameter) or torch.jit.is_tracing() or not _is_known(norm, se):
        return "reference"  # a symbol of torch.fx, a fake or a subclass; modules that are not ours
    # torch.func and forward-mode differentiation want operations that they can see into.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "reference"
    frozen = norm is not None and not uses_batch_statistics(norm)
    backend = backend_for(u, frozen, bare) if u.numel() else "reference"
    if backend == "reference" and gathers(norm) and current_backend() != "reference":
        return "traced"  # ranks may have maps of other sizes, even empty ones; the form that all of them can take
    return backend


def _is_known(norm: nn.Module | None, se: SqueezeExcite | None) -> bool:
    """Whether the fast form means the same: modules of known kinds, with nothing hooked to them."""
    if norm is not None:
        attached = gate_of_output(norm)
        if type(norm) not in NORMS or has_hooks(norm, int(attached is not None)) or attached not in (None, se):
            return False
    return se is None or (type(se) is SqueezeExcite and se.config.squeeze == "avg" and not has_hooks(se))
