"""Saves and loads networks: as a file, a folder with a model card, or a repository on the Hugging Face Hub.

Folders and repositories are written and read by ``PyTorchModelHubMixin`` of ``huggingface_hub``. The networks do not
inherit from it: importing a network would import it too, and it treats the arguments of a class as the configuration,
whereas a network here is defined by a registered name and an ``SEConfig``. ``senet.hub.folder`` wraps a network in the
mixin when it is saved or loaded.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from senet.errors import InputError
from senet.models.registry import NetworkConfig
from senet.nn import attachment
from senet.weights.create import create_described
from senet.weights.load import described_network, load_weights, save_weights

_ENTRIES = {"classes": list, "transform": dict, "metrics": dict, "dataset": str, "license": str}
OTHERWISE = "senet.save_weights(path, model) saves only the weights"


def save(model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> Path:
    """Save a network with its weights and configuration. ``from_pretrained`` loads it.

    A path that ends in ``.safetensors`` becomes a single file. Any other path becomes a folder with
    ``model.safetensors``, ``config.json``, which timm can read too, and a model card, ``README.md``. An existing
    ``README.md`` is kept.

    An accelerated or compiled network is saved as the ordinary network. Weights keep their dtype in the file, and are
    loaded as float32.

    Args:
        model: a network from ``create_model``, ``from_pretrained``, or ``build_from_checkpoint``.
        path: the file or folder; missing folders are created.
        metadata: JSON values to store with the weights, such as those that ``build_from_checkpoint`` returns. The card
            shows ``classes`` (names), ``transform`` (a ``TransformSpec`` as a dict: input size, mean, std),
            ``metrics`` (name: number), ``dataset``, and ``license`` (as the Hub calls them).

    Returns:
        the path.

    Raises:
        InputError: name, arguments, and ``senet.attach`` do not recreate the network (a layer was replaced), the path
            has the extension of another kind of file, or ``metadata`` contains values that JSON cannot represent.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        model, _, metadata = described(model, metadata)
        save_weights(path, model, metadata)
    elif path.is_file() or path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise InputError(f"{path}: use a path that ends in .safetensors, or a folder")
    else:
        _hub().NetworkFolder(*described(model, metadata)).save_pretrained(path, model_card_kwargs={"source": path.name})
    return path


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **changes: Any,
) -> nn.Module:
    """Load a network that ``save`` or ``push_to_hub`` wrote, in evaluation mode.

    Args:
        source: a ``.safetensors`` file, a folder, or a repository, ``"owner/name"``. Downloads are cached;
            ``HF_HUB_OFFLINE=1`` uses only the cache.
        revision: branch, tag, or commit of the repository.
        token, cache_dir, local_files_only: as in ``huggingface_hub``.
        **changes: arguments of ``create_model`` that replace the saved ones: ``num_classes=5`` for a new classifier,
            ``features_only=True`` for a backbone.

    Raises:
        InputError: the file, folder, or repository does not exist or contains no network of this package, or the
            weights do not fit the changed network.
    """
    if "pretrained" in changes:
        raise InputError("from_pretrained: the weights come from the source; senet.create_model takes pretrained=…")
    source = Path(source) if Path(source).exists() else os.fspath(source).removeprefix("hf:")
    if str(source).endswith(".safetensors"):
        state, metadata = load_weights(source)
        config, _ = described_network(metadata, source, state)
        return create_described(config.changed(**changes), str(source)).eval()
    hub = _hub()
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        with hub.one_line(f"{source}: there is no such folder, and it cannot be loaded from the Hub"):
            return hub.NetworkFolder.from_pretrained(source, **options, **changes).network
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError, RecursionError) as error:  # from the mixin, on unexpected JSON
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: its config.json does not describe a network ({reason}); save it again") from error


