"""The zoo in timm's registry: ``timm.create_model("senet_se_resnet50")``, for whatever is built on timm.

timm takes a ``/`` or ``:`` in a name for a place on the Hub or on disk and what follows a ``.`` for a tag, and it has a
``senet154`` of its own: there, the networks have the zoo's names behind ``senet_``.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from senet.errors import InputError
from senet.models.registry import list_models, model_spec
from senet.nn.squeeze_excite import SEConfig
from senet.weights.create import create_model

PREFIX = "senet_"
# timm finds a network's configuration under this name in the module of its entry point.
default_cfgs: dict[str, dict[str, Any]] = {}
# Where a configuration of timm's says that weights are.
_SOURCES = ("source", "url", "file", "state_dict", "hf_hub_id")


def register_timm(pattern: str = "*") -> list[str]:
    """Add the zoo to timm's registry; gives the names that timm now has, ``senet_`` and ours.

    ``timm.create_model`` takes ``num_classes``, ``in_chans``, ``drop_rate``, ``features_only`` with ``out_indices``
    (stages; 0 is the first), ``se``, and the family's own arguments. ``pretrained=True`` stands for ``"default"`` of
    ``senet.create_model``; ``"local-dir:folder"`` loads what ``senet.save`` wrote, and ``"hf-hub:name"`` what
    ``senet.push_to_hub`` uploaded. Calling it twice does no harm.

    Args:
        pattern: a shell pattern of our names; ``"se_*"`` leaves out the plain networks.

    Raises:
        InputError: timm is not installed.
    """
    try:
        from timm.models import is_model, register_model
    except ImportError as error:
        raise InputError("register_timm: timm is not installed; pip install 'timm>=1.0.26'") from error
    names = list_models(pattern)
    for name in names:
        if not is_model(PREFIX + name):
            spec = model_spec(name)
            least = (3, spec.min_size, spec.min_size)
            feed = input_cfg(3, spec.input_size, {"augment": "cifar"} if spec.input_size == 32 else None)
            default_cfgs[PREFIX + name] = feed | {"min_input_size": least, "num_classes": 1000}
            register_model(_entry_point(name))
    return [PREFIX + name for name in names]


def input_cfg(in_chans: int, size: int, transform: dict[str, Any] | None = None) -> dict[str, Any]:
    """How images are fed to a network, in the words of timm's configurations.

    Args:
        in_chans: channels of the images.
        size: their side in pixels, where ``transform`` does not say.
        transform: the values of a ``TransformSpec``, as weight files carry them.
    """
    transform = transform or {}
    size = transform.get("size", size)
    resize = transform.get("resize")
    if resize is None:  # as `TransformSpec` reads it
        resize = size if transform.get("augment", "imagenet") != "imagenet" else round(size * 256 / 224)
    statistics = {key: transform[key] for key in ("mean", "std") if key in transform}
    interpolation = transform.get("interpolation", "bilinear")
    return {
        "input_size": (in_chans, size, size),
        "crop_pct": size / resize,
        "interpolation": interpolation,
    } | statistics


def layer_names(model: nn.Module) -> dict[str, str | None]:
    """The names of the first convolution and of the last linear layer, which timm replaces."""
    convolutions = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {"first_conv": next(convolutions, None), "classifier": linear[-1] if linear else None}


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = PREFIX + name
    entry.__doc__ = f"``{name}`` of senet."
    return entry


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    from timm.models import build_model_with_cfg

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        bare: Any = create_model(name)
    cfg, overlay = kwargs.get("pretrained_cfg"), kwargs.pop("pretrained_cfg_overlay", None) or {}
    known = (cfg if isinstance(cfg, dict) else vars(cfg) if hasattr(cfg, "__dict__") else {}) | overlay
    from_timm = any(known.get(key) for key in _SOURCES)
    return build_model_with_cfg(
        functools.partial(_create, name, "default" if pretrained and not from_timm else None),
        PREFIX + name,
        pretrained and from_timm,
        pretrained_cfg_overlay=layer_names(bare) | overlay,
        feature_cfg={"out_indices": tuple(range(len(bare.feature_info))), "feature_cls": "getter"},
        **kwargs,
    )


def _create(
    name: str, pretrained: str | None, *, global_pool: str | None = None, se: Any = "from name", **kwargs: Any
) -> nn.Module:
    """What timm calls: ``se`` may come from a ``config.json`` as plain values."""
    if global_pool not in (None, "avg"):
        raise InputError(
            f"timm.create_model({PREFIX + name!r}): global_pool={global_pool!r} is not known; "
            "call forward_features for the map, or ask for features_only=True"
        )
    se = SEConfig.from_dict(se) if isinstance(se, dict) else se
    return create_model(name, se=se, pretrained=pretrained, **kwargs)
