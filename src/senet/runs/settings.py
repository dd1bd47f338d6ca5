"""The settings and the result of a run, as stored in the run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from senet.data import MAX_PIXELS
from senet.errors import InputError
from senet.models.registry import model_spec
from senet.nn.squeeze_excite import SEConfig
from senet.runs import folder as folders
from senet.runs.recipe import Recipe, load_recipe
from senet.runs.validation import CLOSED, Text, checked, read
from senet.system.device import pick_device

_LOG = logging.getLogger("senet.runs")
MAX_WORKERS = 256
MAX_DEVICES = 65536
# Settings that may change when a run is resumed, as they do not affect its result. `data_record` checks the data.
_PLACE = ("data", "device", "devices", "num_nodes", "workers", "root")
OnBadImage = Literal["skip", "fail"]
Percent = Annotated[float, Field(strict=True, ge=0, le=100)]


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run besides its recipe, stored as ``run.json`` in the run folder.

    ``se`` overrides values of the model's SE configuration. ``limit_batches`` shortens every epoch, for a dry run. A
    ``model`` that ends in ``+se`` is a plain network with gates attached at ``sites``: the name of a policy, or
    comma-separated module paths.
    """

    __pydantic_config__ = CLOSED

    data: Text
    model: Text
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] = 0
    se: tuple[tuple[str, Any], ...] = ()
    pretrained: Text | None = None
    val_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2
    limit_batches: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None
    sites: Text = "auto"
    on_bad_image: OnBadImage = "skip"
    max_pixels: Annotated[int, Field(strict=True, ge=1)] = MAX_PIXELS
    root: Text | None = None
    workers: Annotated[int, Field(strict=True, ge=0, le=MAX_WORKERS)] | None = None
    device: Text = "auto"
    devices: Annotated[int, Field(strict=True, ge=1, le=MAX_DEVICES)] = 1
    num_nodes: Annotated[int, Field(strict=True, ge=1, le=MAX_DEVICES)] = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"se": dict(self.se)}


@dataclass(frozen=True)
class RunResult:
    """The result of a run. Errors are in percent, from the last epoch unless the name says best."""

    __pydantic_config__ = CLOSED

    model: Text
    seed: Annotated[int, Field(strict=True)]
    epochs: Annotated[int, Field(strict=True, ge=1)]
    val_error: Percent
    val_top5_error: Percent | None
    val_loss: Annotated[float, Field(strict=True)]
    train_error: Percent
    best_val_error: Percent
    best_epoch: Annotated[int, Field(strict=True, ge=1)]
    seconds: Annotated[float, Field(strict=True, ge=0)]
    val_images: Annotated[int, Field(strict=True, ge=1)]
    folder: Text


def default_recipe(data: str, model: str) -> str:
    """The recipe to use if the user gives none."""
    return "digits" if data == "digits" else model_spec(model).recipe


def se_config(model: str, values: Sequence[tuple[str, Any]]) -> SEConfig | None:
    """The SE configuration of the model with some values replaced, or None for a plain network."""
    own = model_spec(model).se
    if own is None:
        if values:
            raise InputError(f"{model} is a plain network without SE options; its SE twin is {model_spec(model).twin}")
        return None
    return SEConfig.from_dict(own.to_dict() | dict(values))


def load_result(folder: Path) -> RunResult:
    """The result of a finished run."""
    return replace(read(folder / folders.RESULT, RunResult), folder=str(folder))


def load_settings(folder: Path) -> RunSettings:
    """The settings of the run in a folder."""
    return read(folder / folders.SETTINGS, RunSettings, pairs_of_se)


def load_run(folder: str | Path) -> tuple[RunSettings, Recipe]:
    """Settings and recipe of the run in a folder."""
    folder = Path(folder)
    if not (folder / folders.SETTINGS).is_file():
        raise InputError(
            f"{folder} holds no run; give the --output folder of `senet train`, or, if that was killed before it "
            "started, repeat the whole command"
        )
    return load_settings(folder), load_recipe(folder / "recipe.yaml")


def pairs_of_se(values: Any) -> Any:
    """Undo ``to_dict``, if the values have the form that it writes."""
    if isinstance(values, dict) and isinstance(values.get("se"), dict):
        return values | {"se": tuple(values["se"].items())}
    return values


def resumed(settings: RunSettings, recipe: Recipe, output: Path) -> tuple[RunSettings, Recipe]:
    """The saved run with the current data and devices. A different model, seed, or recipe raises InputError."""
    saved, saved_recipe = load_run(output)
    same_run(settings, recipe, saved, saved_recipe, output)
    return replace(saved, **{name: getattr(settings, name) for name in _PLACE}), saved_recipe


def same_run(
    settings: RunSettings,
    recipe: Recipe,
    saved: RunSettings,
    saved_recipe: Recipe,
    output: Path,
    ignore: Sequence[str] = (),
) -> None:
    """Reject settings (except data, devices, and ``ignore``) or a recipe that differ from those in ``output``.

    ``compile`` changes the speed alone, and its default has changed: a run keeps its own, and a warning says so.
    """
    for field in fields(RunSettings):
        if field.name in (*_PLACE, *ignore) or getattr(saved, field.name) == getattr(settings, field.name):
            continue
        raise InputError(
            f"{output} was started with {field.name}={getattr(saved, field.name)!r}, not "
            f"{getattr(settings, field.name)!r}; use the original value, or give another --output"
        )
    for key, value in recipe.model_dump(exclude={"name", "about"}).items():
        before = saved_recipe.model_dump()[key]
        if before != value and key == "compile":
            _LOG.warning("%s was started with compile: %s, and keeps it", output, before)
        elif before != value:
            raise InputError(
                f"{output} was started with another recipe ({key}: {before}); "
                "use the original recipe, or give another --output"
            )


def check(settings: RunSettings, recipe: Recipe) -> None:
    """Check the settings before a folder is touched. Raises InputError."""
    checked(RunSettings, {field.name: getattr(settings, field.name) for field in fields(RunSettings)})
    model_spec(settings.model)
    se_config(settings.model, settings.se)
    device = pick_device(settings.device)
    if recipe.precision == "16-mixed" and device.type != "cuda":
        raise InputError("precision 16-mixed needs a CUDA device; use bf16-mixed or 32 on the CPU")
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, settings.devices)
    if settings.devices > there:
        raise InputError(f"devices={settings.devices}, but this machine has {there} {device.type} devices")
    processes = settings.devices * settings.num_nodes
    if recipe.batch_size // recipe.accumulate % processes:
        raise InputError(
            f"batch_size={recipe.batch_size} (accumulate={recipe.accumulate}) cannot be divided among {processes} "
            "devices; set it to a multiple"
        )
