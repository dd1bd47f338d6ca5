"""The definition of a comparison, stored as ``compare.json``, which a resume must not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senet.errors import InputError
from senet.runs import folder as folders
from senet.runs.data_record import DataRecord, check_classes, load_record
from senet.runs.outputs import COMPARISON
from senet.runs.recipe import Recipe
from senet.runs.settings import RunSettings, load_result, pairs_of_se, same_run
from senet.runs.validation import CLOSED, Text, read

MARKER = COMPARISON.marker


@dataclass(frozen=True)
class _Saved:
    """``compare.json``. The previous version wrote only the first three fields."""

    __pydantic_config__ = CLOSED

    plain: Text
    se: Text
    data: Text
    settings: RunSettings | None = None
    recipe: Recipe | None = None


def save_comparison(output: Path, plain: str, settings: RunSettings, recipe: Recipe) -> None:
    """Write ``compare.json``. ``settings`` are those of the SE network."""
    values = {"plain": plain, "se": settings.model, "data": settings.data, "settings": settings.to_dict()}
    folders.write_json(output / MARKER, values | {"recipe": recipe.model_dump(mode="json")})


def check_same(output: Path, plain: str, settings: RunSettings, recipe: Recipe) -> Recipe:
    """The recipe of the comparison in ``output``, for all of its runs.

    A resume that differs from it is rejected; the first seed and the devices may differ.
    """
    saved = read(output / MARKER, _Saved, _prepared)
    if (saved.plain, saved.se) != (plain, settings.model):
        raise InputError(
            f"{output} compares {saved.se} with {saved.plain}; resume that comparison, or give another --output"
        )
    if saved.settings is not None and saved.recipe is not None:
        same_run(settings, recipe, saved.settings, saved.recipe, output, ignore=("seed",))
    return saved.recipe or recipe


def _prepared(values: Any) -> Any:
    if isinstance(values, dict) and "settings" in values:
        return values | {"settings": pairs_of_se(values["settings"])}
    return values


def on_other_data(runs: Sequence[Path], now: DataRecord, settings: RunSettings, allow_changed: bool) -> set[Path]:
    """The runs that were trained on different images, which ``allow_changed`` allows to repeat.

    A verdict never pools runs on different data.

    Raises:
        InputError: There are such runs without ``allow_changed``, or the classes differ.
    """
    others: dict[Path, str] = {}
    for run in runs:
        if not (run / folders.SETTINGS).is_file():
            continue
        record = load_record(run)
        if record is not None:
            check_classes(record, now, run, settings.data)
            if not record.same_images(now):
                others[run] = record.counted()
        elif (run / folders.RESULT).is_file() and settings.limit_batches is None:
            # From the previous version, which stored only the number of validation images.
            seen = load_result(run).val_images
            if seen != sum(now.val.counts):
                others[run] = f"{seen} images to validate"
    if others and not allow_changed:
        first, counted = next(iter(others.items()))
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise InputError(
            f"runs on different data cannot be compared: {first}{more} had {counted}, "
            f"{settings.data} now has {now.counted()}; "
            "give another --output, --overwrite to start again, or --allow-changed-data to repeat those runs"
        )
    return set(others)
