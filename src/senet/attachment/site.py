"""A site: a place in a network where SE can be attached."""

from dataclasses import dataclass, field

import torch

from senet.nn.carriers import INPUT, Side


@dataclass(frozen=True)
class Site:
    """A place for an SE block.

    Attributes:
        path: the module; its gate becomes ``path.se``.
        side: whether the gate rescales the module's ``"output"`` or ``"input"``.
        kind: ``"residual"``, ``"depthwise"``, ``"concat"``, ``"fusion"``, ``"activation"``, or ``"named"``.
        channels: channels of the feature map.
        map_size: its spatial size for the example input; empty if the network was not run.
        stage: the stage number, from 2 as in the paper; feature maps of the same size form a stage.
        placement: the placement in the configuration (Fig. 5).
        parameters, mult_adds: the cost of the gate; the multiply-adds are those of its FCs, for one image.
        dtype, device: dtype and device of the feature map.
    """

    path: str
    side: Side
    kind: str
    channels: int
    map_size: tuple[int, ...]
    stage: int
    placement: str
    parameters: int
    mult_adds: int
    dtype: torch.dtype = field(repr=False)
    device: torch.device = field(repr=False)

    @property
    def name(self) -> str:
        """The site's name in ``sites=[…]``: the path, followed by ``:input`` for that side."""
        return self.path + (INPUT if self.side == "input" else "")
