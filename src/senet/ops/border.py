"""The border to C++ and Triton, which are handed bare pointers: what they may read, and what is said of the rest.

PyTorch's own operations do not always object to tensors of two devices: on the CPU a linear layer reads weights of the
meta device as if they were there.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


class UnsuitedMapError(RuntimeError):
    """A map that a fast form was not made for; the ordinary operations say what is wrong with it, or take it."""


def readable(u: Tensor, *tensors: Tensor | None) -> bool:
    """Whether kernels for the map ``u`` may read the tensors: memory on its device, no subclass such as DTensor."""
    device = u.device
    return all(t is None or (type(t) in _PLAIN and t.device == device) for t in tensors)


def fits_norm(u: Tensor, norm: nn.Module | None) -> bool:
    """Whether kernels for ``u`` may read the tensors of its norm, which have one number for each channel."""
    if norm is None:
        return True
    device, channels = u.device, u.shape[1]
    for tensors in (norm._parameters, norm._buffers):
        for t in tensors.values():
            if t is None:
                continue
            if type(t) not in _PLAIN or t.device != device or (t.ndim and t.shape[0] != channels):
                return False
    return True


def addresses(values: Iterable[Any]) -> list[Any]:
    """The same values for C++: tensors replaced by where they lie, None by 0, the null pointer.

    Raises:
        RuntimeError: a tensor is on another device than the CPU.
    """
    found = []
    for x in values:
        if x is None:
            x = 0
        elif isinstance(x, Tensor):
            if not x.is_cpu:
                raise RuntimeError(
                    "senet: Expected all tensors to be on the same device, but found at least two devices, "
                    f"cpu and {x.device}!"
                )
            x = x.data_ptr()
        found.append(x)
    return found


def is_map(x: Tensor, channels: int, dtype: torch.dtype) -> bool:
    """Whether C++ may read ``x`` as a map (N, channels, *S) of a type."""
    return x.is_cpu and x.dtype == dtype and x.ndim >= 3 and x.shape[1] == channels


def have(dtype: torch.dtype, *sized: tuple[Tensor | None, int]) -> bool:
    """Whether C++ may read as many numbers of a type from each tensor, one after the other; or there is none."""
    for t, size in sized:  # a loop, as it is run at each call of a small network
        if t is not None and not (t.is_cpu and t.dtype == dtype and t.numel() == size and t.is_contiguous()):
            return False
    return True


def check_device(x: Tensor, *weights: Tensor | None) -> None:
    """Raise what PyTorch raises where a weight is on another device than ``x``."""
    device = x.device
    for weight in weights:
        if weight is not None and weight.device != device:
            raise RuntimeError(
                "SqueezeExcite: Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {weight.device}!"
            )
