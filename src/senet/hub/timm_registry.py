"""The zoo in timm's registry: ``timm.create_model("senet_se_resnet50")``, for code that is built on timm.

The networks have the prefix ``senet_`` there: timm has its own ``senet154``, and in its names, ``/`` and ``:`` mark a
location on the Hub or on disk, and ``.`` starts a tag.
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
# timm looks up the configuration of a network under this name, in the module of its entry point.
default_cfgs: dict[str, dict[str, Any]] = {}
# Keys of a timm configuration that name a source of weights.
_SOURCES = ("source", "url", "file", "state_dict", "hf_hub_id")


def register_timm(pattern: str = "*") -> list[str]:
    """Add the zoo to timm's registry. Calling it again is harmless.

    ``timm.create_model`` then takes ``num_classes``, ``in_chans``, ``drop_rate``, ``features_only`` with
    ``out_indices`` (stages; 0 is the first), ``se``, and family-specific arguments. ``pretrained=True`` loads the
    ``"default"`` weights of ``senet.create_model``; ``"local-dir:folder"`` loads a folder of ``senet.save``, and
    ``"hf-hub:name"`` a repository of ``senet.push_to_hub``.

    Args:
        pattern: a shell pattern for our names; ``"se_*"`` skips the plain networks.

    Returns:
        the registered names: ``senet_`` followed by ours.

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
    """The preprocessing of a network in timm's terms.

    Args:
        in_chans: channels of the images.
        size: side of the images in pixels, unless ``transform`` specifies it.
        transform: the values of a ``TransformSpec``, as in the metadata of weight files.
    """
    transform = transform or {}
    size = transform.get("size", size)
    resize = transform.get("resize")
    if resize is None:  # the default of `TransformSpec`
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
    """The builder that timm calls. ``se`` may be a dict, from a ``config.json``."""
    if global_pool not in (None, "avg"):
        raise InputError(
            f"timm.create_model({PREFIX + name!r}): global_pool={global_pool!r} is not supported; "
            "call forward_features, or use features_only=True, for feature maps"
        )
    se = SEConfig.from_dict(se) if isinstance(se, dict) else se
    return create_model(name, se=se, pretrained=pretrained, **kwargs)
