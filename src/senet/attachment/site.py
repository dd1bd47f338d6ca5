"""A place in a network at which SE can be attached."""

from dataclasses import dataclass, field

import torch

from senet.nn.attachment import INPUT, Side


@dataclass(frozen=True)
class Site:
    """A place for an SE block.

    Attributes:
        path: the module; its gate becomes ``path.se``.
        side: whether what the module returns is rescaled (``"output"``) or what it takes (``"input"``).
        kind: ``"residual"``, ``"depthwise"``, ``"concat"``, ``"fusion"``, ``"activation"`` or ``"named"``.
        channels: of the map.
        map_size: its spatial axes for the example input; empty where the network was not run.
        stage: maps of one size are a stage; numbered as in the paper, where 2 is the first.
        placement: that of the configuration (Fig. 5).
        parameters, mult_adds: what the gate adds; the multiply-adds are those of its FCs, for one image.
        dtype, device: of the map.
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
        """What names the site in ``sites=[…]``: the path, with ``:input`` behind it for that side."""
        return self.path + (INPUT if self.side == "input" else "")
