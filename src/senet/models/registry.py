"""The registry: one builder makes a plain network and its SE twin; names lead to them."""

import fnmatch
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from senet.errors import InputError
from senet.models.elsewhere import ATTACHED, builder_of, is_elsewhere
from senet.nn.attachment import attach_described
from senet.nn.constant_gate import replace_described
from senet.nn.squeeze_excite import SEConfig
from senet.text import brief, did_you_mean, first_line

# Every family registers itself when imported; a new file is added here.
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
    """The family's own arguments of a network are not what its builder takes."""


@dataclass(frozen=True)
class ModelSpec:
    """What the registry knows of a network.

    Attributes:
        name: the registered name.
        build: makes it; takes ``num_classes``, ``in_chans``, ``se`` and the family's own arguments.
        se: the SE configuration that the name stands for; None for a plain network.
        twin: the name of the SE form of a plain network, of the plain form of an SE network.
        family: the group it belongs to, ``"resnet"`` say.
        input_size: the side, in pixels, of the images it was designed for; any other works from ``min_size`` on.
        stride: in words, which convolution of a block has the stride.
        recipe: the name of the training recipe to take when none is given.
        min_size: the smallest side, in pixels, that its poolings and unpadded convolutions leave a map of.
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
    """The arguments of ``create_model`` that make a network again, as ``create_model`` leaves them on each network.

    Attributes:
        model: the registered name.
        num_classes, in_chans, se: as in ``create_model``; ``se`` is the configuration itself, not ``"from name"``.
        kwargs: the family's own arguments.
        attached: what ``senet.attach`` has put in, see ``senet.nn.attachment.described``; None is nothing.
        folded: what ``senet.fold`` has taken out, see ``senet.nn.constant_gate.replace_described``; None is nothing.
    """

    model: str
    num_classes: int = 1000
    in_chans: int = 3
    se: SEConfig | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    attached: dict[str, Any] | None = None
    folded: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``NetworkConfig.from_dict`` takes them back."""
        se = None if self.se is None else self.se.to_dict()
        return {**vars(self), "se": se, "kwargs": dict(self.kwargs)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NetworkConfig":
        """The configuration in ``values``, the metadata of a weight file say; other entries do not matter.

        Raises:
            InputError: ``values`` name no network.
        """
        if "model" not in values:
            raise InputError("nothing says which network it is; use senet.create_model(name, pretrained=…)")
        own = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**own | {"se": None if own.get("se") is None else SEConfig.from_dict(own["se"])})

    def changed(self, **changes: Any) -> "NetworkConfig":
        """The same network with other arguments of ``create_model``."""
        own = {key: value for key, value in changes.items() if key in ("num_classes", "in_chans", "se")}
        others = {key: value for key, value in changes.items() if key not in own}
        return replace(self, **own, kwargs=self.kwargs | others)

    def create(self, pretrained: str | None = None) -> nn.Module:
        """The network; see ``create_model``."""
        if self.attached is None and self.folded is None:
            return create_model(self.model, self.num_classes, self.in_chans, self.se, pretrained, **self.kwargs)
        model: Any = create_model(self.model, self.num_classes, self.in_chans, self.se, **self.kwargs)
        if self.attached is not None:
            attach_described(model, self.attached)
        if self.folded is not None:
            replace_described(model, self.folded)
            model.network_config = self
        if pretrained is not None:  # the gates' weights too
            _load_pretrained(model, pretrained)
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
    """Register a network and its SE twin, made by the same code.

    Args:
        name: of the plain network.
        build: called as ``build(num_classes=…, in_chans=…, se=…, **kwargs)``; ``se=None`` asks for the plain network.
        se: the twin's configuration; None is the paper's block.
        se_name: the twin's name; None is ``se_`` before ``name``.
        family, input_size, stride, recipe, min_size: see ``ModelSpec``.

    Raises:
        InputError: one of the two names is taken.
    """
    se_name = se_name or f"se_{name}"
    config = se if se is not None else SEConfig()
    for own, twin, own_se in ((name, se_name, None), (se_name, name, config)):
        if own in _SPECS:
            raise InputError(f"register_model: {own!r} is registered already; choose another name")
        _SPECS[own] = ModelSpec(own, build, own_se, twin, family, input_size, stride, recipe, min_size)


