"""Sources of weights: a file, the Hugging Face Hub, torchvision, or a URL with a hash. Each yields a local file."""

import hashlib
import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import torch

from senet.errors import InputError
from senet.system.cache import cache_folder
from senet.text import first_line

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")
_HASH = re.compile(r"sha256=([0-9a-f]{8,64})")
_FORMS = "a file, timm:NAME, hf:OWNER/REPO, torchvision:WEIGHTS, https://…#sha256=…, or default"


@dataclass(frozen=True)
class FoundWeights:
    """A local weight file.

    Attributes:
        path: the file.
        label: its name in messages.
        published: whether timm or torchvision published it, whose networks are known beyond the keys.
    """

    path: Path
    label: str
    published: bool = False


def find_weights(source: str | os.PathLike[str]) -> FoundWeights:
    """Download the file of a source, or find it in the cache.

    Args:
        source: a path; ``timm:NAME``, which is ``hf:timm/NAME``; ``hf:OWNER/REPO``, optionally followed by ``/FILE``
            and ``@REVISION``; ``torchvision:ResNet50_Weights.IMAGENET1K_V2`` or ``torchvision:resnet50`` (its best
            weights); ``https://…#sha256=`` with at least 8 digits of the hash, which is checked on every use.

    Raises:
        InputError: the source has none of these forms or cannot be reached, or the file does not match the hash.
    """
    if isinstance(source, os.PathLike):
        return FoundWeights(Path(source), os.fspath(source))
    if not isinstance(source, str) or not source:
        raise InputError(f"pretrained={source!r} does not name any weights; a source is {_FORMS}")
    text = source
    kind, colon, rest = text.partition(":")
    if colon and kind in ("timm", "hf", "torchvision") and not rest:
        raise InputError(f"{text}: name the weights after the colon; a source is {_FORMS}")
    if kind in ("timm", "hf"):
        address = f"timm/{rest}" if kind == "timm" else rest
        return FoundWeights(_from_hub(address, text), text, published=address.startswith("timm/"))
    if kind == "torchvision":
        return FoundWeights(_from_torchvision(rest, text), text, published=True)
    if kind == "https":
        return FoundWeights(_from_web(text), text.partition("#")[0])
    if "://" in text:
        raise InputError(f"{text}: rejected, only https is allowed; a source is {_FORMS}")
    return FoundWeights(Path(source), text)


def _package(name: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{source}: needs {name}: pip install {name}") from error


def _from_hub(address: str, source: str) -> Path:
    """Download from the Hub, or use its cache. HF_HUB_OFFLINE, HF_HOME, and HF_TOKEN have their usual effect."""
    match = _HUB.fullmatch(address)
    if match is None:
        raise InputError(f"{source}: {address!r} is not OWNER/REPO or OWNER/REPO/FILE, optionally with @REVISION")
    hub = _package("huggingface_hub", source)
    errors = _package("huggingface_hub.errors", source)
    problem: Exception | None = None
    unreachable = False
    for name in [match["file"]] if match["file"] else HUB_FILES:
        try:
            path = hub.hf_hub_download(match["repo"], name, revision=match["revision"], local_files_only=unreachable)
            return Path(path)
        except errors.EntryNotFoundError as error:  # no such file on the Hub, or unreachable and not in the cache
            unreachable = isinstance(error, errors.LocalEntryNotFoundError)  # do not wait for the timeout twice
            problem = problem or error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            problem = error
            break
    if isinstance(problem, errors.RepositoryNotFoundError):
        hint = "; timm's names have a tag, as in 'seresnet50.ra2_in1k'" if source.startswith("timm:") else ""
        raise InputError(f"{source}: the Hub has no such repository, or it is private{hint}") from problem
    if isinstance(problem, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "no connection"
        raise InputError(f"{source}: is not in the Hub's cache, and the Hub cannot be reached ({why})") from problem
    raise InputError(f"{source}: cannot be downloaded from the Hub ({first_line(problem)})") from problem


def _from_torchvision(name: str, source: str) -> Path:
    """Download from torchvision's server, into torchvision's own cache."""
    models = _package("torchvision.models", source)
    try:
        weights = models.get_weight(name) if "." in name else models.get_model_weights(name).DEFAULT
    except (ValueError, KeyError, AttributeError) as error:
        message = f"{source}: torchvision has no such weights; use a name like torchvision:resnet50, for its best "
        raise InputError(message + "weights, or torchvision:ResNet50_Weights.IMAGENET1K_V2") from error
    file = Path(urlsplit(weights.url).path).name
    digits = file.rpartition("-")[2].partition(".")[0]
    return _verified_download(weights.url, Path(torch.hub.get_dir()) / "checkpoints" / file, digits, source)


def _from_web(text: str) -> Path:
    url, _, fragment = text.partition("#")
    match = _HASH.fullmatch(fragment.lower())
    if match is None:
        raise InputError(f"{url}: has no hash to check the file against; append #sha256= and 8 to 64 digits of it")
    file = Path(urlsplit(url).path).name
    if not urlsplit(url).netloc or file in ("", ".."):
        raise InputError(f"{url}: is not the address of a file")
    return _verified_download(url, cache_folder() / "weights" / match[1] / file, match[1], url)


def _verified_download(url: str, target: Path, digits: str, source: str) -> Path:
    """Download ``target`` unless it exists. Either way, its SHA-256 starts with ``digits``."""
    if target.is_file() and _sha256(target).startswith(digits):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # This writes a temporary file, checks its hash, and only then renames it.
        torch.hub.download_url_to_file(url, str(target), digits, progress=sys.stderr.isatty())
    except RuntimeError as error:  # the hash does not match
        raise InputError(f"{source}: is not the expected file ({first_line(error)}); not used") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot be downloaded ({first_line(error)})") from error
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
