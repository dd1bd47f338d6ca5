"""The attached SE blocks of a network; see ``carriers`` for one of them, and ``carrier_watch`` for their safety."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from senet.errors import InputError
from senet.nn.carrier_watch import check_all, unwatch_carriers, watch_carriers
from senet.nn.carriers import CHILD, HANDLE, INPUT, attach_gate, attached_side, detach_gate
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite


def attached(model: nn.Module) -> dict[str, SqueezeExcite]:
    """Site name (the module's path, plus ``:input`` for that side) → gate, for every attached gate.

    Raises:
        InputError: a module that had a gate was replaced by one that has none.
    """
    check_all(model)
    return {site: module.get_submodule(CHILD) for site, module in _carriers(model).items()}  # type: ignore[misc]


def attach_all(model: nn.Module, gates: Mapping[str, SqueezeExcite]) -> None:
    """Attach each gate at the site of its name. ``model`` must have no attached gates yet."""
    for site, se in gates.items():
        module = model.get_submodule(site.removesuffix(INPUT))
        attach_gate(module, se, "input" if site.endswith(INPUT) else "output", site)
    watch_carriers(model)


def detach_all(model: nn.Module) -> dict[str, SqueezeExcite]:
    """Remove and return every attached gate; ``attach_all`` accepts the result."""
    unwatch_carriers(model)
    return {site: detach_gate(module) for site, module in _carriers(model).items()}


def _carriers(model: nn.Module) -> dict[str, nn.Module]:
    carriers = {}
    for path, module in model.named_modules():
        side = attached_side(module)
        if side is not None:
            carriers[path + (INPUT if side == "input" else "")] = module
    return carriers


@contextlib.contextmanager
def without_gates(model: nn.Module) -> Iterator[None]:
    """Within this context, ``model`` has no attached gates. Afterwards, each is back, in the same order of hooks."""
    aside = []
    for site in attached(model):
        module = model.get_submodule(site.removesuffix(INPUT))
        handle = vars(module)[HANDLE]
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

    Use it before helpers that fuse or replace modules. Each module that has a gate becomes ``nn.Sequential(module,
    se)``, or ``(se, module)``, so keys differ. The result shares all tensors with ``model``, which is not changed.
    Without attached gates, the result is ``model`` itself.

    Raises:
        InputError: a module that had a gate was replaced by one that has none.
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
        wrapped.training = module.training
        for parent, name in places:  # several if the module is shared
            parent._modules[name] = wrapped
    return twin
