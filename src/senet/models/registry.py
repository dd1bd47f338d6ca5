"""The registry: maps names to networks. One builder makes a plain network and its SE twin."""

import fnmatch
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from senet.errors import InputError
from senet.models.external import ATTACHED, builder_of, is_elsewhere
from senet.nn.attachment import attach_described
from senet.nn.constant_gate import replace_described
from senet.nn.squeeze_excite import SEConfig
from senet.text import brief, did_you_mean, first_line

# Each family registers itself on import. Add new files here.
FAMILIES = (
    "senet.models.resnet",
    "senet.models.vgg",
    "senet.models.inception",
    "senet.models.inception_resnet",
    "senet.models.cifar",
    "senet.models.mobile",
    "senet.models.shake",
)

Build = Callable[..., nn.Module]


class ArgumentsError(InputError):
    """The builder does not accept the family-specific arguments."""


@dataclass(frozen=True)
class ModelSpec:
    """The registry's entry for a network.

    Attributes:
        name: the registered name.
        build: the builder; takes ``num_classes``, ``in_chans``, ``se``, and family-specific arguments.
        se: the SE configuration that the name implies; None for a plain network.
        twin: the name of the twin: the SE network of a plain one, the plain network of one with SE.
        family: the group it belongs to, such as ``"resnet"``.
        input_size: the side of the images it was designed for, in pixels. Any size from ``min_size`` works.
        stride: describes which convolution of a block has the stride.
        recipe: the name of the default training recipe.
        min_size: the smallest input side, in pixels, for which no feature map becomes empty.
    """

    name: str
    build: Build
    se: SEConfig | None
    twin: str
    family: str
    input_size: int
    stride: str
    recipe: str
    min_size: int = 1


