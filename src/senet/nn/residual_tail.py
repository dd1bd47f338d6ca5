"""The end of a residual block, where SE meets the shortcut: the one place that faster maths replaces."""

from torch import Tensor, nn

from senet.nn.squeeze_excite import SqueezeExcite
from senet.ops import reference


class ResidualTail(nn.Module):
    """Last norm + SE + shortcut + activation of a residual block, for the placements that concern its end (Fig. 5).

    It owns no parameters: the block hands over its own norm and SE module at each call. So checkpoint keys stay the
    block's (``bn3``, ``se``), and whatever replaces those modules later (SyncBatchNorm, a detached gate) is seen.

    Args:
        placement: that of the block's ``SEConfig``. ``"standard"`` scales the branch, ``"identity"`` the shortcut,
            ``"post"`` the activated sum; with ``"pre"`` and ``"3x3"`` the block has used SE already, the tail does not.
        activation: whether a ReLU follows the addition (pre-activation networks have none).
    """

    def __init__(self, placement: str = "standard", activation: bool = True) -> None:
        super().__init__()
        self.placement = placement
        self.activation = activation

    def forward(self, u: Tensor, norm: nn.Module | None, se: SqueezeExcite | None, shortcut: Tensor | None) -> Tensor:
        """``u`` (N, C, *spatial), the output of the block's last convolution, and ``shortcut`` of the same shape."""
        on_branch = se if self.placement == "standard" else None
        if se is not None and self.placement == "identity" and shortcut is not None:
            shortcut = se(shortcut)
        out = reference.residual_tail(u, norm, on_branch, shortcut, self.activation)
        return se(out) if se is not None and self.placement == "post" else out

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}, activation={self.activation}"
