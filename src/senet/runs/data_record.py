"""A record of a run's data, stored with its settings, by which a resumed run or an evaluation recognizes the data."""

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
_SAMPLE = 32  # training files that identify a folder, even if it has moved
_LISTED = 5  # classes named in a message
Number = Annotated[int, Field(strict=True, ge=0)]
Sample = list[tuple[Text, Number]]


@dataclass(frozen=True)
class Part:
    """The training or validation images: the number of images per class, and a digest of their names in order."""

    __pydantic_config__ = CLOSED

    counts: list[Number]
    names: Text


@dataclass(frozen=True)
class DataRecord:
    """The data of a run, as stored in ``data.json``.

    Names are relative to the data folder, so the folder may move. ``sample`` has some of the training files with their
    sizes in bytes. It is empty if the data is not a folder.
    """

    __pydantic_config__ = CLOSED

    classes: list[Text]
    train: Part
    val: Part
    sample: Sample

    def counted(self) -> str:
        """The numbers of images, as text."""
        return f"{sum(self.train.counts)} images to train and {sum(self.val.counts)} to validate"

    def same_images(self, other: DataRecord) -> bool:
        """Whether both records have the same images, by name and class."""
        return (self.classes, self.train, self.val) == (other.classes, other.train, other.val)


def record_of(source: DataSource) -> DataRecord:
    """The record of ``source``."""
    folder = Path(source.name).is_dir()
    start = 0 if folder else len(_common_folder([*source.train.names, *source.val.names]))
    train, val = (_part(images, start) for images in (source.train, source.val))
    return DataRecord([_utf8(name) for name in source.classes], train, val, _sample(source))


def save_record(folder: Path, record: DataRecord) -> None:
    """Write ``data.json`` to a run folder."""
    folders.write_json(folder / folders.DATA, asdict(record))


def load_record(folder: Path) -> DataRecord | None:
    """The record in a run folder, or None for a run of an earlier version, which stored none."""
    path = folder / folders.DATA
    return read(path, DataRecord) if path.is_file() else None


def check_data(folder: Path, now: DataRecord, data: str, *, moved: bool, allow_changed: bool) -> None:
    """Reject a resume of the run in ``folder`` on data that differs from the original data.

    Args:
        folder: The run folder.
        now: The record of ``data`` at present.
        data: The data, as the user names it.
        moved: Whether the run started with a different name of the data.
        allow_changed: Accept different images (of the same classes), with a warning.

    Raises:
        InputError: The data differs.
    """
    saved = load_record(folder)
    if moved and not (Path(data).is_dir() and (saved is None or saved.sample)):
        raise InputError(
            f"{folder} was started on other data than {data}; give its original data, or the new folder of it"
        )
    if saved is None:
        if moved and not allow_changed:
            raise InputError(
                f"{folder} is from a version that kept no record of its data, so {data} cannot be verified; "
                "give the original data, or --allow-changed-data"
            )
        return
    check_classes(saved, now, folder, data)
    if saved.same_images(now):
        return
    what = (
        f"{folder} was started on other images ({saved.counted()}; "
        f"now {data} has {now.counted()}{_renamed(saved, now)})"
    )
    if not allow_changed:
        raise InputError(f"{what}; restore them, or give --allow-changed-data to continue with a different split")
    _LOG.warning("%s; images that were used for training may now be used for validation", what)


def check_classes(saved: DataRecord, now: DataRecord, folder: Path, data: str) -> None:
    """Reject different classes, or a different order, as the network's outputs would change their meaning."""
    if saved.classes == now.classes:
        return
    gone = [name for name in saved.classes if name not in now.classes]
    new = [name for name in now.classes if name not in saved.classes]
    changes = [f"{word} {_listed(names)}" for word, names in (("without", gone), ("with the new", new)) if names]
    raise InputError(
        f"{folder} was started on the classes {_listed(saved.classes)}; {data} is now "
        f"{' and '.join(changes) or 'in another order'}: restore the classes, or start again in another --output"
    )


def digest_of(images: ImageSet, start: int = 0) -> str:
    """The digest of all names (from character ``start`` on) and classes, in order."""
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
    """The common start of all names. In torchvision's datasets, names start with the download folder."""
    return os.path.join(os.path.commonpath([min(names), max(names)]), "")


def _sample(source: DataSource) -> list[tuple[str, int]]:
    names, store, folder = source.train.names, source.train.store, Path(source.name)
    if not isinstance(store, FileStore) or not folder.is_dir():
        return []
    chosen = [names[index * len(names) // _SAMPLE] for index in range(_SAMPLE)]
    sizes = {_utf8(name): size_of(folder / name) for name in chosen}
    return [(name, size) for name, size in sizes.items() if size is not None]


def size_of(path: Path) -> int | None:
    """The size of a file in bytes, or None if it cannot be read."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _utf8(name: str) -> str:
    """Decode the bytes of a file name as UTF-8, independently of the locale."""
    return name.encode(errors="surrogateescape").decode(errors="surrogateescape")


def _listed(names: Iterable[str]) -> str:
    known = list(map(shown, names))
    return ", ".join(known[:_LISTED]) + (f" and {len(known) - _LISTED} more" if len(known) > _LISTED else "")


def _renamed(saved: DataRecord, now: DataRecord) -> str:
    return ", under other names" if saved.counted() == now.counted() else ""
