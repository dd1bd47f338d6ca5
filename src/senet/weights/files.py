"""Weight files: safetensors, Caffe, and PyTorch files of plain tensors. Nothing here ever unpickles code."""

import json
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from senet._version import __version__
from senet.errors import InputError
from senet.system.atomic import write_atomically
from senet.text import first_line
from senet.weights.caffe import read_caffemodel
from senet.weights.metadata import read_metadata

_LOG = logging.getLogger("senet.weights")
_KEY = "senet"  # safetensors metadata maps strings to strings: ours is a JSON string under this key
_EXTRA_KEY = "senet.extra_state"  # the JSON string with the modules' extra states
_EXTRA_STATE = "_extra_state"  # last component of the key of an extra state, see nn.Module.get_extra_state
_DEPTH = 4  # how deep state dicts are searched for in nested dictionaries
# Preference among several state dicts in a file. Averaged ones come before all others.
_NAMES = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights", "")
_AVERAGED = {"ema", "swa", "averaged", "average", "avg", "shadow"}


def save_weights(
    path: str | os.PathLike[str], model: nn.Module | dict[str, Any], metadata: dict[str, Any] | None = None
) -> None:
    """Save the state of a network as safetensors, atomically.

    Args:
        path: the file, ``….safetensors``.
        model: a module or its state dict. Extra states of modules are saved if they are tensors or JSON values.
        metadata: JSON values; ``build_from_checkpoint`` needs ``model``, ``num_classes``, ``in_chans``, and ``se``.

    Raises:
        InputError: the network is on the ``meta`` device, or safetensors cannot store a value or the metadata.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
        raise InputError(f"{path}: nothing to save, the network is on the 'meta' device; load weights into it first")
    extra = {key: value for key, value in state.items() if is_extra_state(key) and not isinstance(value, Tensor)}
    # clone: safetensors rejects tensors that share memory
    tensors = {
        key: _plain(value, key, path).cpu().contiguous().clone() for key, value in state.items() if key not in extra
    }
    try:
        texts = {_KEY: json.dumps((metadata or {}) | {"senet_version": __version__})}
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: metadata must be JSON values: {error}") from error
    if extra:
        texts[_EXTRA_KEY] = json.dumps({key: _json_value(value, key, path) for key, value in extra.items()})
    try:
        content = serialize(tensors, metadata=texts)
    except Exception as error:  # safetensors raises several kinds for unsupported dtypes
        raise InputError(f"{path}: safetensors cannot store these weights ({_reason(error)})") from error
    write_atomically(path, content)


def is_extra_state(key: str) -> bool:
    """Whether a key belongs to the extra state of a module."""
    return key.rpartition(".")[2] == _EXTRA_STATE


def _json_value(value: Any, key: str, path: object) -> Any:
    """A module's extra state, if it survives a round trip through JSON."""
    try:
        same = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise InputError(
            f"{path}: {key!r}, a module's extra state, is neither a tensor nor JSON values, and safetensors cannot "
            "store it; save the network without it, or have get_extra_state return one of these"
        )
    return value


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a weight file: safetensors, a ``.caffemodel``, or a PyTorch file of plain tensors (``weights_only``).

    Keys are those of the file; Caffe blobs are named by layer and index. For a training checkpoint, it is the state
    dict of the network. If there is an averaged one as well (such as ``state_dict_ema``), it is used, with a warning.

    Returns:
        the state dict (tensors and extra states of modules), and the metadata, which are empty for a file that was not
        written by ``save_weights``.

    Raises:
        InputError: the file does not exist, is damaged or not a weight file, would run code when unpickled, or
            contains a tensor without plain values (sparse, quantized, distributed, …).
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file in it, or use senet.from_pretrained if senet.save wrote it")
    if not path.is_file():
        raise InputError(f"{path}: there is no such weight file")
    if path.suffix == ".caffemodel":
        return dict(read_caffemodel(path)), {}
    if path.stat().st_size == 0:
        raise InputError(f"{path}: not a readable weight file, it is empty; save or download it again")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _state_of(_read_pytorch(path), path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        extra = json.loads(texts.get(_EXTRA_KEY, "{}"))
    except Exception as error:  # from safetensors, the operating system, or JSON
        reason = _reason(error)
        raise InputError(f"{path}: not a readable safetensors file ({reason}); save it again") from error
    if not isinstance(extra, dict):
        raise InputError(f"{path}: its metadata are damaged: {_EXTRA_KEY} is not a JSON object; save it again")
    return state | extra, read_metadata(texts.get(_KEY, "{}"), path)


def _read_pytorch(path: Path) -> Any:
    try:
        _check_claims(path)
        with warnings.catch_warnings():
            # these address developers of PyTorch; unreadable or unusable content is an error
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) (\S+)", str(error))
        what = f" ({found[1][:80]})" if found else ""
        raise InputError(
            f"{path}: rejected because it is damaged or contains more than tensors{what} and loading it could run "
            "code; if you trust it, load it with PyTorch and save only its state_dict, or convert it to safetensors"
        ) from error
    except Exception as error:  # on bytes that are not a pickle, the unpickler can raise anything
        raise InputError(f"{path}: not a readable PyTorch weight file ({_reason(error)})") from error


