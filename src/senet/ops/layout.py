"""The two memory layouts of a map (N, C, *S) that the sweeps are written for: positions, or channels, contiguous."""

from typing import overload

import torch
from torch import Tensor

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_last(u: Tensor) -> bool:
    """Whether the channels are contiguous (channels_last), which a map of one pixel or one channel also is."""
    layout = _LAST.get(u.ndim)
    if layout is not None:
        return u.is_contiguous(memory_format=layout)
    return u.movedim(1, -1).is_contiguous()


@overload
def in_layout(x: Tensor, last: bool) -> Tensor: ...
@overload
def in_layout(x: None, last: bool) -> None: ...
def in_layout(x: Tensor | None, last: bool) -> Tensor | None:
    """A map (or None) with channels, or positions, contiguous; a copy only if it has another layout."""
    if x is None or not last:
        return x if x is None else x.contiguous()
    return x if is_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


def prepared(u: Tensor) -> tuple[Tensor, bool]:
    """The map in one of the two layouts, and whether it is the one with contiguous channels."""
    if u.is_contiguous():
        return u, False
    return in_layout(u, True), True
