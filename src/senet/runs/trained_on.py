"""The images that a network was trained on, which an evaluation must exclude."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from senet.data.images import ImageSet
from senet.errors import InputError
from senet.runs import folder as folders
from senet.runs.data_record import Sample, digest_of, load_record, size_of
from senet.runs.settings import load_settings
from senet.runs.validation import CLOSED, Text, checked


@dataclass(frozen=True)
class TrainedOn:
    """The data of a run, and how to recognize it if it has moved: see ``DataRecord``."""

    __pydantic_config__ = CLOSED

    data: Text
    val_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)]
    sample: Sample = field(default_factory=list)
    val_names: Text | None = None

    def is_in(self, folder: Path) -> bool:
        """Whether the training images are in this folder: it is the run's own, or has most of the sample files."""
        if Path(self.data) == folder.resolve():
            return True
        return 2 * sum(size_of(folder / name) == size for name, size in self.sample) > len(self.sample)

    def differs(self, val: ImageSet) -> bool:
        """Whether the validation images are known to differ from those of the run."""
        return self.val_names is not None and digest_of(val) != self.val_names


def trained_on(checkpoint: Path, metadata: dict[str, Any]) -> TrainedOn | None:
    """The data that a network was trained on, from its run folder or its own file. None if unknown."""
    folder = checkpoint.parent
    if (folder / folders.SETTINGS).is_file():
        settings, record = load_settings(folder), load_record(folder)
        known = (record.sample, record.val.names) if record else ([], None)
        return TrainedOn(settings.data, settings.val_fraction, *known)
    saved = metadata.get("trained_on")
    if saved is None:
        return None
    try:
        return checked(TrainedOn, saved)
    except InputError as error:
        raise InputError(f"{checkpoint}: its metadata are damaged (trained_on: {error}); save it again") from None
