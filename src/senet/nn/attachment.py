"""SE blocks attached to modules: a child named ``se``, called by a hook that rescales the module's output or input.

Why a hook, and not a subclass or a wrapper: the module keeps its class, its place, and its keys. So pretrained weights
load, ``type(m) is nn.BatchNorm2d`` holds, torch.fx sees a known leaf module, and removing the block leaves no trace. (A
subclass created at run time would need custom pickling, and torch.fx would trace into it; a wrapper renames every key
below it.) The hooks are plain functions without state: ``deepcopy`` copies them, pickle stores them by name, and
``torch.compile``, ``torch.export``, and ONNX export trace them like code in ``forward``.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite

CHILD = "se"
INPUT = ":input"  # suffix of a site's name: the gate rescales the input of the module, not its output
_HANDLE, _SIDE = "_se_handle", "_se_side"  # attributes of the module that a gate is attached to
_KEEPER = "_se_keeper"  # attribute of the network

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


def attach_gate(module: nn.Module, se: SqueezeExcite, side: Side = "output") -> None:
    """Make ``se`` rescale the output of ``module``, or its first argument with ``side="input"``."""
    module.add_module(CHILD, se)
    register: Any = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
    # The handle also serves unpickling: it keeps later hooks from reusing this hook's id.
    module.__dict__[_HANDLE] = register(rescale_output if side == "output" else rescale_input)
    module.__dict__[_SIDE] = side


def attached_side(module: nn.Module) -> Side | None:
    """The side that the attached gate rescales, or None if there is no attached gate."""
    return vars(module).get(_SIDE)


def gate_of_output(module: nn.Module) -> Any:
    """The attached gate that rescales the module's output, or None if there is none."""
    return module.se if vars(module).get(_SIDE) == "output" else None


def detach_gate(module: nn.Module) -> Any:
    """Remove and return the gate of ``attach_gate``, or its replacement."""
    if attached_side(module) is None:
        raise InputError("detach_gate: this module has no attached gate")
    module.__dict__.pop(_HANDLE).remove()
    del module.__dict__[_SIDE]
    return module._modules.pop(CHILD)


def attached(model: nn.Module) -> dict[str, SqueezeExcite]:
    """Site name (the module's path, plus ``:input`` for that side) → gate, for every attached gate."""
    gates = {}
    for part in list(model.modules()):  # submodules may have gates that were attached separately
        for keeper in [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, KeepGates)]:
            keeper(part, ())
    for path, module in model.named_modules():
        side = attached_side(module)
        if side is not None:
            gate: Any = module.get_submodule(CHILD)
            gates[path + (INPUT if side == "input" else "")] = gate
    return gates


class KeepGates:
    """Forward pre-hook of a whole network: reattaches gates after ``convert_sync_batchnorm``.

    That function replaces batch norms by new modules, which inherit the child ``se`` but not the hook that calls it.
    """

    def __init__(self, sites: tuple[str, ...]) -> None:
        self.sites = sites

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Check each site, which takes a few microseconds. ``torch.compile`` can trace this."""
        for site in self.sites:
            module: nn.Module | None = model
            for name in site.removesuffix(INPUT).split("."):
                module = None if module is None else module._modules.get(name)  # None: removed in the meantime
            if isinstance(module, nn.SyncBatchNorm) and CHILD in module._modules and attached_side(module) is None:
                _attach_at(model, site, module._modules[CHILD])


def attach_all(model: nn.Module, gates: Mapping[str, SqueezeExcite]) -> None:
    """Attach each gate at the site of its name. ``model`` must have no attached gates yet."""
    for site, se in gates.items():
        _attach_at(model, site, se)
    if gates:
        keeper = model.register_forward_pre_hook(KeepGates(tuple(gates)))
        model.__dict__[_KEEPER] = keeper


def detach_all(model: nn.Module) -> dict[str, SqueezeExcite]:
    """Remove and return every attached gate; ``attach_all`` accepts the result."""
    gates = {site: detach_gate(model.get_submodule(site.removesuffix(INPUT))) for site in attached(model)}
    for module in model.modules():
        if _KEEPER in vars(module):
            module.__dict__.pop(_KEEPER).remove()
    return gates


@contextlib.contextmanager
def without_gates(model: nn.Module) -> Iterator[None]:
    """Within this context, ``model`` has no attached gates. Afterwards, each is back, in the same order of hooks."""
    aside = []
    for site in attached(model):
        module = model.get_submodule(site.removesuffix(INPUT))
        handle = vars(module)[_HANDLE]
        hooks = handle.hooks_dict_ref()
        aside.append((module, module._modules.pop(CHILD), hooks, handle.id, hooks[handle.id]))
        hooks[handle.id] = _leave_as_it_is
    try:
        yield
    finally:
        for module, gate, hooks, number, hook in aside:
            module._modules[CHILD] = gate
            hooks[number] = hook


def _leave_as_it_is(module: Any, *args: Any) -> None:
    """Do nothing: a placeholder hook."""


def _attach_at(model: nn.Module, site: str, se: Any) -> None:
    attach_gate(model.get_submodule(site.removesuffix(INPUT)), se, "input" if site.endswith(INPUT) else "output")


def described(model: nn.Module) -> dict[str, Any] | None:
    """The attached gates as plain values for ``attach_described``, or None if there are none."""
    gates = attached(model)
    if not gates:
        return None
    config = next(iter(gates.values())).config
    return {"config": config.to_dict(), "gates": {site: gate.channels for site, gate in gates.items()}}


def attach_described(model: nn.Module, description: dict[str, Any]) -> None:
    """Attach new gates to ``model`` as described, before weights of the same architecture are loaded.

    Raises:
        InputError: the network has no such modules, or the description is invalid.
    """
    like = next(model.parameters())
    try:
        config = SEConfig.from_dict(description["config"])
        gates = {
            site: SqueezeExcite(channels, config).to(like.device, like.dtype)
            for site, channels in description["gates"].items()
        }
        attach_all(model, gates)
    except (KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip("'\"")
        raise InputError(
            f"the description of the attached gates does not fit {type(model).__name__}: {reason}"
        ) from error


def tensors_of(model: nn.Module) -> dict[int, Any]:
    """Every tensor of a network by its id: a memo for ``copy.deepcopy``, so that the copy shares them.

    This includes tensors that modules computed from parameters, such as pruned weights, which cannot be copied.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *held)}


def in_line(model: nn.Module) -> nn.Module:
    """``model`` with every attached gate as an ordinary module, for code that sees modules but not hooks.

    Each module that has a gate becomes ``nn.Sequential(module, se)``, or ``(se, module)``. The result shares all
    tensors with ``model``, which is not changed. Without attached gates, the result is ``model`` itself.
    """
    if not attached(model):
        return model
    twin = copy.deepcopy(model, tensors_of(model))
    # Inner modules come first, because wrapping a module renames what is inside it.
    for site, se in reversed(detach_all(twin).items()):
        module = twin.get_submodule(site.removesuffix(INPUT))
        pair = (se, module) if site.endswith(INPUT) else (module, se)
        places = [(parent, name) for parent in twin.modules() for name, m in parent._modules.items() if m is module]
        wrapped = nn.Sequential(*pair)
        for parent, name in places:  # several if the module is shared
            parent._modules[name] = wrapped
    return twin
