"""Weights on disk: safetensors with the metadata that rebuilds the network. Nothing here unpickles code, ever."""

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from senet._version import __version__
from senet.errors import InputError
from senet.files import write_atomically
from senet.models.caffe import read_caffemodel
from senet.models.fitting import Structure, check_gates, fit, gate_configs
from senet.models.known_weights import known_weights
from senet.models.layouts import OWN, PUBLISHED, Layout, recognise
from senet.models.registry import NetworkConfig, list_models
from senet.models.weight_sources import find_weights
from senet.nn.squeeze_excite import SEConfig

_KEY = "senet"  # safetensors metadata maps strings to strings: ours is one JSON text under this key


def save_weights(
    path: str | os.PathLike[str], model: nn.Module | dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Save a network's state as safetensors, atomically.

    Args:
        path: the file, ``….safetensors``.
        model: a module or its state dict.
        metadata: JSON values; ``build_from_checkpoint`` needs ``model``, ``num_classes``, ``in_chans`` and ``se``.

    Raises:
        InputError: the network is on the ``meta`` device.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if any(value.is_meta for value in state.values()):
        raise InputError(
            f"{path}: there is nothing to save, the network is on the 'meta' device; give it weights first"
        )
    # clone: safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    text = json.dumps((metadata or {}) | {"senet_version": __version__})
    write_atomically(path, serialise(tensors, metadata={_KEY: text}))


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weight file: safetensors, a ``.caffemodel``, or a PyTorch file of plain tensors (``weights_only``).

    Keys are the file's own; Caffe's blobs are named by layer and number.

    Returns:
        the state dict, and the metadata; empty for a file that was not written by ``save_weights``.

    Raises:
        InputError: no such file, not a weight file, a damaged one, or one that would run code when unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such weight file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}); save it again") from error
        if not isinstance(metadata, dict):
            raise InputError(f"{path}: its metadata are damaged; save it again")
        return state, metadata
    if path.suffix == ".caffemodel":
        return read_caffemodel(path), {}
    try:
        with warnings.catch_warnings():
            # a note on the pickle protocol, for PyTorch's developers: what cannot be read is an error below
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, since it holds more than tensors and loading it could run code; "
            "convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # bytes that are no pickle can make the unpickler say anything: KeyError of a text
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable PyTorch weight file ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise InputError(f"{path}: holds no state dict; save `model.state_dict()`")
    return content, {}


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
            keys, shapes, or what the gates or the strides of the network that they were trained in compute.
    """
    if source == "default":
        config = getattr(model, "network_config", None)
        if not isinstance(config, NetworkConfig):
            raise InputError("load_pretrained: 'default' is for networks made by senet.create_model; name the weights")
        source = known_weights(config).source
    found = find_weights(source)
    state, metadata = load_weights(found.path)
    state = _unwrapped(state)
    layout = recognise(state)
    if layout is OWN and found.published:
        layout = PUBLISHED
    try:
        state = layout.convert(state)
    except InputError as error:
        raise InputError(f"{found.label}: {error}") from error
    fitted = fit(state, model, found.label)
    _check_function(state, metadata, layout, model, found.label)
    model.load_state_dict(fitted)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the ``module.`` of ``DataParallel`` and the ``_orig_mod.`` of ``torch.compile``."""
    for wrapper in ("_orig_mod.", "module.", "_orig_mod."):  # each may be within the other
        if state and all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


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


def described_network(metadata: dict[str, Any], label: object) -> tuple[NetworkConfig, nn.Module]:
    """How to create the network that metadata describe, and its shapes: it is made on the ``meta`` device.

    Args:
        metadata: of a weight file.
        label: what messages call the file.

    Raises:
        InputError: the metadata describe none, or are damaged.
    """
    try:
        config = NetworkConfig.from_dict(metadata, label)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return config, config.create()
    except (TypeError, AttributeError) as error:  # a number where a dict was expected, say
        raise InputError(f"{label}: its metadata are damaged ({error}); save it again") from error


def build_from_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a file of ``save_weights`` holds, in evaluation mode, and the file's metadata."""
    state, metadata = load_weights(path)
    if "model" not in metadata:
        raise InputError(f"{path}: does not say which network it holds; use a checkpoint written by `senet train`")
    config, _ = described_network(metadata, path)
    model = config.create()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: its weights are not those of {metadata['model']!r}, which it names") from error
    return model.eval(), metadata
