"""The border to C++ and Triton, which are handed bare pointers: what they may read, and what is said of the rest.

PyTorch's own operations do not always object to tensors of two devices: on the CPU a linear layer reads weights of the
meta device as if they were there.
"""

from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


class UnsuitedMapError(RuntimeError):
    """A map that a fast form was not made for; the ordinary operations say what is wrong with it, or take it."""


def readable(u: Tensor, *tensors: Tensor | None) -> bool:
    """Whether kernels for the map ``u`` may read the tensors: memory on its device, no subclass such as DTensor."""
    device = u.device
    return all(t is None or (type(t) in _PLAIN and t.device == device) for t in tensors)


def of_norm(norm: nn.Module | None) -> tuple[Tensor | None, ...]:
    """The tensors of a norm."""
    return () if norm is None else (*norm._parameters.values(), *norm._buffers.values())


def check_device(x: Tensor, *weights: Tensor | None) -> None:
    """Raise what PyTorch raises where a weight is on another device than ``x``."""
    device = x.device
    for weight in weights:
        if weight is not None and weight.device != device:
            raise RuntimeError(
                "SqueezeExcite: Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {weight.device}!"
            )
