"""Checks before tensors are passed to C++ and Triton as bare pointers, and errors for tensors that they cannot read.

PyTorch's own operations do not always reject tensors on different devices: on the CPU, a linear layer reads weights on
the meta device as if they had data.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


class UnsuitedMapError(RuntimeError):
    """A feature map that a fast form does not support. PyTorch's operations accept it or raise a clear error."""


def readable(u: Tensor, *tensors: Tensor | None) -> bool:
    """Whether kernels for the feature map ``u`` can read the tensors: same device, no subclass such as DTensor."""
    device = u.device
    return all(t is None or (type(t) in _PLAIN and t.device == device) for t in tensors)


def fits_channels(u: Tensor, *tensors: Tensor | None) -> bool:
    """Whether kernels for ``u`` can read the tensors, which have one number per channel."""
    device, channels = u.device, u.shape[1]
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.device != device or t.shape != (channels,)):
            return False
    return True


def addresses(values: Iterable[Any]) -> list[Any]:
    """The values as C++ expects them: tensors are replaced by their addresses, and None by 0, the null pointer.

    Raises:
        RuntimeError: a tensor is not on the CPU.
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
    """Whether C++ can read ``x`` as a feature map (N, channels, *S) with this dtype."""
    return x.is_cpu and x.dtype == dtype and x.ndim >= 3 and x.shape[1] == channels


def have(dtype: torch.dtype, *sized: tuple[Tensor | None, int]) -> bool:
    """Whether each tensor is None or contiguous on the CPU with this dtype and as many elements as its size says."""
    for t, size in sized:  # a plain loop is faster, which matters for small networks
        if t is not None and not (t.is_cpu and t.dtype == dtype and t.numel() == size and t.is_contiguous()):
            return False
    return True


def check_device(x: Tensor, *weights: Tensor | None) -> None:
    """Raise the same error as PyTorch if a weight and ``x`` are on different devices."""
    device = x.device
    for weight in weights:
        if weight is not None and weight.device != device:
            raise RuntimeError(
                "SqueezeExcite: Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {weight.device}!"
            )
