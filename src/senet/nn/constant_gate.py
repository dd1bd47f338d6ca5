"""A gate that does not depend on its input, and the removal of gates from a network."""

from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.nn.carriers import CHILD, attached_side, detach_gate
from senet.nn.scripting import refuse_to_script
from senet.ops import reference


class ConstantGate(nn.Module):
    """One constant factor per channel: (N, C, *spatial) → the same shape. It has no trainable parameters.

    Args:
        scale: (C,), stored as a buffer.
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
    """Replace the gate at ``path`` by ``constant``, in place, or remove it if ``constant`` is None.

    Removing an attached gate restores its module. In a block of this package, ``se`` becomes None, as in the plain
    twin. In any other module, the gate becomes an ``nn.Identity``, which the module may call. A gate that is used in
    several places is replaced in all of them.

    Raises:
        InputError: there is no such module, or it is the whole network.
    """
    try:
        gate = model.get_submodule(path)
    except AttributeError:
        raise InputError(f"{type(model).__name__} has no gate {path!r}; senet.find_gates lists its gates") from None
    if not path:
        raise InputError(f"{type(model).__name__} is itself a gate; give the network that contains it")
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is gate]
    for parent, name in places:
        if constant is None and name == CHILD and attached_side(parent) is not None:
            detach_gate(parent)
        elif constant is None and type(parent).__module__.startswith("senet."):
            parent._modules[name] = None
        else:
            parent._modules[name] = nn.Identity() if constant is None else constant


def replace_described(model: nn.Module, folded: dict[str, Any]) -> None:
    """Remove gates from ``model`` as described, before weights of the same architecture are loaded.

    Args:
        model: the network with all of its gates.
        folded: path of a gate → number of channels of the ``ConstantGate`` that replaced it; 0 if it was removed.
    """
    like = next(model.parameters())
    for path, channels in folded.items():
        constant = torch.ones(channels, device=like.device, dtype=like.dtype) if channels else None
        replace_gate(model, path, None if constant is None else ConstantGate(constant))
