"""What happens to an attached gate when another module takes the place of its carrier.

Helpers do this: timm's ``freeze``, ``convert_sync_batchnorm`` and its inverses, Ultralytics' ``fuse()``. ``hand_on``
keeps the gate, at once, where the new module plays the same part. Where it does not, the gate is lost, and
``check_carriers``, a pre-hook of the module that calls the carrier, raises at the next call. It is not a hook of the
whole network, so it also runs when only a part is called. The helpers of torch.fx and of quantization, which would keep
neither hook, leave carriers as they are because of their class (see ``carriers``).
"""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from senet.errors import InputError
from senet.nn.carriers import CHILD, REMEDY, attach_gate, attached_side, site_of

_CARRIERS, _HANDLE = "_se_carriers", "_se_watch"  # attributes of a module that calls carriers


def check_carriers(caller: Any, args: tuple[Any, ...] = ()) -> None:
    """Forward pre-hook: raise ``InputError`` if a carrier has been replaced by a module without its gate."""
    for path in caller.__dict__.get(_CARRIERS, ()):  # none in a module to which a helper has moved this hook
        here: nn.Module | None = caller
        for name in path.split("."):
            here = None if here is None else here._modules.get(name)
        if (here is None or attached_side(here) is None) and _is_lost(caller, path, here):
            carrier = caller.__dict__[_CARRIERS][path]
            now = "removed" if here is None else f"replaced by {type(here).__name__}"
            raise InputError(
                f"{type(caller).__name__}: the SE gate attached at {site_of(carrier) or path!r} is lost, because "
                f"{path!r} ({type(carrier).__name__}) was {now}; {REMEDY}"
            )


def _is_lost(caller: nn.Module, path: str, here: nn.Module | None) -> bool:
    """Whether the carrier is neither detached nor moved, for example into a wrapper."""
    carrier = caller.__dict__[_CARRIERS][path]
    if attached_side(carrier) is None or any(module is carrier for module in caller.modules()):
        return False
    return here is None or all(attached_side(module) is None for module in here.modules())  # in a replica


def watch_carriers(model: nn.Module) -> None:
    """Let every module that calls carriers check that they are in place: the nearest one above that is no container."""
    for path, module in model.named_modules(remove_duplicate=False):
        if attached_side(module) is not None:
            parts = path.split(".") if path else []
            for end in reversed(range(len(parts))):
                above = model.get_submodule(".".join(parts[:end]))
                if _is_called(above):
                    _watch(above, ".".join(parts[end:]), module)
                    if not isinstance(above, nn.Sequential):  # which is called or iterated over, like a list
                        break


def unwatch_carriers(model: nn.Module) -> None:
    """Undo ``watch_carriers``."""
    for module in model.modules():
        if _CARRIERS in vars(module):
            del module.__dict__[_CARRIERS]
            module.__dict__.pop(_HANDLE).remove()


def check_all(model: nn.Module) -> None:
    """Raise ``InputError`` if any gate was lost."""
    for module in model.modules():
        if _CARRIERS in vars(module):
            check_carriers(module)


def hand_on(parent: nn.Module, name: str, new: Any) -> None:
    """PyTorch calls this when a module becomes a child: give it the gate of the child whose place and part it takes."""
    if not isinstance(new, nn.Module):
        return
    old = parent._modules[name] if name in parent._modules else None  # noqa: SIM401  TorchScript's has no get
    if old is not None and attached_side(old) is not None and attached_side(new) is None and _plays_the_part(old, new):
        # The old carrier keeps its gate: if it is shared, its other places are still to be converted.
        attach_gate(new, old.get_submodule(CHILD), attached_side(old) or "output", site_of(old))
    if attached_side(new) is not None and _is_called(parent):
        _watch(parent, name, new)


def _plays_the_part(old: nn.Module, new: nn.Module) -> bool:
    """Whether ``new`` was given the same gate as a child, or both are norms with running statistics."""
    gate = old._modules.get(CHILD)
    if gate is None or any(name == CHILD and child is gate for name, child in new.named_children()):
        return gate is not None
    channels = _channels(old)
    return channels is not None and channels == _channels(new) and old not in list(new.modules())


def _channels(norm: Any) -> int | None:
    """The channels of a norm with running statistics, frozen or not; None for other modules."""
    if not hasattr(norm, "running_mean"):
        return None
    return getattr(norm, "num_features", None) or (None if norm.running_mean is None else len(norm.running_mean))


def _is_called(module: nn.Module) -> bool:
    """Not a list or a dict of modules, which have no ``forward``."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _watch(caller: nn.Module, path: str, carrier: nn.Module) -> None:
    before = vars(caller).get(_CARRIERS)
    if before is None:
        caller.__dict__[_HANDLE] = caller.register_forward_pre_hook(check_carriers)
    # A new dict, because the replicas of DataParallel share the old one.
    caller.__dict__[_CARRIERS] = {**(before or {}), path: carrier}


register_module_module_registration_hook(hand_on)
