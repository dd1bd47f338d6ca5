"""Weights into networks: found, recognized, made to fit; and networks from files that say how they are made."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.files import write_atomically
from senet.models.fitting import Structure, check_gates, check_values, fit, gate_configs
from senet.models.known_weights import known_weights
from senet.models.layouts import OWN, PUBLISHED, Layout, recognise
from senet.models.prefixes import network_part
from senet.models.registry import ArgumentsError, NetworkConfig, list_models
from senet.models.weight_files import is_extra_state, load_weights, save_weights
from senet.models.weight_metadata import check_metadata
from senet.models.weight_sources import find_weights
from senet.nn.squeeze_excite import SEConfig
from senet.text import brief

__all__ = [
    "build_from_checkpoint",
    "described_network",
    "load_pretrained",
    "load_weights",
    "save_weights",
    "write_atomically",
]


def load_pretrained(model: nn.Module, source: str | os.PathLike[str]) -> None:
    """Load weights of any origin into ``model``: found, recognised, renamed, and made to fit.

    A plain network's weights load into its SE twin when the gates are identity-initialised: the output is then the
    plain network's, and the gates keep their initial values. The classifier starts anew, with a warning, where the
    number of classes differs. ``docs/weights.md`` has the sources, the layouts and their key maps.

    Args:
        model: made by ``create_model``, if ``source`` is ``"default"``.
        source: see ``senet.models.weight_sources.find_weights``; or ``"default"``, see ``senet.models.known_weights``.

    Raises:
        InputError: the source is not to be had, the file is no weight file, or its weights are not this network's:
            keys, shapes, types, values that are not finite, or what the gates or the strides of the network that they
            were trained in compute.
    """
    if source == "default":
        config = getattr(model, "network_config", None)
        if not isinstance(config, NetworkConfig):
            raise InputError("load_pretrained: 'default' is for networks made by senet.create_model; name the weights")
        source = known_weights(config).source
    found = find_weights(source)
    state, metadata = load_weights(found.path)
    state = network_part(state, model.state_dict().keys(), found.label)
    layout = recognise(state)
    if layout is OWN and found.published:
        layout = PUBLISHED
    try:
        state = layout.convert(state)
    except InputError as error:
        raise InputError(f"{found.label}: {error}") from error
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:  # a matrix where it has a map, say
        message = f"{found.label}: has keys of {layout.name!r}, and tensors that are not of that layout ({error})"
        raise InputError(" ".join(message.split())) from error
    fitted = fit(state, model, found.label)
    _check_function(state, metadata, layout, model, found.label)
    model.load_state_dict(fitted)


def _check_function(
    state: dict[str, Tensor], metadata: dict[str, Any], layout: Layout, model: nn.Module, label: str
) -> None:
    """Refuse weights that fit in name and shape and were trained in a network that computes something else."""
    if layout is not OWN:
        if any(key.endswith(".se.fc1.weight") for key in state):
            # nobody else's gates are anything but the paper's
            check_gates(dict.fromkeys(gate_configs(model), SEConfig()), model, label)
        Structure.of_layout(layout).check(model, label)
    elif metadata.get("model") in list_models():
        _, theirs = described_network(metadata, label)
        check_gates(gate_configs(theirs), model, label)
        Structure.of(theirs).check(model, label)


def described_network(
    metadata: dict[str, Any], label: object, state: dict[str, Any] | None = None
) -> tuple[NetworkConfig, nn.Module]:
    """How to create the network that metadata describe, and its shapes: it is made on the ``meta`` device.

    Args:
        metadata: of a weight file.
        label: what messages call the file.
        state: the file's weights, which must be those of the network, so that no size is believed that the file does
            not have; None if only the description is wanted.

    Raises:
        InputError: the metadata describe none, or are damaged, or describe another than that of the weights.
    """
    check_metadata(metadata, label)
    try:
        config = NetworkConfig.from_dict(metadata)
        if "checkpoint_path" in config.kwargs:  # of timm: another file, which this one has no business to name
            raise InputError("kwargs.checkpoint_path is not allowed in a weight file")
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = config.create()
    except InputError as error:
        damaged = "its metadata are damaged: kwargs: " if isinstance(error, ArgumentsError) else ""
        raise InputError(f"{label}: {damaged}{error}") from error
    except Exception as error:  # a builder given any JSON values whatever can end in anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        made_of = f"{metadata['model']!r} with kwargs {brief(metadata.get('kwargs', {}))}"
        raise InputError(f"{label}: its metadata are damaged: {made_of} cannot be made ({reason})") from error
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
            weights, wanted = there.get(key, "missing"), own.get(key, "not there")
            raise InputError(
                f"{label}: its weights are not those of {name!r} as its metadata describe it: {key!r} is {weights} in "
                f"the file and {wanted} in that network"
            )


def build_from_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a file of ``save_weights`` holds, in evaluation mode, and the file's metadata.

    Raises:
        InputError: the file is damaged, or of another kind; its weights are not those of the network that it names, or
            not finite.
    """
    state, metadata = load_weights(path)
    if "model" not in metadata:
        raise InputError(f"{path}: does not say which network it holds; use a checkpoint written by `senet train`")
    config, shapes = described_network(metadata, path, state)
    tensors = {key: value for key, value in state.items() if not is_extra_state(key)}
    check_values(tensors, shapes.state_dict(), path)
    model = config.create()
    model.load_state_dict(tensors | {key: state[key] for key in model.state_dict() if key in state})
    return model.eval(), metadata
