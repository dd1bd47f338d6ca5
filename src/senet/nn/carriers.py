"""One attached gate: a child ``se`` of a module, its carrier, called by a hook that rescales the output or the input.

Why a hook, and not a wrapper: the carrier keeps its place and its keys, so pretrained weights load, and removing the
gate leaves no trace. The hooks are plain functions without state: ``deepcopy`` copies them, pickle stores them by name,
and ``torch.compile``, ``torch.export``, and ONNX export trace them like code in ``forward``.

A carrier from ``torch.nn`` gets a subclass of its class that adds nothing. ``isinstance`` sees what it saw before. But
code that compares the exact class, because it knows what exactly this class computes, must not take the carrier for it:
torch.fx ``fuse``, ``prepare_fx``, and ``fuse_modules`` would fuse the carrier and drop its gate.
"""

import copyreg
import functools
from typing import Any, Literal

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from senet.errors import InputError

CHILD = "se"
INPUT = ":input"  # suffix of a site's name: the gate rescales the input of the module, not its output
REMEDY = (
    "put the gates in line before such a conversion with senet.in_line(model), "
    "or use senet.detach(model) before it and senet.attach after it"
)
HANDLE, _SIDE, _SITE = "_se_handle", "_se_side", "_se_site"  # attributes of the carrier
_MARK = "_se_carrier"  # attribute of its class

Side = Literal["output", "input"]


def rescale_output(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: the module's output, rescaled by its ``se``. Of several outputs, only the first is rescaled."""
    if isinstance(output, (tuple, list)):
        first, *rest = output
        kind: Any = type(output)
        return kind(module.se(first), *rest) if hasattr(kind, "_fields") else kind([module.se(first), *rest])
    return module.se(output)


def rescale_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: the module's first argument, rescaled by its ``se``."""
    return (module.se(args[0]), *args[1:])


class CarrierType(type):
    """The class of the subclasses that carriers get; it names the remedy where an error message shows the class."""

    def __repr__(cls) -> str:
        if not _is_carrier_class(cls):
            return super().__repr__()
        return f"<class '{cls.__module__}.{cls.__qualname__}' with an attached SE gate; {REMEDY}>"


@functools.cache
def _carrier_class(cls: Any) -> Any:
    return CarrierType(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, _MARK: True})


def _is_carrier_class(cls: type) -> bool:
    """Not a class that others derived from one, such as parametrizations and FSDP do."""
    return _MARK in vars(cls)


def _reduce_class(cls: type) -> Any:
    return (_carrier_class, cls.__bases__) if _is_carrier_class(cls) else cls.__qualname__


copyreg.pickle(CarrierType, _reduce_class)  # such a class has no name by which pickle would find it


def _set_class(module: nn.Module) -> None:
    cls: Any = type(module)
    # torch.fx traces through other modules, and so records their gates. Parametrizations have a class of their own.
    known = cls.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, nn.Sequential)
    if known and not isinstance(cls, CarrierType) and not is_parametrized(module):
        module.__class__ = _carrier_class(cls)


def _restore_class(module: nn.Module) -> None:
    cls = type(module)
    if _is_carrier_class(cls):
        module.__class__ = cls.__bases__[0]
    elif isinstance(cls, CarrierType):
        cls.__bases__ = tuple(base.__bases__[0] if _is_carrier_class(base) else base for base in cls.__bases__)


def attach_gate(module: nn.Module, se: Any, side: Side = "output", site: str = "") -> None:
    """Make ``se`` rescale the output of ``module``, or its first argument with ``side="input"``.

    ``site`` is the name for messages.
    """
    module.add_module(CHILD, se)
    register: Any = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
    # The handle also serves unpickling: it keeps later hooks from reusing this hook's id.
    module.__dict__[HANDLE] = register(rescale_output if side == "output" else rescale_input)
    module.__dict__[_SIDE] = side
    module.__dict__[_SITE] = site
    _set_class(module)


def attached_side(module: nn.Module) -> Side | None:
    """The side that the attached gate rescales, or None if there is no attached gate."""
    return vars(module).get(_SIDE)


def site_of(module: nn.Module) -> str:
    """The name of the site at which the gate of ``module`` was attached."""
    return vars(module).get(_SITE, "")


def gate_of_output(module: nn.Module) -> Any:
    """The attached gate that rescales the module's output, or None if there is none."""
    return module.se if vars(module).get(_SIDE) == "output" else None


def detach_gate(module: nn.Module) -> Any:
    """Remove and return the gate of ``attach_gate``, or its replacement."""
    if attached_side(module) is None:
        raise InputError("detach_gate: this module has no attached gate")
    module.__dict__.pop(HANDLE).remove()
    for name in (_SIDE, _SITE):
        module.__dict__.pop(name, None)
    _restore_class(module)
    return module._modules.pop(CHILD)
