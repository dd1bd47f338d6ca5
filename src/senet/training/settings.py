"""What defines a run and what comes out of it, as they are kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from senet.errors import InputError
from senet.models.registry import model_spec
from senet.nn.squeeze_excite import SEConfig
from senet.training import folder as folders
from senet.training.evaluate import pick_device
from senet.training.feed import OnBadImage
from senet.training.recipe import Recipe, load_recipe

# What may differ between the parts of a run without changing what it computes.
_PLACE = ("device", "devices", "num_nodes", "workers", "root")


@dataclass(frozen=True)
class RunSettings:
    """All that defines a run besides its recipe; kept as ``run.json`` in the run's folder.

    ``se`` are values that replace those of the model's own SE configuration. ``limit_batches`` cuts every epoch short,
    for a dry run. A ``model`` that ends in ``+se`` is a plain network to which gates are attached at ``sites``: a
    policy's name, or module paths with commas.
    """

    data: str
    model: str
    seed: int = 0
    se: tuple[tuple[str, Any], ...] = ()
    pretrained: str | None = None
    val_fraction: float = 0.2
    limit_batches: int | None = None
    sites: str = "auto"
    on_bad_image: OnBadImage = "skip"
    root: str | None = None
    workers: int | None = None
    device: str = "auto"
    devices: int = 1
    num_nodes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"se": dict(self.se)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunSettings:
        """Undo ``to_dict``."""
        known = {field.name for field in fields(cls)}
        if not {"data", "model"} <= set(values) <= known:
            raise InputError("the run's settings are damaged or of another version; begin it anew with --overwrite")
        return cls(**values | {"se": tuple(values.get("se", {}).items())})


@dataclass(frozen=True)
class RunResult:
    """What came out: errors in percent, of the last epoch unless it says best."""

    model: str
    seed: int
    epochs: int
    val_error: float
    val_top5_error: float | None
    val_loss: float
    train_error: float
    best_val_error: float
    best_epoch: int
    seconds: float
    val_images: int
    folder: str


def default_recipe(data: str, model: str) -> str:
    """The recipe to take when the user names none."""
    return "digits" if data == "digits" else model_spec(model).recipe


def se_config(model: str, values: Sequence[tuple[str, Any]]) -> SEConfig | None:
    """The model's own SE configuration with some values replaced; None for a plain network."""
    own = model_spec(model).se
    if own is None:
        if values:
            raise InputError(f"{model} is a plain network without SE options; its SE twin is {model_spec(model).twin}")
        return None
    return SEConfig.from_dict(own.to_dict() | dict(values))


def load_result(folder: Path) -> RunResult:
    """The result of a finished run."""
    values = folders.read_json(folder / folders.RESULT)
    if set(values) != {field.name for field in fields(RunResult)}:
        raise InputError(f"{folder / folders.RESULT} is damaged or of another version; use --overwrite")
    return replace(RunResult(**values), folder=str(folder))


def load_run(folder: str | Path) -> tuple[RunSettings, Recipe]:
    """Settings and recipe of the run in a folder."""
    folder = Path(folder)
    if not (folder / folders.SETTINGS).is_file():
        raise InputError(f"{folder} holds no run; give the folder that was the --output of `senet train`")
    return RunSettings.from_dict(folders.read_json(folder / folders.SETTINGS)), load_recipe(folder / "recipe.yaml")


def resumed(settings: RunSettings, recipe: Recipe, output: Path) -> tuple[RunSettings, Recipe]:
    """The saved run, in today's place; another data set, model or recipe would be another run."""
    saved, saved_recipe = load_run(output)
    here = replace(saved, **{name: getattr(settings, name) for name in _PLACE})
    for field in fields(RunSettings):
        if getattr(here, field.name) != getattr(settings, field.name):
            raise InputError(
                f"{output} was started with {field.name}={getattr(here, field.name)!r}, not "
                f"{getattr(settings, field.name)!r}; resume it as it was, or give another --output"
            )
    for key, value in recipe.model_dump(exclude={"name", "about"}).items():
        if saved_recipe.model_dump()[key] != value:
            raise InputError(
                f"{output} was started with another recipe ({key}: {saved_recipe.model_dump()[key]}); "
                "resume it as it was, or give another --output"
            )
    return here, saved_recipe


def check(settings: RunSettings, recipe: Recipe) -> None:
    """Find what is wrong with the settings before a folder is touched; raises InputError."""
    model_spec(settings.model)
    se_config(settings.model, settings.se)
    device = pick_device(settings.device)
    if recipe.precision == "16-mixed" and device.type != "cuda":
        raise InputError("precision 16-mixed needs a CUDA device; use bf16-mixed or 32 on the CPU")
    if settings.devices < 1 or settings.num_nodes < 1:
        raise InputError(f"devices={settings.devices}, num_nodes={settings.num_nodes}: give at least 1 of each")
    if settings.limit_batches is not None and settings.limit_batches < 1:
        raise InputError(f"limit_batches is {settings.limit_batches}; give at least 1")
    processes = settings.devices * settings.num_nodes
    if recipe.batch_size // recipe.accumulate % processes:
        raise InputError(
            f"batch_size={recipe.batch_size} (accumulate={recipe.accumulate}) cannot be divided among {processes} "
            "devices; set it to a multiple"
        )
