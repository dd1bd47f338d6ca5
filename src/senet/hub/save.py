"""Networks to keep and to give away: a file, a folder with a model card, a repository on the Hugging Face Hub.

Folder and repository are made and read by ``huggingface_hub``'s ``PyTorchModelHubMixin``. The networks do not inherit
from it: everyone who imports a network would import it, and it takes the arguments of a class for the configuration,
where here a registered name and an ``SEConfig`` make a network. ``senet.hub.folder`` puts the mixin around a network
at the moment that it is saved or loaded.
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
OTHERWISE = "senet.save_weights(path, model) writes the weights alone"


def save(model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None) -> Path:
    """Save a network so that ``from_pretrained`` makes it again: its weights and how it was created.

    A path that ends in ``.safetensors`` is one file. Any other is a folder: ``model.safetensors``; ``config.json``,
    which timm reads too; and ``README.md``, a model card, which is left as it is where there is one.

    An accelerated or compiled network is saved as the ordinary network that it stands for. Weights keep their type in
    the file, and are loaded as float32.

    Args:
        model: made by ``create_model``, ``from_pretrained`` or ``build_from_checkpoint``.
        path: the file or folder; folders are made.
        metadata: JSON values that are kept beside the weights, those that ``build_from_checkpoint`` gives say. The
            card shows ``classes`` (names), ``transform`` (a ``TransformSpec`` as a dict: input size, mean, std),
            ``metrics`` (name: number), ``dataset`` and ``license`` (as the Hub calls them).

    Returns:
        the path.

    Raises:
        InputError: the network is not as its name, its arguments and ``senet.attach`` make it (a layer was replaced);
            the path is of another kind of file; ``metadata`` holds what JSON cannot.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        model, _, metadata = described(model, metadata)
        save_weights(path, model, metadata)
    elif path.is_file() or path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise InputError(f"{path}: give a path that ends in .safetensors, or a folder")
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
    """The network of a file or folder of ``save``, or of a repository of ``push_to_hub``, in evaluation mode.

    Args:
        source: a ``.safetensors`` file, a folder, or a repository, ``"owner/name"``. What was downloaded is cached, and
            ``HF_HUB_OFFLINE=1`` keeps to the cache.
        revision: of the repository: a branch, a tag or a commit.
        token, cache_dir, local_files_only: as in ``huggingface_hub``.
        **changes: other arguments of ``create_model`` than the saved: ``num_classes=5`` for a new classifier,
            ``features_only=True`` for a backbone.

    Raises:
        InputError: there is no such file, folder or repository, or it holds no network of this package, or the changed
            network cannot take the weights.
    """
    if "pretrained" in changes:
        raise InputError("from_pretrained: its weights are those of the source; senet.create_model takes pretrained=…")
    source = Path(source) if Path(source).exists() else os.fspath(source).removeprefix("hf:")
    if str(source).endswith(".safetensors"):
        state, metadata = load_weights(source)
        config, _ = described_network(metadata, source, state)
        return create_described(config.changed(**changes), str(source)).eval()
    hub = _hub()
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        with hub.one_line(f"{source}: there is no such folder, and from the Hub it cannot be had"):
            return hub.NetworkFolder.from_pretrained(source, **options, **changes).network
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError, RecursionError) as error:  # of the mixin, on JSON of another kind
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: its config.json makes no network ({reason}); save it again") from error


def push_to_hub(model: nn.Module, repo_id: str, metadata: dict[str, Any] | None = None, **options: Any) -> str:
    """Upload a network, its configuration and its model card to the Hugging Face Hub in one commit.

    Args:
        model, metadata: as in ``save``.
        repo_id: the repository, ``"owner/name"``; made where there is none.
        **options: of ``PyTorchModelHubMixin.push_to_hub``: ``private``, ``token``, ``branch``, ``create_pr``,
            ``commit_message``, ``ignore_patterns`` (``"README.md"`` keeps a card that was edited on the Hub).

    Returns:
        the address of the commit.

    Raises:
        InputError: as ``save``; or the Hub refuses, for want of a token say.
    """
    hub = _hub()
    folder = hub.NetworkFolder(*described(model, metadata))
    with hub.one_line(f"push_to_hub: {repo_id} was not uploaded (`hf auth login` stores a token)"):
        return str(folder.push_to_hub(repo_id, model_card_kwargs={"source": repo_id}, **options))


def described(model: nn.Module, metadata: dict[str, Any] | None) -> tuple[nn.Module, NetworkConfig, dict[str, Any]]:
    """The network without a compiler's wrapper, how to create it again, and all that its weight file says.

    Raises:
        InputError: it cannot be created again, or the metadata do not fit it or JSON.
    """
    model = getattr(model, "_orig_mod", model)
    config = getattr(model, "network_config", None)
    if not isinstance(config, NetworkConfig):
        kind = type(model).__name__
        raise InputError(f"save: this {kind} was not made by senet.create_model and cannot be made again; {OTHERWISE}")
    classes_now = getattr(model, "num_classes", config.num_classes)
    attached = config.attached if config.folded else attachment.described(model)  # a folded network's: as it was before
    config = dataclasses.replace(config, num_classes=classes_now, attached=attached)
    difference = _difference(model, config)
    if difference:
        raise InputError(f"save: {config.model!r} would not be made again as it is now: {difference}; {OTHERWISE}")
    try:
        metadata = json.loads(json.dumps({**(metadata or {}), **config.to_dict()}))
    except (TypeError, ValueError) as error:
        raise InputError(f"save: metadata and arguments must be JSON values: {error}") from error
    _check_card(metadata, config.num_classes)
    return model, config, metadata


def _check_card(metadata: dict[str, Any], num_classes: int) -> None:
    """Refuse what the card could not show."""
    for name, kind in _ENTRIES.items():
        value = metadata.get(name)
        if value is not None and not isinstance(value, kind):
            raise InputError(f"save: metadata has {name!r} as {type(value).__name__}; it must be a {kind.__name__}")
    classes = metadata.get("classes")
    if classes and len(classes) != num_classes:
        raise InputError(f"save: metadata names {len(classes)} classes, the network has {num_classes}")


def _difference(model: nn.Module, config: NetworkConfig) -> str | None:
    """What distinguishes the network from one that ``config`` makes, first found; None: nothing but its weights."""
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
            return f"{name} is {there}, and {new} when made anew"
    shapes, wanted = ({key: tuple(t.shape) for key, t in net.state_dict().items()} for net in (model, fresh))
    different = sorted(shapes.items() ^ wanted.items())
    return f"{different[0][0]} is of another shape or not in both" if different else None


def _hub() -> Any:
    try:
        from senet.hub import folder as hub
    except ImportError as error:
        raise InputError(f"huggingface_hub is not installed ({error}); pip install huggingface_hub") from error
    return hub
