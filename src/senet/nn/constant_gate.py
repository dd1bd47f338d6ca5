"""A gate that no longer looks at its input, and how any gate is taken out of a network."""

from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.nn.attachment import CHILD, attached_side, detach_gate
from senet.nn.plain import refuse_to_script
from senet.ops import reference


class ConstantGate(nn.Module):
    """One fixed factor a channel: (N, C, *spatial) → the same shape. It costs a multiplication, and trains no weight.

    Args:
        scale: (C,), kept as a buffer.
    """

    __prepare_scriptable__ = refuse_to_script
    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return reference.scale(x, self.scale[None])

    def extra_repr(self) -> str:
        return str(len(self.scale))


def replace_gate(model: nn.Module, path: str, constant: ConstantGate | None) -> None:
    """Take the gate at ``path`` out of ``model``, in place, and put ``constant`` there; None is nothing.

    An attached gate leaves its module as it was, a block of this package has no gate then (``se`` is None, as in the
    plain twin), and any other gets an ``nn.Identity``, which it may call. A gate that stands in several places is
    taken out of all.

    Raises:
        InputError: there is no such module, or it is the whole network.
    """
    try:
        gate = model.get_submodule(path)
    except AttributeError:
        raise InputError(f"{type(model).__name__} has no gate {path!r}; senet.find_gates lists its gates") from None
    if not path:
        raise InputError(f"{type(model).__name__} is a gate itself, which cannot be taken out of a network")
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is gate]
    for parent, name in places:
        if constant is None and name == CHILD and attached_side(parent) is not None:
            detach_gate(parent)
        elif constant is None and type(parent).__module__.startswith("senet."):
            parent._modules[name] = None
        else:
            parent._modules[name] = nn.Identity() if constant is None else constant


def replace_described(model: nn.Module, folded: dict[str, Any]) -> None:
    """Take gates out of ``model`` as they were in a network of the same architecture, before its weights load.

    Args:
        model: with all of its gates.
        folded: gate → channels of the ``ConstantGate`` that took its place; 0 where nothing did.
    """
    like = next(model.parameters())
    for path, channels in folded.items():
        constant = torch.ones(channels, device=like.device, dtype=like.dtype) if channels else None
        replace_gate(model, path, None if constant is None else ConstantGate(constant))
