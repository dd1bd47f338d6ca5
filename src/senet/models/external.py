"""Networks of other libraries in the registry: ``torchvision:NAME`` and ``timm:NAME``.

The registry treats all of them as plain networks. ``senet.attach`` adds SE to them.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig
from senet.text import did_you_mean

LIBRARIES = ("torchvision", "timm")


ATTACHED = "+se"  # name suffix: the network with attached gates, as the training commands create it


def is_elsewhere(name: str) -> bool:
    """Whether a name has the form ``LIBRARY:NAME``."""
    return ":" in name


def builder_of(name: str) -> tuple[Callable[..., nn.Module], int]:
    """The builder of the network ``LIBRARY:NAME``, and the side of its design input, in pixels.

    Raises:
        InputError: the library or name is unknown, or the library is not installed.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES:
        raise InputError(f"there is no model {name!r}; for other libraries, use torchvision:NAME or timm:NAME")
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
            raise InputError(f"torchvision:{name} needs in_chans=3; timm's networks accept any number of channels")
        if "drop_rate" in kwargs and not name.startswith("densenet"):
            kwargs["dropout"] = kwargs.pop("drop_rate")
        if "weights_backbone" in known:
            kwargs["weights_backbone"] = None  # the default would download them
        if name in ("googlenet", "inception_v3"):
            kwargs |= {"init_weights": not pretrained, "aux_logits": False}  # a single output, also in training
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
    except RuntimeError as error:  # unknown tag after the dot
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
        raise InputError(f"{name} does not take se=; add SE with --attach or senet.attach(model)")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < least:
        raise InputError(f"{name}: num_classes={num_classes!r} is not allowed; use an integer of at least {least}")


def _new_head(model: nn.Module, own: int, num_classes: int) -> nn.Module:
    """Replace the last linear layer of ``model``, which was pretrained with ``own`` classes."""
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1][1].out_features != own:
        kind = type(model).__name__
        raise InputError(f"{kind} has no linear classifier to replace; with pretrained weights, use num_classes={own}")
    path, last = linear[-1]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Linear(last.in_features, num_classes, last.bias is not None))
    return model
