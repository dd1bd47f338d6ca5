"""An SE block beside a module: as its child ``se``, called by a hook on what the module returns, or on what it takes.

Why a hook and not another class or a wrapper: the module keeps its class, its place and its keys, so that pretrained
weights load, ``type(m) is nn.BatchNorm2d`` holds, torch.fx sees the leaf it knows, and taking the block out leaves
nothing behind. (A subclass made at run time would have to pickle itself and is traced into by torch.fx; a wrapper
renames every key below it.) The hooks are plain functions without a state: they are copied by ``deepcopy``, pickled by
name, and traced by ``torch.compile``, ``torch.export`` and ONNX export as if they stood in ``forward``.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite

CHILD = "se"
INPUT = ":input"  # at the end of a site's name: the gate rescales what the module takes, not what it returns
_HANDLE, _SIDE = "_se_handle", "_se_side"  # of the module that a gate is attached to
_KEEPER = "_se_keeper"  # of the network

Side = Literal["output", "input"]


def rescale_output(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: what the module returned, rescaled by its ``se``; of several things, in training say, the first."""
    if isinstance(output, (tuple, list)):
        first, *rest = output
        kind: Any = type(output)
        return kind(module.se(first), *rest) if hasattr(kind, "_fields") else kind([module.se(first), *rest])
    return module.se(output)


def rescale_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: the module's first argument, rescaled by its ``se``."""
    return (module.se(args[0]), *args[1:])


def attach_gate(module: nn.Module, se: SqueezeExcite, side: Side = "output") -> None:
    """Let ``se`` rescale what ``module`` returns, or its first argument with ``side="input"``."""
    module.add_module(CHILD, se)
    register: Any = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
    # The handle is kept for more than the way back: unpickled, it keeps later hooks from taking this one's number.
    module.__dict__[_HANDLE] = register(rescale_output if side == "output" else rescale_input)
    module.__dict__[_SIDE] = side


def attached_side(module: nn.Module) -> Side | None:
    """What the gate of ``attach_gate`` rescales; None where there is none."""
    return vars(module).get(_SIDE)


def gate_of_output(module: nn.Module) -> Any:
    """The attached gate through which what the module returns goes; None where there is none."""
    return module.se if vars(module).get(_SIDE) == "output" else None


def detach_gate(module: nn.Module) -> Any:
    """Take the gate of ``attach_gate``, or what has taken its place, out again and return it."""
    if attached_side(module) is None:
        raise InputError("detach_gate: this module has no attached gate")
    module.__dict__.pop(_HANDLE).remove()
    del module.__dict__[_SIDE]
    return module._modules.pop(CHILD)


def attached(model: nn.Module) -> dict[str, SqueezeExcite]:
    """Site name (the module's path, with ``:input`` behind it for that side) → gate, for every attached gate."""
    gates = {}
    for part in list(model.modules()):  # what a part was given by itself, too
        for keeper in [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, KeepGates)]:
            keeper(part, ())
    for path, module in model.named_modules():
        side = attached_side(module)
        if side is not None:
            gate: Any = module.get_submodule(CHILD)
            gates[path + (INPUT if side == "input" else "")] = gate
    return gates


class KeepGates:
    """Forward pre-hook of a whole network: gates that ``convert_sync_batchnorm`` has cut off are attached again.

    It puts new norms in the place of batch norms, which take over the child ``se`` but not the hook that calls it.
    """

    def __init__(self, sites: tuple[str, ...]) -> None:
        self.sites = sites

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Look at each site; a few microseconds. Plain enough to be traced: who compiles next wants the gates, too."""
        for site in self.sites:
            module: nn.Module | None = model
            for name in site.removesuffix(INPUT).split("."):
                module = None if module is None else module._modules.get(name)  # None: a part was taken out since
            if isinstance(module, nn.SyncBatchNorm) and CHILD in module._modules and attached_side(module) is None:
                _attach_at(model, site, module._modules[CHILD])


def attach_all(model: nn.Module, gates: Mapping[str, SqueezeExcite]) -> None:
    """Attach each gate at the site of ``model`` that its name says; there are none so far."""
    for site, se in gates.items():
        _attach_at(model, site, se)
    if gates:
        keeper = model.register_forward_pre_hook(KeepGates(tuple(gates)))
        model.__dict__[_KEEPER] = keeper


def detach_all(model: nn.Module) -> dict[str, SqueezeExcite]:
    """Take every attached gate out; ``attach_all`` takes the result back."""
    gates = {site: detach_gate(model.get_submodule(site.removesuffix(INPUT))) for site in attached(model)}
    for module in model.modules():
        if _KEEPER in vars(module):
            module.__dict__.pop(_KEEPER).remove()
    return gates


@contextlib.contextmanager
def without_gates(model: nn.Module) -> Iterator[None]:
    """``model`` as it is without its attached gates, for a while; then each has its old place, among hooks too."""
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
    """A hook that does nothing."""


def _attach_at(model: nn.Module, site: str, se: Any) -> None:
    attach_gate(model.get_submodule(site.removesuffix(INPUT)), se, "input" if site.endswith(INPUT) else "output")


def described(model: nn.Module) -> dict[str, Any] | None:
    """The attached gates as plain values, with which ``attach_described`` makes them again; None: there are none."""
    gates = attached(model)
    if not gates:
        return None
    config = next(iter(gates.values())).config
    return {"config": config.to_dict(), "gates": {site: gate.channels for site, gate in gates.items()}}


def attach_described(model: nn.Module, description: dict[str, Any]) -> None:
    """Attach fresh gates to ``model`` as they were in a network of the same architecture, before its weights load.

    Raises:
        InputError: the network has no such modules, or the description is damaged.
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
    """Every tensor of a network by its id, as ``copy.deepcopy`` takes what is not to be copied.

    Those that modules computed from parameters are among them, as pruned weights are: they cannot be copied.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *held)}


def in_line(model: nn.Module) -> nn.Module:
    """``model`` with every attached gate as a module of its own, for what looks at modules and not at hooks.

    Each module that has a gate becomes ``nn.Sequential(module, se)``, or ``(se, module)``. The result shares all
    tensors with ``model``, which is not changed; where nothing is attached it is ``model`` itself.
    """
    if not attached(model):
        return model
    twin = copy.deepcopy(model, tensors_of(model))
    # What lies inside a module comes first: wrapping the module renames it.
    for site, se in reversed(detach_all(twin).items()):
        module = twin.get_submodule(site.removesuffix(INPUT))
        pair = (se, module) if site.endswith(INPUT) else (module, se)
        places = [(parent, name) for parent in twin.modules() for name, m in parent._modules.items() if m is module]
        wrapped = nn.Sequential(*pair)
        for parent, name in places:  # a shared module has several
            parent._modules[name] = wrapped
    return twin
