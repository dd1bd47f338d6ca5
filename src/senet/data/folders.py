"""Which images a folder holds, of which classes; and how classes are split when the folder does not say."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from senet.data.decode import BadImageError, open_picture
from senet.data.images import FileStore, ImageSet
from senet.errors import InputError

VAL_FOLDERS = ("val", "valid", "validation", "test")


@dataclasses.dataclass
class Listing:
    """The files of one folder of class folders, in sorted order."""

    root: Path
    paths: list[str] = dataclasses.field(default_factory=list)
    classes_of: list[str] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    non_images: list[str] = dataclasses.field(default_factory=list)

    def image_set(self, classes: Sequence[str], names_from: Path) -> ImageSet:
        """Make the image set, with the targets counted in ``classes`` and names relative to ``names_from``."""
        number = {name: i for i, name in enumerate(classes)}
        return ImageSet(
            store=FileStore(self.paths),
            positions=list(range(len(self.paths))),
            classes=tuple(classes),
            targets=[number[name] for name in self.classes_of],
            names=[os.path.relpath(path, names_from) for path in self.paths],
            non_images=tuple(os.path.relpath(path, names_from) for path in self.non_images),
        )


def image_extensions() -> frozenset[str]:
    """Return the file extensions that Pillow can open as images, lower case with the dot."""
    Image.init()
    documents = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib", ".fits"}
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN) - documents


def list_files(folder: Path, extensions: frozenset[str]) -> tuple[list[str], list[str]]:
    """List a folder recursively: (images, other files), each sorted; hidden files and folders are left out.

    A file whose extension is no image's is opened: it counts as an image when it is one.
    """
    images: list[str] = []
    others: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            path = os.path.join(parent, name)
            is_image = os.path.splitext(name)[1].lower() in extensions or _opens(path)
            (images if is_image else others).append(path)
    return sorted(images), sorted(others)


def list_classes(root: Path) -> Listing:
    """List ``root/<class>/*``. Raises InputError for a folder without class folders or without images."""
    class_folders = visible_folders(root)
    if not class_folders:
        loose = any(entry.is_file() and not entry.name.startswith(".") for entry in root.iterdir())
        has = "has files but no class folders" if loose else "is empty"
        raise InputError(f"{root} {has}: put the images of each class into a folder of its own, {root}/<class>/*")
    listing, extensions = Listing(root), image_extensions()
    for folder in class_folders:
        images, others = list_files(folder, extensions)
        listing.classes.append(folder.name)
        listing.paths += images
        listing.classes_of += [folder.name] * len(images)
        listing.non_images += others
    if not listing.paths:
        raise InputError(f"no images in the {len(class_folders)} class folders of {root}: check the path")
    return listing


def require_images_per_class(listing: Listing) -> None:
    """Raise InputError when a class to train on has no image."""
    empty = sorted(set(listing.classes) - set(listing.classes_of))
    if empty:
        raise InputError(f"no images in class folder {listing.root / empty[0]}: fill it or remove it{_more(empty)}")


def check_classes(listing: Listing, classes: Sequence[str], of: str) -> None:
    """Raise InputError when ``listing`` has images of a class that is not in ``classes``, which belong to ``of``."""
    foreign = sorted(set(listing.classes_of) - set(classes))
    if foreign:
        raise InputError(
            f"class folder {listing.root / foreign[0]} is not among the {len(classes)} classes of {of}: "
            f"rename or remove it{_more(foreign)}"
        )


def visible_folders(root: Path) -> list[Path]:
    """Return the sorted folders in ``root`` that are not hidden. Raises InputError when ``root`` is no folder."""
    if not root.is_dir():
        raise InputError(f"{root} is {'a file, not a folder' if root.exists() else 'missing'}: check the path")
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def stratified_split(
    names: Sequence[str], targets: Sequence[int], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split every class at random: indices to train on and to validate on, both in their old order.

    The draw orders each class by a hash of (seed, name), so it is the same on every machine and with every library
    version. Each class with two or more images gives at least one to either side; a single image is trained on.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}: give a value between 0 and 1")
    members: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        members.setdefault(target, []).append(index)
    val: list[int] = []
    for indices in members.values():
        indices.sort(key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode(errors="surrogateescape")).digest())
        if len(indices) > 1:
            val += indices[: min(max(round(len(indices) * val_fraction), 1), len(indices) - 1)]
    chosen = set(val)
    return [i for i in range(len(names)) if i not in chosen], sorted(val)


def _opens(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            open_picture(file.read())
    except (OSError, BadImageError):
        return False
    return True


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more: {', '.join(names[1:6])})" if len(names) > 1 else ""
