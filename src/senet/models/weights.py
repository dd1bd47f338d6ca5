"""Weights on disk: safetensors with the metadata that rebuilds the network. Nothing here unpickles code, ever."""

import json
import logging
import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from senet._version import __version__
from senet.errors import InputError
from senet.models.base import ConvNet
from senet.models.registry import create_model
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite

_LOG = logging.getLogger("senet.models")
_KEY = "senet"  # safetensors metadata maps strings to strings: ours is one JSON text under this key


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_weights(
    path: str | os.PathLike[str], model: nn.Module | dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Save a network's state as safetensors, atomically.

    Args:
        path: the file, ``….safetensors``.
        model: a module or its state dict.
        metadata: JSON values; ``build_from_checkpoint`` needs ``model``, ``num_classes``, ``in_chans`` and ``se``.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    # clone: safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    text = json.dumps((metadata or {}) | {"senet_version": __version__})
    write_atomically(path, serialise(tensors, metadata={_KEY: text}))


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weight file: safetensors, or a PyTorch file of plain tensors (``weights_only``).

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
                return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}); save it again") from error
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
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable PyTorch weight file ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: holds no state dict; save `model.state_dict()`")
    return content, {}


def load_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a weight file into ``model``, strictly, but for the classifier where the number of classes differs or is 0.

    A plain network's file loads into its SE twin when the gates are identity-initialised: the output is then the
    plain network's, and the gates keep their initial values.

    Raises:
        InputError: keys are missing or unexpected, or shapes differ; the message says how many and names the first.
    """
    state, _ = load_weights(path)
    own = model.state_dict()
    head = f"{getattr(model, 'head_name', ConvNet.head_name)}."
    if not any(key.startswith(head) for key in own):  # pooled features or stage maps are wanted
        state = {key: value for key, value in state.items() if not key.startswith(head)}
    anew = {k: v for k, v in own.items() if k.startswith(head) and k in state and state[k].shape != v.shape}
    if anew:
        _LOG.warning("%s has another number of classes: %s start anew", path, ", ".join(anew))
        state = state | anew
    gates = [(name, module) for name, module in model.named_modules() if isinstance(module, SqueezeExcite)]
    gate_keys = [f"{name}.{key}" for name, gate in gates for key in gate.state_dict()]
    if not any(key in state for key in gate_keys) and all(gate.config.identity_init for _, gate in gates):
        state = state | {key: own[key] for key in gate_keys}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    found = [f"{len(keys)} {what}, {keys[0]} first" for what, keys in problems.items() if keys]
    if found:
        raise InputError(f"{path}: does not fit this network: " + "; ".join(found))
    model.load_state_dict(state)


def build_from_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a file of ``save_weights`` holds, in evaluation mode, and the file's metadata."""
    state, metadata = load_weights(path)
    if "model" not in metadata:
        raise InputError(f"{path}: does not say which network it holds; use a checkpoint written by `senet train`")
    se = metadata.get("se")
    config = SEConfig.from_dict(se) if se is not None else None
    model = create_model(metadata["model"], metadata.get("num_classes", 1000), metadata.get("in_chans", 3), se=config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: its weights are not those of {metadata['model']!r}, which it names") from error
    return model.eval(), metadata