def _check_claims(path: Path) -> None:
    """Reject an archive whose members claim more bytes than the file has: PyTorch does not compress."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(part.file_size for part in archive.infolist())
        if claimed > path.stat().st_size:
            raise InputError(
                f"{path}: its members claim {claimed:,} bytes, the file has {path.stat().st_size:,}; download it again"
            )


def _state_of(content: Any, path: Path) -> dict[str, Any]:
    """The state dict of the network in the content of a PyTorch file."""
    found = dict(_state_dicts(content))
    if not found:
        raise InputError(f"{path}: contains no state dict; save `model.state_dict()`")
    name = _chosen(found, path)
    state = {key: value for key, value in found[name].items() if isinstance(value, Tensor) or is_extra_state(key)}
    size = path.stat().st_size
    return {key: _plain(v, key, path, size) if isinstance(v, Tensor) else v for key, v in state.items()}


def _state_dicts(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary that could be the state of a network, with its dotted path. Optimizer states are skipped."""
    if not isinstance(content, dict) or "param_groups" in content:
        return
    values = [value for value in content.values() if isinstance(value, Tensor)]
    texts = all(isinstance(key, str) for key in content)
    # scalars are counters and metrics
    if texts and any(value.is_nested or value.dim() > 0 for value in values):
        yield name, content
    for key, value in content.items() if depth < _DEPTH else ():
        if isinstance(key, str) and not is_extra_state(key) and not key.startswith("optim"):
            yield from _state_dicts(value, f"{name}.{key}" if name else key, depth + 1)


def is_averaged(name: str) -> bool:
    """Whether the name of a dictionary or module means averaged weights: ``state_dict_ema``, ``ema_model``, …"""
    return not _AVERAGED.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _chosen(found: Mapping[str, Mapping[str, Any]], path: Path) -> str:
    """The name of the state dict to load."""
    largest = max(map(len, found.values()))
    large = [name for name, state in found.items() if 2 * len(state) >= largest]
    averaged = [name for name in large if is_averaged(name)]
    ranked = sorted(
        averaged or [name for name in found if name in large or (name and _rank(name) < _UNKNOWN)], key=_rank
    )
    if len(ranked) > 1 and _rank(ranked[0]) == _rank(ranked[1]):
        raise InputError(f"{path}: contains several state dicts ({', '.join(ranked[:6])}); save the one that you mean")
    others = [name or "the top level" for name in large if name != ranked[0]]
    if averaged and others:
        _LOG.warning("%s: loaded the averaged weights, %r, and ignored %s", path, ranked[0], ", ".join(others))
    return ranked[0]


def _rank(name: str) -> tuple[int, int]:
    """Sort key: known names first, outer before inner."""
    word = name.rpartition(".")[2]
    return (_NAMES.index(word) if word in _NAMES else len(_NAMES), name.count("."))


_UNKNOWN = (len(_NAMES), 0)


def _plain(value: Any, key: str, path: object, size: int | None = None) -> Tensor:
    """``value`` if it is an ordinary, dense tensor; its bytes are bounded by ``size``, the size of the file."""
    if not isinstance(value, Tensor):
        raise InputError(f"{path}: {key!r} is not a tensor but a {type(value).__name__}")
    kind = None
    if value.is_meta:
        kind = "tensor on the 'meta' device, which has no values"
    elif type(value) not in (Tensor, nn.Parameter):
        kind = type(value).__name__
    elif value.is_nested:
        kind = "nested tensor"
    elif value.layout is not torch.strided:
        kind = "sparse tensor"
    elif value.is_quantized:
        kind = "quantized tensor"
    if kind is not None:
        raise InputError(f"{path}: {key!r} is a {kind}; save it as an ordinary, dense tensor")
    if size is not None and value.nbytes > max(size, value.untyped_storage().nbytes()):
        raise InputError(f"{path}: {key!r} claims {value.nbytes:,} bytes, the file has {size:,}; download it again")
    return value.detach()


def _reason(error: Exception) -> str:
    return first_line(error).partition(". ")[0]
