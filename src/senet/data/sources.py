"""Opens data by name or folder: images to train on, images to validate on, and a sentence that describes them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from senet.data import MAX_PIXELS, catalog, folders
from senet.data.images import ArrayStore, FileStore, ImageSet
from senet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from senet.errors import InputError
from senet.text import did_you_mean, shown

__all__ = ["DataSource", "ImageSet", "open_eval", "open_files", "open_source"]

DIGITS = "digits"


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A classification task.

    Attributes:
        name: The data, as the user named it.
        classes: Names of the classes, sorted (folders) or in the order of the dataset.
        train: The images to train on, without a transform.
        val: The images to validate on, without a transform.
        split: A sentence that describes the split.
        in_chans: Channels of the images, 1 or 3.
        native_size: Side of the images in pixels if all have the same tiny size (8, 32, ...), otherwise None.
        mean: Mean per channel, on the 0..1 scale.
        std: Standard deviation per channel, on the 0..1 scale.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    split: str
    in_chans: int = 3
    native_size: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def open_source(
    data: str | Path,
    *,
    root: str | Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> DataSource:
    """Open data to train on.

    Args:
        data: "digits" (bundled with scikit-learn), a torchvision dataset such as "cifar10", or a folder:
            ``train/<class>/*`` with or without ``val/`` or ``test/``, or only ``<class>/*``.
        root: Folder of torchvision datasets, including downloads. Default: ``data``.
        val_fraction: Fraction of each class to validate on, if the data has no split.
        seed: Seed of that split.
        max_pixels: Images with more pixels count as bad images and are not decoded.

    Raises:
        InputError: No images, or data that cannot be used for training.
    """
    name = str(data)
    if not _is_folder(name):
        if name == DIGITS:
            return _digits(val_fraction, seed)
        return _torchvision(_dataset_key(name), Path(root or "data"), val_fraction, seed, max_pixels)
    folder = Path(data)
    train_root, val_root = folders.halves(folder)
    listing = folders.list_classes(train_root)
    folders.require_classes(listing)
    folders.require_images_per_class(listing)
    train = listing.image_set(listing.classes, folder, max_pixels)
    if val_root is not None:
        val_listing = folders.list_classes(val_root)
        folders.check_classes(val_listing, listing.classes, str(train_root))
        val = val_listing.image_set(listing.classes, folder, max_pixels)
        split = f"{len(train)} images of {train_root} to train, {len(val)} of {val_root} to validate"
        listing.left_out |= val_listing.left_out
        return _source(name, train, val, shown(split) + listing.without())
    why = f"{train_root} has no val/ or test/ next to it"
    source = _own_split(name, train, why, val_fraction, seed)
    return dataclasses.replace(source, split=shown(source.split) + listing.without())


def open_eval(
    data: str | Path,
    *,
    root: str | Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    part: Literal["auto", "val"] = "auto",
    max_pixels: int = MAX_PIXELS,
) -> tuple[ImageSet, str]:
    """Open data to evaluate on. Returns the images and a sentence that describes them.

    These are the validation images of :func:`open_source`. For a folder with only ``<class>/*``, part="auto" gives all
    images, for ``senet eval --data some/val``, and part="val" gives the held-out split.

    ``classes`` are the classes of the model, which define the targets. A class that the model does not know raises
    InputError. A class of the model may have no images.
    """
    folder = Path(data)
    if part == "auto" and _is_folder(str(data)) and folders.halves(folder) == (folder, None):
        listing = folders.list_classes(folder)
        if classes is not None:
            folders.check_classes(listing, classes, "the model")
        images = listing.image_set(classes or listing.classes, folder, max_pixels)
        return images, f"all {len(images)} images of {shown(folder)}{listing.without()}"
    source = open_source(data, root=root, val_fraction=val_fraction, seed=seed, max_pixels=max_pixels)
    return _in_classes(source.val, classes, str(data)), f"the validation images of {shown(data)}: {source.split}"


def open_files(paths: Sequence[str | Path], *, max_pixels: int = MAX_PIXELS) -> ImageSet:
    """Open image files and folders of images (searched recursively) for prediction, without classes (targets are -1).

    A file in ``paths`` is always included, with any extension. Raises InputError if a path does not exist or if there
    are no images.
    """
    files: list[str] = []
    others: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = folders.list_files(path)
            files += found.images
            others += found.others
        elif path.exists():
            files.append(str(path))
        else:
            raise InputError(f"{path} is missing: give image files or folders of images")
    if not files:
        where = ", ".join(map(str, paths)) or "an empty list"
        raise InputError(f"no images in {where}: {folders.unsupported(others) or 'give image files or folders'}")
    return ImageSet(
        FileStore(files, max_pixels), list(range(len(files))), (), [-1] * len(files), files, non_images=tuple(others)
    )


def _source(name: str, train: ImageSet, val: ImageSet, split: str) -> DataSource:
    tiny = train.store.tiny_size if isinstance(train.store, FileStore) else None
    native = tiny[0] if tiny and tiny[0] == tiny[1] else None
    return DataSource(name, train.classes, train, val, split, native_size=native)


def _own_split(name: str, images: ImageSet, why: str, val_fraction: float, seed: int) -> DataSource:
    train, val = folders.stratified_split(images.names, images.targets, val_fraction, seed)
    if not val:
        raise InputError(f"{name}: every class has a single image, so there is none to validate on: add images")
    split = (
        f"{why}: {len(train)} images to train, {len(val)} to validate, drawn class by class "
        f"(val_fraction {val_fraction:g}, seed {seed})"
    )
    val_images = dataclasses.replace(images.subset(val), non_images=())  # reported once, with the training images
    return _source(name, images.subset(train), val_images, split)


def _digits(val_fraction: float, seed: int) -> DataSource:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    arrays = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    names = [f"digit_{index:04d}" for index in range(len(arrays))]
    classes = tuple(str(name) for name in bunch.target_names)
    images = ImageSet(ArrayStore(arrays), list(range(len(arrays))), classes, bunch.target.tolist(), names)
    source = _own_split(DIGITS, images, "scikit-learn's digits", val_fraction, seed)
    return _with_statistics(source)


def _torchvision(key: str, root: Path, val_fraction: float, seed: int, max_pixels: int) -> DataSource:
    train, val = catalog.open_dataset(key, root, max_pixels)
    if val is None:
        source = _own_split(key, train, f"{key} has no split", val_fraction, seed)
    else:
        source = _source(key, train, val, f"{key}'s own split: {len(train)} images to train, {len(val)} to validate")
    entry = catalog.DATASETS[key]
    return _with_statistics(source, entry.mean, entry.std)


def _with_statistics(
    source: DataSource, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
) -> DataSource:
    """Set size, channels, mean, and std for images in memory. By default, mean and std are of the training images."""
    store = source.train.store
    if not isinstance(store, ArrayStore):
        return source
    arrays = store.arrays
    channels = 1 if arrays.ndim == 3 else int(arrays.shape[3])
    if mean is None or std is None:
        pixels = arrays[source.train.positions].reshape(-1, channels)
        mean = tuple((pixels.mean(axis=0) / 255).tolist())
        std = tuple((pixels.std(axis=0) / 255).tolist())
    native = int(arrays.shape[1]) if arrays.shape[1] == arrays.shape[2] else None
    return dataclasses.replace(source, in_chans=channels, native_size=native, mean=mean, std=std)


def _in_classes(images: ImageSet, classes: Sequence[str] | None, name: str) -> ImageSet:
    """Convert targets from the classes of the data to the classes of the model."""
    if classes is None or tuple(classes) == images.classes:
        return images
    number = {label: i for i, label in enumerate(classes)}
    used = {images.classes[target] for target in images.targets}
    foreign = sorted(used - set(classes))
    if foreign:
        raise InputError(f"class {foreign[0]!r} of {name} is not among the {len(classes)} classes of the model")
    targets = [number[images.classes[target]] for target in images.targets]
    return dataclasses.replace(images, classes=tuple(classes), targets=targets)


def _is_folder(name: str) -> bool:
    """Whether ``name`` is a folder and not a dataset, whose name takes precedence and never contains a separator."""
    if not name.strip():
        raise InputError("--data is empty: give a folder or the name of a dataset")  # Path("") would be "."
    return _known(name) is None and (os.sep in name or "." in name or os.path.exists(name))


def _known(name: str) -> str | None:
    if name == DIGITS:
        return name
    key = name.lower().replace("-", "").replace("_", "")
    return key if key in catalog.DATASETS else None


def _dataset_key(name: str) -> str:
    key = _known(name)
    if key is not None:
        return key
    names = [DIGITS, *catalog.DATASETS]
    hint = did_you_mean(name.lower(), names, f"give a folder, or one of {', '.join(names)}", quote=str)
    raise InputError(f"no folder and no dataset named {name!r}: {hint}")