def _specs() -> dict[str, ModelSpec]:
    for module in FAMILIES:
        importlib.import_module(module)
    return _SPECS


def list_models(pattern: str = "*") -> list[str]:
    """The registered names that match a shell pattern, ``"se_*"`` say; each network stands beside its twin."""
    return fnmatch.filter(_specs(), pattern)


def model_spec(name: str) -> ModelSpec:
    """The registry's entry for ``name``; an unknown name raises ``InputError`` that suggests the nearest.

    ``torchvision:NAME`` and ``timm:NAME`` are networks of those libraries. ``NAME+se`` is any plain network with gates
    attached, as ``senet train --attach`` makes it; it is the twin of those that have no other.
    """
    if name.endswith(ATTACHED):
        plain = model_spec(name.removesuffix(ATTACHED))
        if plain.se is not None:
            raise InputError(f"{plain.name!r} has SE already; attach to a plain network, {plain.twin!r} say")
        return replace(plain, name=name, twin=plain.name, se=SEConfig(identity_init=True))
    if is_elsewhere(name):
        build, size = builder_of(name)
        return ModelSpec(name, build, None, name + ATTACHED, name.partition(":")[0], size, "—", "imagenet")
    specs = _specs()
    if name in specs:
        return specs[name]
    raise InputError(f"there is no model {name!r}; {did_you_mean(name, specs, 'see `senet list`', count=3)}")


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    se: SEConfig | Literal["from name"] | None = "from name",
    pretrained: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A network of the zoo, initialised as He et al. do or from a file.

    Two networks made under the same seed share the initial values of all parameters that they share, so a network and
    its SE twin start alike.

    Args:
        name: a registered name; ``se_resnet50``, say. ``list_models`` gives all.
        num_classes: outputs of the classifier; 0 gives pooled features (N, num_features).
        in_chans: channels of the input images.
        se: another SE configuration than the name's; None is the plain network.
        pretrained: weights to start from: a file, ``timm:NAME``, ``hf:OWNER/REPO``, ``torchvision:WEIGHTS``,
            ``https://…#sha256=…``, or ``"default"``, those known for this network. See
            ``senet.models.weights.load_pretrained``.
        **kwargs: the family's own arguments, ``features_only=True`` or ``drop_rate=0.2`` say.

    Raises:
        InputError: no such name, an argument that the network does not take, or weights that cannot be had or are not
            this network's.
    """
    spec = model_spec(name)
    if name.endswith(ATTACHED):
        raise InputError(f"create_model: make {spec.twin!r}, then senet.attach(model)")
    config = spec.se if se == "from name" else se
    if config is not None and not isinstance(config, SEConfig):
        raise InputError(f"create_model: se={config!r} is not allowed; it must be an SEConfig or None")
    arguments = dict(kwargs)
    if is_elsewhere(name) and pretrained == "default":
        kwargs, pretrained = kwargs | {"pretrained": True}, None  # its own library knows where they are
    seed = int(torch.randint(2**62, (), device="cpu"))
    # The twins' constructors draw different amounts; outside, the generator moves by one draw for both.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model: Any = spec.build(num_classes=num_classes, in_chans=in_chans, se=config, **kwargs)
        except TypeError as error:
            if not arguments:  # then the builder is to blame
                raise
            given = ", ".join(f"{key}={brief(value)}" for key, value in arguments.items())
            raise ArgumentsError(f"create_model: {name!r} does not take {given}: {first_line(error)}") from error
    # Not a tensor and not a module: it has no key, and goes with copies and pickles.
    model.network_config = NetworkConfig(name, num_classes, in_chans, config, arguments)
    if pretrained is not None:
        _load_pretrained(model, pretrained)
    return model


def _load_pretrained(model: nn.Module, source: str) -> None:
    from senet.models.weights import load_pretrained  # which needs the registry itself

    load_pretrained(model, source)
