"""What the data of a run were made of, kept beside its settings, so that a resume and an evaluation know them again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from senet.data.images import FileStore, ImageSet
from senet.data.sources import DataSource
from senet.errors import InputError
from senet.runs import folder as folders
from senet.runs.validation import CLOSED, Text, read
from senet.text import shown

_LOG = logging.getLogger("senet.runs")
_SAMPLE = 32  # training files by which a folder is known wherever it lies
_LISTED = 5  # classes named in a message
Number = Annotated[int, Field(strict=True, ge=0)]
Sample = list[tuple[Text, Number]]


@dataclass(frozen=True)
class Part:
    """The training or the validation images: how many of each class, and a digest of their names in order."""

    __pydantic_config__ = CLOSED

    counts: list[Number]
    names: Text


@dataclass(frozen=True)
class DataRecord:
    """The data of a run, as ``data.json`` keeps them.

    Names are relative to the data folder, so that a folder may move. ``sample`` has some of the training files with
    their sizes in bytes; it is empty for data that are no folder.
    """

    __pydantic_config__ = CLOSED

    classes: list[Text]
    train: Part
    val: Part
    sample: Sample

    def counted(self) -> str:
        """The number of images in words."""
        return f"{sum(self.train.counts)} images to train and {sum(self.val.counts)} to validate"

    def same_images(self, other: DataRecord) -> bool:
        """Whether the parts have the same images by name and class."""
        return (self.classes, self.train, self.val) == (other.classes, other.train, other.val)


def record_of(source: DataSource) -> DataRecord:
    """The record of opened data."""
    folder = Path(source.name).is_dir()
    start = 0 if folder else len(_common_folder([*source.train.names, *source.val.names]))
    train, val = (_part(images, start) for images in (source.train, source.val))
    return DataRecord([_utf8(name) for name in source.classes], train, val, _sample(source))


def save_record(folder: Path, record: DataRecord) -> None:
    """Write ``data.json`` into a run's folder."""
    folders.write_json(folder / folders.DATA, asdict(record))


def load_record(folder: Path) -> DataRecord | None:
    """The record in a run's folder; None for a run of a version that kept none."""
    path = folder / folders.DATA
    return read(path, DataRecord) if path.is_file() else None


def check_data(folder: Path, now: DataRecord, data: str, *, moved: bool, allow_changed: bool) -> None:
    """Refuse to resume the run in ``folder`` on other data than it was begun on.

    Args:
        folder: the run's.
        now: what ``data`` is made of today.
        data: as the user names it.
        moved: whether the run knew its data under another name.
        allow_changed: take other images (of the same classes), with a warning.
    """
    saved = load_record(folder)
    if moved and not (Path(data).is_dir() and (saved is None or saved.sample)):
        raise InputError(f"{folder} was begun on other data than {data}; name them as they were, or their new folder")
    if saved is None:
        if moved and not allow_changed:
            raise InputError(
                f"{folder} is of a version that kept no record of its data, so nobody can tell whether {data} has the "
                "same; name the data as it was, or give --allow-changed-data"
            )
        return
    check_classes(saved, now, folder, data)
    if saved.same_images(now):
        return
    what = (
        f"{folder} was begun on other images ({saved.counted()}; now {data} has {now.counted()}{_renamed(saved, now)})"
    )
    if not allow_changed:
        raise InputError(f"{what}; bring them back, or give --allow-changed-data to go on with another split")
    _LOG.warning("%s; images that it was trained on may now be among those it is validated on", what)


def check_classes(saved: DataRecord, now: DataRecord, folder: Path, data: str) -> None:
    """Refuse other classes, or another order of them: the outputs of the network would mean something else."""
    if saved.classes == now.classes:
        return
    gone = [name for name in saved.classes if name not in now.classes]
    new = [name for name in now.classes if name not in saved.classes]
    changes = [f"{word} {_listed(names)}" for word, names in (("without", gone), ("with the new", new)) if names]
    raise InputError(
        f"{folder} was begun on the classes {_listed(saved.classes)}; {data} is now "
        f"{' and '.join(changes) or 'in another order'}: bring the classes back, or begin anew in another --output"
    )


def digest_of(images: ImageSet, start: int = 0) -> str:
    """The digest of names, from character ``start`` on, and classes, in order."""
    digest = hashlib.sha256()
    for name, target in zip(images.names, images.targets, strict=True):
        digest.update(f"{target}/{name[start:].replace(os.sep, '/')}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _part(images: ImageSet, start: int) -> Part:
    counts = [0] * len(images.classes)
    for target in images.targets:
        counts[target] += 1
    return Part(counts, digest_of(images, start))


def _common_folder(names: Sequence[str]) -> str:
    """What all names begin with: torchvision's data sets name files from the folder that they were downloaded to."""
    return os.path.join(os.path.commonpath([min(names), max(names)]), "")


def _sample(source: DataSource) -> list[tuple[str, int]]:
    names, store, folder = source.train.names, source.train.store, Path(source.name)
    if not isinstance(store, FileStore) or not folder.is_dir():
        return []
    chosen = [names[index * len(names) // _SAMPLE] for index in range(_SAMPLE)]
    sizes = {_utf8(name): size_of(folder / name) for name in chosen}
    return [(name, size) for name, size in sizes.items() if size is not None]


def size_of(path: Path) -> int | None:
    """A file's size in bytes; None where there is none to be had."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _utf8(name: str) -> str:
    """The same bytes as text, whatever encoding the terminal's language has them read in."""
    return name.encode(errors="surrogateescape").decode(errors="surrogateescape")


def _listed(names: Iterable[str]) -> str:
    known = list(map(shown, names))
    return ", ".join(known[:_LISTED]) + (f" and {len(known) - _LISTED} more" if len(known) > _LISTED else "")


def _renamed(saved: DataRecord, now: DataRecord) -> str:
    return ", under other names" if saved.counted() == now.counted() else ""
