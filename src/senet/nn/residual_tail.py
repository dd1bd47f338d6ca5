"""The tail of a residual block (norm, SE, shortcut, ReLU), and the choice of its implementation."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from senet.nn.carriers import gate_of_output
from senet.nn.plain import has_hooks, refuse_to_script
from senet.nn.squeeze_excite import SqueezeExcite
from senet.ops import reference
from senet.ops.dispatch import backend_for, current_backend, traces_reference
from senet.ops.tail.choice import Gate
from senet.ops.tail.norms import NORMS, group_of, uses_batch_statistics
from senet.ops.tail.tail import norm_tail


class ResidualTail(nn.Module):
    """Last norm + SE + shortcut + activation of a residual block, with SE where the placement says (Fig. 5).

    It has no parameters: the block passes its own norm and SE module at each call. So checkpoint keys stay those of the
    block (``bn3``, ``se``), and replacing these modules later (SyncBatchNorm, a removed gate) has the usual effect.

    Args:
        placement: that of the block's ``SEConfig``. ``"standard"`` scales the branch, ``"identity"`` the shortcut,
            ``"post"`` the activated sum. With ``"pre"`` and ``"3x3"``, the block has applied SE before the tail.
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
        """Compute the tail for ``u`` (N, C, *spatial), the output of the block's last convolution.

        ``shortcut`` has the shape of ``u``, as does the result. With ``shortcut_norm``, the norm of a projection,
        ``shortcut`` is the output of the projection's convolution.
        """
        on_branch = se if self.placement == "standard" else None
        if se is not None and self.placement == "identity" and shortcut is not None:
            shortcut, shortcut_norm = se(shortcut if shortcut_norm is None else shortcut_norm(shortcut)), None
        out = _tail(u, norm, on_branch, shortcut, self.activation, shortcut_norm)
        return se(out) if se is not None and self.placement == "post" else out

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}, activation={self.activation}"


def norm_act(u: Tensor, norm: nn.Module, activation: nn.Module, se: SqueezeExcite | None = None) -> Tensor:
    """``activation(se(norm(u)))`` for the output ``u`` of a convolution within a block: a tail without a shortcut.

    Without SE, small feature maps on a CPU use PyTorch's own operations, which are as fast. ``torch.compile`` gets
    PyTorch's own batch norm, which it fuses with the ReLU.
    """
    by_itself = se is None and torch.compiler.is_compiling()
    if type(activation) is nn.ReLU and not has_hooks(activation) and not by_itself:
        return _tail(u, norm, se, None, True)
    y = norm(u)
    return activation(y if se is None else se(y))


def projected(x: Tensor, projection: nn.Module | None) -> tuple[Tensor, nn.Module | None]:
    """The shortcut of a block and, if the tail can fuse it, the norm that remains to be applied to it.

    ``projection`` is None or a module with a convolution and a norm. It is called as usual if its output may be
    observed or its operations fused by others (hooks, torch.fx, compilers).
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
    """The residual tail in the fastest form that computes the same function; otherwise, the reference."""
    gate = gate_of_output(norm) if norm is not None and se is None else se
    backend = _backend(u, norm, gate, bare=se is None and shortcut is None)
    if backend != "reference" and shortcut is not None and shortcut.shape != u.shape:
        backend = "reference"  # broadcasts or raises the right error
    if (
        shortcut is not None
        and shortcut_norm is not None
        and (backend not in ("native", "triton") or not _is_known(shortcut_norm, None))
    ):
        shortcut, shortcut_norm = shortcut_norm(shortcut), None
    if backend == "reference":
        return reference.residual_tail(u, norm, se, shortcut, relu)
    excitation: Gate | None = None
    if gate is not None and backend in ("native", "triton") and gate.is_plain():
        excitation = gate.fully_connected()
    elif gate is not None:
        excitation = gate.excitation
    return norm_tail(u, norm, excitation, shortcut, relu, backend, shortcut_norm)


def _backend(u: Tensor, norm: nn.Module | None, se: SqueezeExcite | None, bare: bool) -> str:
    if norm is None and se is None:
        return "reference"  # a sum and a ReLU
    if torch.compiler.is_compiling():
        # is_exporting() would always be true in Dynamo before torch 2.12.
        exporting = torch.compiler._is_exporting_flag
        if norm is None or exporting or traces_reference() or not _is_known(norm, se):
            return "reference"
        # Compilers can fold frozen statistics into the convolution themselves.
        return "traced" if uses_batch_statistics(norm) and type(norm) is not nn.SyncBatchNorm else "reference"
    if type(u) not in (Tensor, nn.Parameter) or torch.jit.is_tracing() or not _is_known(norm, se):
        return "reference"  # torch.fx proxies, fake tensors, and subclasses; unknown modules
    # torch.func and forward-mode differentiation need transparent operations.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "reference"
    frozen = norm is not None and not uses_batch_statistics(norm)
    backend = backend_for(u, frozen, bare) if u.numel() else "reference"
    if backend == "reference" and group_of(norm) and current_backend() != "reference":
        return "traced"  # other ranks may have other sizes, even empty batches; all ranks support this form
    return backend


def _is_known(norm: nn.Module | None, se: SqueezeExcite | None) -> bool:
    """Whether the fast form computes the same function: the modules have known classes and no hooks."""
    if norm is not None:
        attached = gate_of_output(norm)
        if type(norm) not in NORMS or has_hooks(norm, int(attached is not None)) or attached not in (None, se):
            return False
    return se is None or (type(se) is SqueezeExcite and se.config.squeeze == "avg" and not has_hooks(se))
