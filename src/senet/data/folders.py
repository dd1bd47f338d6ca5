"""The images and classes in a folder, and the split of each class if the folder has none."""

import dataclasses
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from senet.data import MAX_PIXELS
from senet.data.formats import stranger
from senet.data.images import FileStore, ImageSet
from senet.data.walk import Found, Walk, asked, system_folder
from senet.errors import InputError
from senet.text import shown

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test", "testing")
_NAMED = 5  # files or folders named in a message
log = logging.getLogger("senet.data")


@dataclasses.dataclass
class Listing:
    """The files in a folder of class folders, sorted. ``left_out`` has what is not data (path → what it is)."""

    root: Path
    paths: list[str] = dataclasses.field(default_factory=list)
    classes_of: list[str] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    non_images: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def image_set(self, classes: Sequence[str], names_from: Path, max_pixels: int = MAX_PIXELS) -> ImageSet:
        """Make the image set. Targets are indices into ``classes``, and names are relative to ``names_from``."""
        number = {name: i for i, name in enumerate(classes)}
        return ImageSet(
            store=FileStore(self.paths, max_pixels),
            positions=list(range(len(self.paths))),
            classes=tuple(classes),
            targets=[number[name] for name in self.classes_of],
            names=[os.path.relpath(path, names_from) for path in self.paths],
            non_images=tuple(os.path.relpath(path, names_from) for path in self.non_images),
        )

    def without(self) -> str:
        """The end of a sentence about the images that lists what was left out, if anything."""
        return f"; left out: {few(self.left_out)}" if self.left_out else ""


def list_classes(root: Path) -> Listing:
    """List ``root/<class>/*``. Raises InputError if there are no class folders or no images."""
    listing, walk = Listing(root), Walk()
    folders = class_folders(root, walk, listing.left_out)
    for folder in folders:
        found = walk.files(folder)
        report(found)
        listing.left_out |= found.left_out
        if str(folder) in found.left_out:
            continue
        if str(folder) in found.unreadable:
            raise InputError(f"class folder {folder} {_unreadable(found.unreadable[str(folder)])}")
        listing.classes.append(folder.name)
        listing.paths += found.images
        listing.classes_of += [folder.name] * len(found.images)
        listing.non_images += found.others
    say_left_out(listing.left_out)
    if not listing.classes:
        loose = any(entry.is_file() and not entry.name.startswith(".") for entry in root.iterdir())
        has = "has files but no class folders" if loose else "has no class folders" if folders else "is empty"
        raise InputError(f"{root} {has}: put the images of each class into its own folder, {root}/<class>/*")
    if not listing.paths:
        where = f"in the {len(listing.classes)} class folders of {root}"
        raise InputError(f"no images {where}: {unsupported(listing.non_images) or 'check the path'}")
    return listing


def class_folders(root: Path, walk: Walk, left_out: dict[str, str]) -> list[Path]:
    """The folders in ``root`` that may be classes, each real folder once. The others are added to ``left_out``."""
    candidates = visible_folders(root)
    walk.mark(root)
    names: dict[Path, Path] = {}
    for folder in candidates:
        if system_folder(folder.name) is not None:
            left_out[str(folder)] = str(system_folder(folder.name))
        elif _marked(walk, folder):
            names[folder.resolve()] = folder
        elif folder.resolve() in names:
            raise InputError(f"{folder} and {names[folder.resolve()].name} are the same folder: remove the link")
        else:
            left_out[str(folder)] = "a link to the data folder itself"
    return list(names.values())


def list_files(folder: Path) -> Found:
    """List, recursively, a folder that the user has named."""
    walk = Walk()
    walk.mark(folder)
    found = walk.files(folder, chosen=True)
    if str(folder) in found.unreadable:
        raise InputError(f"{folder} {_unreadable(found.unreadable[str(folder)])}")
    report(found)
    say_left_out(found.left_out)
    return found


def report(found: Found) -> None:
    """Log folders that could not be read, since nothing else tells that their images are missing."""
    if found.unreadable:
        count = len(found.unreadable)
        log.warning("cannot read %d folder%s: %s", count, "s" * (count > 1), few(found.unreadable))


def say_left_out(left_out: Mapping[str, str]) -> None:
    """Log, once, the files and folders that are not data."""
    if left_out:
        log.warning("left out, not data: %s", few(left_out))


def few(reasons: Mapping[str, str]) -> str:
    """Some paths with their reasons."""
    named = [f"{shown(path)} ({shown(why)})" for path, why in list(reasons.items())[:_NAMED]]
    return ", ".join(named) + (f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else "")