@dataclass(frozen=True)
class NetworkConfig:
    """The arguments of ``create_model`` that recreate a network. ``create_model`` stores them on the network.

    Attributes:
        model: the registered name.
        num_classes, in_chans, se: as in ``create_model``; ``se`` is the configuration itself, not ``"from name"``.
        kwargs: family-specific arguments.
        attached: the gates added by ``senet.attach``, see ``senet.nn.attachment.described``; None if there are none.
        folded: the gates removed by ``senet.fold``, see ``senet.nn.constant_gate.replace_described``; None if none.
    """

    model: str
    num_classes: int = 1000
    in_chans: int = 3
    se: SEConfig | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    attached: dict[str, Any] | None = None
    folded: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the inverse of ``NetworkConfig.from_dict``."""
        se = None if self.se is None else self.se.to_dict()
        return {**vars(self), "se": se, "kwargs": dict(self.kwargs)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NetworkConfig":
        """The configuration in ``values``, such as the metadata of a weight file. Other entries are ignored.

        Raises:
            InputError: ``values`` does not name a network.
        """
        if "model" not in values:
            raise InputError("does not say which network it is; use senet.create_model(name, pretrained=…)")
        own = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**own | {"se": None if own.get("se") is None else SEConfig.from_dict(own["se"])})

    def changed(self, **changes: Any) -> "NetworkConfig":
        """The same network with some arguments of ``create_model`` changed."""
        own = {key: value for key, value in changes.items() if key in ("num_classes", "in_chans", "se")}
        others = {key: value for key, value in changes.items() if key not in own}
        return replace(self, **own, kwargs=self.kwargs | others)

    def create(self) -> nn.Module:
        """The network, with newly initialized weights."""
        model: Any = build_model(self.model, self.num_classes, self.in_chans, self.se, **self.kwargs)
        if self.attached is not None:
            attach_described(model, self.attached)
        if self.folded is not None:
            replace_described(model, self.folded)
            model.network_config = self
        return model


_SPECS: dict[str, ModelSpec] = {}


def register_model(
    name: str,
    build: Build,
    *,
    se: SEConfig | None = None,
    se_name: str | None = None,
    family: str = "custom",
    input_size: int = 224,
    stride: str = "—",
    recipe: str = "imagenet",
    min_size: int = 1,
) -> None:
    """Register a network and its SE twin, both made by the same builder.

    Args:
        name: the name of the plain network.
        build: called as ``build(num_classes=…, in_chans=…, se=…, **kwargs)``; ``se=None`` requests the plain network.
        se: the SE configuration of the twin; the default is the paper's block.
        se_name: the name of the twin; the default is ``se_`` followed by ``name``.
        family, input_size, stride, recipe, min_size: see ``ModelSpec``.

    Raises:
        InputError: one of the two names is already registered.
    """
    se_name = se_name or f"se_{name}"
    config = se if se is not None else SEConfig()
    for own, twin, own_se in ((name, se_name, None), (se_name, name, config)):
        if own in _SPECS:
            raise InputError(f"register_model: {own!r} is already registered; choose another name")
        _SPECS[own] = ModelSpec(own, build, own_se, twin, family, input_size, stride, recipe, min_size)


def _specs() -> dict[str, ModelSpec]:
    for module in FAMILIES:
        importlib.import_module(module)
    return _SPECS


def list_models(pattern: str = "*") -> list[str]:
    """The registered names that match a shell pattern, such as ``"se_*"``. Each network is next to its twin."""
    return fnmatch.filter(_specs(), pattern)


def model_spec(name: str) -> ModelSpec:
    """The registry's entry for ``name``.

    ``torchvision:NAME`` and ``timm:NAME`` are networks of those libraries. ``NAME+se`` is a plain network with
    attached gates, as ``senet train --attach`` makes it. It is the twin of networks from other libraries.

    Raises:
        InputError: the name is unknown; the message suggests the closest one.
    """
    if name.endswith(ATTACHED):
        plain = model_spec(name.removesuffix(ATTACHED))
        if plain.se is not None:
            raise InputError(f"{plain.name!r} already has SE; attach to a plain network, such as {plain.twin!r}")
        return replace(plain, name=name, twin=plain.name, se=SEConfig(identity_init=True))
    if is_elsewhere(name):
        build, size = builder_of(name)
        return ModelSpec(name, build, None, name + ATTACHED, name.partition(":")[0], size, "—", "imagenet")
    specs = _specs()
    if name in specs:
        return specs[name]
    raise InputError(f"there is no model {name!r}; {did_you_mean(name, specs, 'see `senet list`', count=3)}")


def build_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    se: SEConfig | Literal["from name"] | None = "from name",
    **kwargs: Any,
) -> nn.Module:
    """A network with newly initialized weights. For the arguments, see ``senet.create_model``.

    Raises:
        InputError: the name is unknown, or the network does not accept an argument.
    """
    spec = model_spec(name)
    if name.endswith(ATTACHED):
        raise InputError(f"create_model: create {spec.twin!r}, then call senet.attach(model)")
    config = spec.se if se == "from name" else se
    if config is not None and not isinstance(config, SEConfig):
        raise InputError(f"create_model: se={config!r} is not allowed; it must be an SEConfig or None")
    arguments = {key: value for key, value in kwargs.items() if key != "pretrained"}
    seed = int(torch.randint(2**62, (), device="cpu"))
    # The constructors of twins draw different amounts of random numbers. Outside, both advance the generator by one.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model: Any = spec.build(num_classes=num_classes, in_chans=in_chans, se=config, **kwargs)
        except TypeError as error:
            if not arguments:  # then the error is the builder's
                raise
            given = ", ".join(f"{key}={brief(value)}" for key, value in arguments.items())
            raise ArgumentsError(f"create_model: {name!r} does not take {given}: {first_line(error)}") from error
    # A plain attribute: it has no state-dict key, and copies and pickles keep it.
    model.network_config = NetworkConfig(name, num_classes, in_chans, config, arguments)
    return model
