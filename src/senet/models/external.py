"""Networks of other libraries under the registry's roof: ``torchvision:NAME`` and ``timm:NAME``.

They are plain to this package, whatever is in them: SE comes into them by ``senet.attach``.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig
from senet.text import did_you_mean

LIBRARIES = ("torchvision", "timm")


ATTACHED = "+se"  # at the end of a name: that network with gates attached, which the training commands make


def is_elsewhere(name: str) -> bool:
    """Whether a name is of the form ``LIBRARY:NAME``."""
    return ":" in name


def builder_of(name: str) -> tuple[Callable[..., nn.Module], int]:
    """What makes the network ``LIBRARY:NAME``, and the side of the images it was designed for, in pixels.

    Raises:
        InputError: there is no such library or name, or the library is not installed.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES:
        raise InputError(f"there is no model {name!r}; other libraries' are torchvision:NAME and timm:NAME")
    try:
        return (_torchvision if library == "torchvision" else _timm)(model)
    except ModuleNotFoundError as error:
        raise InputError(f"{name}: {library} is not installed; pip install {library}") from error


def _torchvision(name: str) -> tuple[Callable[..., nn.Module], int]:
    from torchvision import models

    if name not in models.list_models():
        raise InputError(_unknown("torchvision", name, models.list_models()))
    builder = models.get_model_builder(name)
    known = inspect.signature(builder).parameters

    def build(num_classes: int, in_chans: int, se: SEConfig | None, pretrained: bool = False, **kwargs: Any) -> Any:
        _check(f"torchvision:{name}", se, num_classes, 1)
        if in_chans != 3:
            raise InputError(f"torchvision:{name} takes images of 3 channels only; timm's networks take any number")
        if "drop_rate" in kwargs and not name.startswith("densenet"):
            kwargs["dropout"] = kwargs.pop("drop_rate")
        if "weights_backbone" in known:
            kwargs["weights_backbone"] = None  # else it is downloaded
        if name in ("googlenet", "inception_v3"):
            kwargs |= {"init_weights": not pretrained, "aux_logits": False}  # one output, in training too
        if pretrained:
            own = len(models.get_model_weights(name)["DEFAULT"].meta.get("categories", ()))
            model = builder(weights="DEFAULT", **kwargs)
            return model if num_classes == own else _new_head(model, own, num_classes)
        return builder(weights=None, num_classes=num_classes, **kwargs)

    return build, 299 if name == "inception_v3" else 224


def _timm(name: str) -> tuple[Callable[..., nn.Module], int]:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise InputError(_unknown("timm", name, timm.list_models()))
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:  # no such tag behind the dot
        raise InputError(_unknown("timm", name, timm.list_pretrained())) from error

    def build(num_classes: int, in_chans: int, se: SEConfig | None, pretrained: bool = False, **kwargs: Any) -> Any:
        _check(f"timm:{name}", se, num_classes, 0)
        return timm.create_model(name, pretrained, num_classes=num_classes, in_chans=in_chans, **kwargs)

    size = getattr(config, "input_size", None) or (3, 224, 224)
    return build, int(size[-1])


def _unknown(library: str, name: str, names: list[str]) -> str:
    hint = did_you_mean(name, names, "see its list_models()", count=2, quote=lambda each: f"{library}:{each}")
    return f"{library} has no model {name!r}; {hint}"


def _check(name: str, se: SEConfig | None, num_classes: int, least: int) -> None:
    if se is not None:
        raise InputError(f"{name} takes no se=; attach SE to it: --attach, or senet.attach(model)")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < least:
        raise InputError(f"{name}: num_classes={num_classes!r} is not allowed; it must be an integer from {least} on")


def _new_head(model: nn.Module, own: int, num_classes: int) -> nn.Module:
    """``model``, pretrained with ``own`` classes, with its last linear layer replaced."""
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1][1].out_features != own:
        kind = type(model).__name__
        raise InputError(f"{kind} has no linear classifier to replace; pretrained it takes num_classes={own} alone")
    path, last = linear[-1]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Linear(last.in_features, num_classes, last.bias is not None))
    return model