def unsupported(paths: Iterable[str]) -> str:
    """A message about files in unsupported image formats, with the remedy, or "" if there are none."""
    kinds = Counter(kind for kind in map(stranger, paths) if kind not in (None, "system"))
    if not kinds:
        return ""
    counts = ", ".join(f"{count} {kind} file{'s' * (count > 1)}" for kind, count in kinds.most_common())
    return f"there {'is' if counts.startswith('1 ') else 'are'} {counts}, which cannot be read; convert to JPEG or PNG"


def require_classes(listing: Listing) -> None:
    """Raise InputError if there is only one class. The data may be one level deeper."""
    if len(listing.classes) > 1:
        return
    only = listing.root / listing.classes[0]
    inner = [folder.name for folder in visible_folders(only) if system_folder(folder.name) is None]
    if inner:
        names = ", ".join(inner[:_NAMED]) + (", ..." if len(inner) > _NAMED else "")
        raise InputError(f"{listing.root} has only one class folder, {only.name}, which has {names}: give {only}?")
    raise InputError(f"{listing.root} has only one class folder, {only.name}: at least two are needed")


def require_images_per_class(listing: Listing) -> None:
    """Raise InputError if a training class has no images."""
    empty = sorted(set(listing.classes) - set(listing.classes_of))
    if empty:
        raise InputError(f"no images in class folder {listing.root / empty[0]}: fill it or remove it{_more(empty)}")


def check_classes(listing: Listing, classes: Sequence[str], of: str) -> None:
    """Raise InputError if ``listing`` has images of a class that is not among ``classes``, the classes of ``of``."""
    foreign = sorted(set(listing.classes_of) - set(classes))
    if foreign:
        raise InputError(
            f"class folder {listing.root / foreign[0]} is not among the {len(classes)} classes of {of}: "
            f"rename or remove it{_more(foreign)}"
        )


def visible_folders(root: Path) -> list[Path]:
    """Return the folders in ``root`` that are not hidden, sorted. Raises InputError if ``root`` is not a folder."""
    if not os.path.isdir(root):
        raise InputError(f"{root} is {'a file, not a folder' if os.path.exists(root) else 'missing'}: check the path")
    try:
        with os.scandir(root) as entries:
            folders = sorted(Path(entry.path) for entry in entries if asked(entry.is_dir))
    except OSError as error:
        raise InputError(f"{root} {_unreadable(error.strerror)}") from error
    # Hidden folders are skipped silently, except those in which a system is known to store images.
    return [path for path in folders if not path.name.startswith(".") or system_folder(path.name) is not None]


def halves(folder: Path) -> tuple[Path, Path | None]:
    """Return the folder to train on and the folder to validate on, or None if there is none.

    The name ``train`` is sufficient. Another spelling (``Train``, ``Training``) may be a class, such as the vehicle, so
    it must contain folders.
    """
    present = visible_folders(folder)
    trains = [path for path in _named(present, TRAIN_FOLDERS) if path.name == "train" or _holds_folders(path)]
    vals = _named(present, VAL_FOLDERS)
    if trains:
        return trains[0], next(iter(vals), None)
    if vals and len(vals) == len(present) and all(map(_holds_folders, vals)):
        raise InputError(f"{folder} has {vals[0].name}/ and no train/: add it, or give {vals[0]} itself")
    return folder, None


def _named(present: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The folders with these names, in the order of the names, lower-case spellings first."""
    rank = {name: place for place, name in enumerate(names)}
    chosen = [path for path in present if path.name.lower() in rank]
    return sorted(chosen, key=lambda path: (rank[path.name.lower()], path.name != path.name.lower()))


def _holds_folders(path: Path) -> bool:
    return any(system_folder(inner.name) is None for inner in visible_folders(path))


def stratified_split(
    names: Sequence[str], targets: Sequence[int], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split every class at random into indices for training and for validation, both in the original order.

    Each class is ordered by a hash of (seed, name), so the split is the same on every machine and with every library
    version. A class with two or more images has at least one on each side. A single image is used for training.
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


def _marked(walk: Walk, folder: Path) -> bool:
    try:
        return walk.mark(folder)
    except OSError as error:
        raise InputError(f"class folder {folder} {_unreadable(error.strerror)}") from error


def _unreadable(why: str | None) -> str:
    return f"cannot be read ({why}): change its permissions, or remove it"


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more: {', '.join(names[1:6])})" if len(names) > 1 else ""
