"""Which images a folder holds, of which classes; and how classes are split when the folder does not say."""

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
    """The files of one folder of class folders, in sorted order; ``left_out`` is no data (path → what it is)."""

    root: Path
    paths: list[str] = dataclasses.field(default_factory=list)
    classes_of: list[str] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    non_images: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def image_set(self, classes: Sequence[str], names_from: Path, max_pixels: int = MAX_PIXELS) -> ImageSet:
        """Make the image set, with the targets counted in ``classes`` and names relative to ``names_from``."""
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
        """The end of a sentence on the images: what was left out, or nothing."""
        return f"; left out: {few(self.left_out)}" if self.left_out else ""


def list_classes(root: Path) -> Listing:
    """List ``root/<class>/*``. Raises InputError for a folder without class folders or without images."""
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
        raise InputError(f"{root} {has}: put the images of each class into a folder of its own, {root}/<class>/*")
    if not listing.paths:
        where = f"in the {len(listing.classes)} class folders of {root}"
        raise InputError(f"no images {where}: {unsupported(listing.non_images) or 'check the path'}")
    return listing


def class_folders(root: Path, walk: Walk, left_out: dict[str, str]) -> list[Path]:
    """The folders in ``root`` that may be classes, each real folder once; what is none is put into ``left_out``."""
    candidates = visible_folders(root)
    walk.mark(root)
    names: dict[Path, Path] = {}
    for folder in candidates:
        if system_folder(folder.name) is not None:
            left_out[str(folder)] = str(system_folder(folder.name))
        elif _marked(walk, folder):
            names[folder.resolve()] = folder
        elif folder.resolve() in names:
            raise InputError(f"{folder} and {names[folder.resolve()].name} are one folder: remove the link")
        else:
            left_out[str(folder)] = "a link to the data folder itself"
    return list(names.values())


def list_files(folder: Path) -> Found:
    """List a folder that the user has named recursively."""
    walk = Walk()
    walk.mark(folder)
    found = walk.files(folder, chosen=True)
    if str(folder) in found.unreadable:
        raise InputError(f"{folder} {_unreadable(found.unreadable[str(folder)])}")
    report(found)
    say_left_out(found.left_out)
    return found


def report(found: Found) -> None:
    """Name folders that nobody could look into: their images are missing without another word."""
    if found.unreadable:
        count = len(found.unreadable)
        log.warning("cannot read %d folder%s: %s", count, "s" * (count > 1), few(found.unreadable))


def say_left_out(left_out: Mapping[str, str]) -> None:
    """Name once what lies among the data and is none."""
    if left_out:
        log.warning("left out, as no data: %s", few(left_out))


def few(reasons: Mapping[str, str]) -> str:
    """Some paths with their reasons."""
    named = [f"{shown(path)} ({shown(why)})" for path, why in list(reasons.items())[:_NAMED]]
    return ", ".join(named) + (f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else "")


def unsupported(paths: Iterable[str]) -> str:
    """What the files are that people take for images, and what to do; nothing where there are none."""
    kinds = Counter(kind for kind in map(stranger, paths) if kind not in (None, "system"))
    if not kinds:
        return ""
    counts = ", ".join(f"{count} {kind} file{'s' * (count > 1)}" for kind, count in kinds.most_common())
    return f"there {'is' if counts.startswith('1 ') else 'are'} {counts}, which cannot be read; convert to JPEG or PNG"


def require_classes(listing: Listing) -> None:
    """Raise InputError when there is one class alone, so nothing to tell apart; the data may lie a level deeper."""
    if len(listing.classes) > 1:
        return
    only = listing.root / listing.classes[0]
    inner = [folder.name for folder in visible_folders(only) if system_folder(folder.name) is None]
    if inner:
        names = ", ".join(inner[:_NAMED]) + (", ..." if len(inner) > _NAMED else "")
        raise InputError(f"{listing.root} has one class folder, {only.name}, which holds {names}: give {only}?")
    raise InputError(f"{listing.root} has one class folder, {only.name}: there must be two at least to tell apart")


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
    if not os.path.isdir(root):
        raise InputError(f"{root} is {'a file, not a folder' if os.path.exists(root) else 'missing'}: check the path")
    try:
        with os.scandir(root) as entries:
            folders = sorted(Path(entry.path) for entry in entries if asked(entry.is_dir))
    except OSError as error:
        raise InputError(f"{root} {_unreadable(error.strerror)}") from error
    # Hidden ones are passed over in silence, except where a system is known to put images into them.
    return [path for path in folders if not path.name.startswith(".") or system_folder(path.name) is not None]


def halves(folder: Path) -> tuple[Path, Path | None]:
    """Return the folder to train on and the one to validate on, which may be missing.

    ``train`` is a half by its name. Another spelling (``Train``, ``Training``) may be a class, of vehicles say, and is
    a half when it holds folders.
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
    """The folders of these names, in the order of the names, the spelling with lower-case letters first."""
    rank = {name: place for place, name in enumerate(names)}
    chosen = [path for path in present if path.name.lower() in rank]
    return sorted(chosen, key=lambda path: (rank[path.name.lower()], path.name != path.name.lower()))


def _holds_folders(path: Path) -> bool:
    return any(system_folder(inner.name) is None for inner in visible_folders(path))


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


def _marked(walk: Walk, folder: Path) -> bool:
    try:
        return walk.mark(folder)
    except OSError as error:
        raise InputError(f"class folder {folder} {_unreadable(error.strerror)}") from error


def _unreadable(why: str | None) -> str:
    return f"cannot be read ({why}): change its permissions, or remove it"


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more: {', '.join(names[1:6])})" if len(names) > 1 else ""
