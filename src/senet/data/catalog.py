"""torchvision's classification datasets by name, downloaded by torchvision."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import numpy as np

from senet.data import MAX_PIXELS
from senet.data.images import ArrayStore, FileStore, ImageSet, Store
from senet.errors import InputError
from senet.text import first_line

_TIMEOUT = 30.0  # seconds without a response after which a download fails


@dataclasses.dataclass(frozen=True)
class Entry:
    """A dataset: its torchvision class and the arguments of its two parts. If ``val`` is None, we split the images."""

    cls: str
    train: dict[str, Any]
    val: dict[str, Any] | None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def _split(cls: str, train: str, val: str, **extra: Any) -> Entry:
    return Entry(cls, {"split": train, **extra}, {"split": val, **extra})


def _train_flag(cls: str, mean: float | None = None, std: float | None = None) -> Entry:
    return Entry(cls, {"train": True}, {"train": False}, (mean,) if mean else None, (std,) if std else None)


# Means and deviations of the training images, on the 0..1 scale, are from the papers on each dataset.
DATASETS = {
    "cifar10": Entry("CIFAR10", {"train": True}, {"train": False}, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Entry(
        "CIFAR100", {"train": True}, {"train": False}, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "mnist": _train_flag("MNIST", 0.1307, 0.3081),
    "fashionmnist": _train_flag("FashionMNIST", 0.2860, 0.3530),
    "kmnist": _train_flag("KMNIST", 0.1918, 0.3483),
    "usps": _train_flag("USPS"),
    "svhn": _split("SVHN", "train", "test"),
    "stl10": _split("STL10", "train", "test"),
    "flowers102": _split("Flowers102", "train", "val"),
    "food101": _split("Food101", "train", "test"),
    "oxfordiiitpet": _split("OxfordIIITPet", "trainval", "test"),
    "fgvcaircraft": _split("FGVCAircraft", "trainval", "test"),
    "dtd": _split("DTD", "train", "val"),
    "stanfordcars": _split("StanfordCars", "train", "test"),
    "gtsrb": _split("GTSRB", "train", "test"),
    "country211": _split("Country211", "train", "valid"),
    "imagenette": _split("Imagenette", "train", "val"),
    "renderedsst2": _split("RenderedSST2", "train", "val"),
    "eurosat": Entry("EuroSAT", {}, None),
    "sun397": Entry("SUN397", {}, None),
}


def open_dataset(name: str, root: Path, max_pixels: int = MAX_PIXELS) -> tuple[ImageSet, ImageSet | None]:
    """Open a dataset as (train, val), after a download if needed. ``val`` is None if the dataset has no split.

    Raises:
        InputError: The dataset is not in ``root`` and cannot be downloaded.
    """
    entry = DATASETS[name]
    train = _image_set(name, "train", _fetch(name, root, entry.train), max_pixels)
    if entry.val is None:
        return train, None
    return train, _image_set(name, entry.val.get("split", "test"), _fetch(name, root, entry.val), max_pixels)


def _fetch(name: str, root: Path, arguments: dict[str, Any]) -> Any:
    from torchvision import datasets  # slow to import, not needed for folders

    cls = getattr(datasets, DATASETS[name].cls)
    old_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        if name in ("stanfordcars",):
            return cls(root, **arguments)  # no longer available for download
        if name == "imagenette" and (root / "imagenette2").exists():
            return cls(root, **arguments)  # torchvision raises an error if it is already downloaded
        root.mkdir(parents=True, exist_ok=True)
        return cls(root, download=True, **arguments)
    except (OSError, RuntimeError, ValueError, EOFError, ImportError) as error:
        raise InputError(
            f"cannot open {name} in {root} ({first_line(error)}): check the network, or copy torchvision's files for "
            "it there"
        ) from error
    finally:
        socket.setdefaulttimeout(old_timeout)


def _image_set(name: str, part: str, dataset: Any, max_pixels: int) -> ImageSet:
    targets = [int(target) for target in _targets(dataset)]
    store, names = _store(dataset, f"{name}/{part}", max_pixels)
    classes = getattr(dataset, "classes", None) or range(max(targets) + 1)
    # Imagenette's classes are tuples of synonyms.
    known = tuple(c[0] if isinstance(c, tuple) else str(c) for c in classes)
    return ImageSet(store, list(range(len(store))), known, targets, names)


def _targets(dataset: Any) -> Any:
    for attribute in ("targets", "labels", "_labels"):
        if getattr(dataset, attribute, None) is not None:
            return getattr(dataset, attribute)
    return [target for _, target in dataset._samples]


def _store(dataset: Any, prefix: str, max_pixels: int) -> tuple[Store, list[str]]:
    """Extract pixels or file names from a torchvision dataset, so that our own decoder reads the files."""
    if getattr(dataset, "data", None) is not None:
        arrays = np.asarray(dataset.data)
        if arrays.ndim == 4 and arrays.shape[1] == 3:  # SVHN and STL10 are (N, C, H, W)
            arrays = np.ascontiguousarray(arrays.transpose(0, 2, 3, 1))
        return ArrayStore(arrays), [f"{prefix}/{index:05d}" for index in range(len(arrays))]
    samples = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    paths = [str(path) for path, _ in samples] if samples else [str(path) for path in dataset._image_files]
    return FileStore(paths, max_pixels), paths