def push_to_hub(model: nn.Module, repo_id: str, metadata: dict[str, Any] | None = None, **options: Any) -> str:
    """Upload a network, its configuration, and its model card to the Hugging Face Hub in one commit.

    Args:
        model, metadata: as in ``save``.
        repo_id: the repository, ``"owner/name"``; created if it does not exist.
        **options: options of ``PyTorchModelHubMixin.push_to_hub``: ``private``, ``token``, ``branch``, ``create_pr``,
            ``commit_message``, ``ignore_patterns`` (``"README.md"`` keeps a card that was edited on the Hub).

    Returns:
        the URL of the commit.

    Raises:
        InputError: as in ``save``, or the Hub rejects the upload, for example because there is no token.
    """
    hub = _hub()
    folder = hub.NetworkFolder(*described(model, metadata))
    with hub.one_line(f"push_to_hub: {repo_id} was not uploaded (`hf auth login` stores a token)"):
        return str(folder.push_to_hub(repo_id, model_card_kwargs={"source": repo_id}, **options))


def described(model: nn.Module, metadata: dict[str, Any] | None) -> tuple[nn.Module, NetworkConfig, dict[str, Any]]:
    """The network without the wrapper of ``torch.compile``, its configuration, and the metadata of its weight file.

    Raises:
        InputError: the network cannot be recreated, or the metadata do not match it or are not JSON values.
    """
    model = getattr(model, "_orig_mod", model)
    config = getattr(model, "network_config", None)
    if not isinstance(config, NetworkConfig):
        kind = type(model).__name__
        raise InputError(f"save: this {kind} was not made by senet.create_model, so cannot be recreated; {OTHERWISE}")
    classes_now = getattr(model, "num_classes", config.num_classes)
    attached = config.attached if config.folded else attachment.described(model)  # folding keeps the description
    config = dataclasses.replace(config, num_classes=classes_now, attached=attached)
    difference = _difference(model, config)
    if difference:
        raise InputError(f"save: {config.model!r} has changed since it was created: {difference}; {OTHERWISE}")
    try:
        metadata = json.loads(json.dumps({**(metadata or {}), **config.to_dict()}))
    except (TypeError, ValueError) as error:
        raise InputError(f"save: metadata and arguments must be JSON values: {error}") from error
    _check_card(metadata, config.num_classes)
    return model, config, metadata


def _check_card(metadata: dict[str, Any], num_classes: int) -> None:
    """Reject entries that the card cannot show."""
    for name, kind in _ENTRIES.items():
        value = metadata.get(name)
        if value is not None and not isinstance(value, kind):
            raise InputError(f"save: metadata has {name!r} as {type(value).__name__}; it must be a {kind.__name__}")
    classes = metadata.get("classes")
    if classes and len(classes) != num_classes:
        raise InputError(f"save: metadata names {len(classes)} classes, the network has {num_classes}")


def _difference(model: nn.Module, config: NetworkConfig) -> str | None:
    """The first difference, other than weights, between the network and one that ``config`` creates; None if none."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        fresh = config.create()
    if not isinstance(model, type(fresh)):
        return f"it is a {type(model).__name__}, not a {type(fresh).__name__}"
    now, then = ({name: m for name, m in net.named_modules() if name} for net in (model, fresh))
    for name in [*now, *then]:
        there, new = (
            f"{type(m).__name__}({m.extra_repr()})" if m else "nothing" for m in (now.get(name), then.get(name))
        )
        if there != new:
            return f"{name} is {there}, but a new one has {new}"
    shapes, wanted = ({key: tuple(t.shape) for key, t in net.state_dict().items()} for net in (model, fresh))
    different = sorted(shapes.items() ^ wanted.items())
    return f"{different[0][0]} has a different shape or is missing in one of them" if different else None


def _hub() -> Any:
    try:
        from senet.hub import folder as hub
    except ImportError as error:
        raise InputError(f"huggingface_hub is not installed ({error}); pip install huggingface_hub") from error
    return hub
