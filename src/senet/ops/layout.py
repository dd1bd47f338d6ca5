"""The two memory layouts of a feature map (N, C, *S) that the sweeps support: contiguous and channels_last."""

from typing import overload

import torch
from torch import Tensor

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_last(u: Tensor) -> bool:
    """Whether the map is channels_last. A map with one position or one channel counts, too."""
    layout = _LAST.get(u.ndim)
    if layout is not None:
        return u.is_contiguous(memory_format=layout)
    return u.movedim(1, -1).is_contiguous()


@overload
def in_layout(x: Tensor, last: bool) -> Tensor: ...
@overload
def in_layout(x: None, last: bool) -> None: ...
def in_layout(x: Tensor | None, last: bool) -> Tensor | None:
    """The map (or None) in channels_last (``last``) or contiguous layout; copied only if its layout differs."""
    if x is None or not last:
        return x if x is None else x.contiguous()
    return x if is_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


def prepared(u: Tensor) -> tuple[Tensor, bool]:
    """The map in one of the two layouts, and whether that is channels_last."""
    if u.is_contiguous():
        return u, False
    return in_layout(u, True), True
