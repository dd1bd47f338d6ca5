"""Loads weights of any origin into networks, and recreates networks from files that describe them."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.models.registry import ArgumentsError, NetworkConfig, list_models
from senet.nn.squeeze_excite import SEConfig
from senet.text import brief
from senet.weights.files import is_extra_state, load_weights, save_weights
from senet.weights.fit import Structure, check_gates, check_values, fit, gate_configs
from senet.weights.key_maps import OWN, PUBLISHED, Layout, recognize
from senet.weights.known import known_weights
from senet.weights.metadata import check_metadata
from senet.weights.prefixes import network_part
from senet.weights.sources import find_weights

__all__ = [
    "build_from_checkpoint",
    "described_network",
    "load_pretrained",
    "load_weights",
    "save_weights",
]


def load_pretrained(model: nn.Module, source: str | os.PathLike[str]) -> None:
    """Load weights of any origin into ``model``. Keys of other libraries are renamed.

    The weights of a plain network load into its SE twin if the gates are identity-initialized: the output is then that
    of the plain network, and the gates keep their initial values. If the number of classes differs, the classifier is
    newly initialized, with a warning. ``docs/weights.md`` lists the sources, the layouts, and their key maps.

    Args:
        model: the network, in place; for ``"default"``, it must come from ``create_model``.
        source: see ``senet.weights.sources.find_weights``; or ``"default"``, see ``senet.weights.known``.

    Raises:
        InputError: the source is not available, the file is not a weight file, or its weights do not fit the network:
            keys, shapes, dtypes, or values that are not finite, or a network with gates or strides that compute a
            different function.
    """
    if source == "default":
        config = getattr(model, "network_config", None)
        if not isinstance(config, NetworkConfig):
            raise InputError("load_pretrained: 'default' is for networks made by senet.create_model; name the weights")
        source = known_weights(config).source
    found = find_weights(source)
    state, metadata = load_weights(found.path)
    state = network_part(state, model.state_dict().keys(), found.label)
    layout = recognize(state)
    if layout is OWN and found.published:
        layout = PUBLISHED
    try:
        state = layout.convert(state)
    except InputError as error:
        raise InputError(f"{found.label}: {error}") from error
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:  # such as a matrix instead of a kernel
        message = f"{found.label}: has keys of {layout.name!r}, but its tensors do not have that layout ({error})"
        raise InputError(" ".join(message.split())) from error
    fitted = fit(state, model, found.label)
    _check_function(state, metadata, layout, model, found.label)
    model.load_state_dict(fitted)


def _check_function(
    state: dict[str, Tensor], metadata: dict[str, Any], layout: Layout, model: nn.Module, label: str
) -> None:
    """Reject weights that fit by name and shape, but were trained in a network that computes a different function."""
    if layout is not OWN:
        if any(key.endswith(".se.fc1.weight") for key in state):
            # in all other layouts, the gates are the paper's
            check_gates(dict.fromkeys(gate_configs(model), SEConfig()), model, label)
        Structure.of_layout(layout).check(model, label)
    elif metadata.get("model") in list_models():
        _, theirs = described_network(metadata, label)
        check_gates(gate_configs(theirs), model, label)
        Structure.of(theirs).check(model, label)


def described_network(
    metadata: dict[str, Any], label: object, state: dict[str, Any] | None = None
) -> tuple[NetworkConfig, nn.Module]:
    """The network that metadata describe: its configuration, and the network itself on the ``meta`` device.

    Args:
        metadata: the metadata of a weight file.
        label: the name of the file in messages.
        state: the weights of the file, whose shapes must match the description, so that a damaged file cannot cause a
            huge allocation; None to skip this check.

    Raises:
        InputError: the metadata do not describe a network, are damaged, or do not match the weights.
    """
    check_metadata(metadata, label)
    try:
        config = NetworkConfig.from_dict(metadata)
        if "checkpoint_path" in config.kwargs:  # timm would load another file, which a weight file must not choose
            raise InputError("kwargs.checkpoint_path is not allowed in a weight file")
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = config.create()
    except InputError as error:
        damaged = "its metadata are damaged: kwargs: " if isinstance(error, ArgumentsError) else ""
        raise InputError(f"{label}: {damaged}{error}") from error
    except Exception as error:  # on arbitrary JSON values, a builder can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        made_of = f"{metadata['model']!r} with kwargs {brief(metadata.get('kwargs', {}))}"
        raise InputError(f"{label}: its metadata are damaged: {made_of} cannot be created ({reason})") from error
    if state is not None:
        _check_described(state, model, config.model, label)
    return config, model


def _check_described(state: dict[str, Any], model: nn.Module, name: str, label: object) -> None:
    own, there = (
        {key: tuple(value.shape) for key, value in each.items() if not is_extra_state(key)}
        for each in (model.state_dict(), state)
    )
    for key in [*own, *there]:
        if own.get(key) != there.get(key):
            weights, wanted = there.get(key, "missing"), own.get(key, "missing")
            raise InputError(
                f"{label}: its weights do not match {name!r} as described by its metadata: {key!r} is {weights} in "
                f"the file and {wanted} in that network"
            )


def build_from_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a file of ``save_weights``, in evaluation mode, and the metadata of the file.

    Raises:
        InputError: the file is damaged or was not written by ``save_weights``, or its weights do not match the network
            that it names, or are not finite.
    """
    state, metadata = load_weights(path)
    if "model" not in metadata:
        raise InputError(f"{path}: does not say which network it contains; use a checkpoint written by `senet train`")
    config, shapes = described_network(metadata, path, state)
    tensors = {key: value for key, value in state.items() if not is_extra_state(key)}
    check_values(tensors, shapes.state_dict(), path)
    model = config.create()
    model.load_state_dict(tensors | {key: state[key] for key in model.state_dict() if key in state})
    return model.eval(), metadata
