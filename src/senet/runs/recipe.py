"""Recipes: how a network is trained, as validated YAML.

A recipe has all settings of a training run except the data, the model, and the seed. It is a file of this package
(``load_recipe("cifar")``) or the user's own (``load_recipe("my.yaml")``). ``key=value`` overrides a single value, with
dots in nested keys: ``schedule.milestones=[0.5,0.75]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from senet.data.transforms import MAX_SIDE
from senet.errors import InputError
from senet.runs.validation import first_problem
from senet.system.yaml_text import parse, write
from senet.text import brief, did_you_mean

MAX_COUNT = 1_000_000  # epochs, or images in a batch
_MAX_RATE = 1e30  # the largest float32 is 3e38
_MAX_BYTES = 2**20  # of a recipe file
_LEAST_MIX = 1e-3  # below it, float32 samples only the mixing ratios 0 and 1, and finally NaN

_BOOLEAN = TypeAdapter(bool)
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(coerce_numbers_to_str=True)]


class _Section(BaseModel):
    # A typo in a recipe must be an error, not a setting that silently keeps its default.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: Any) -> Any:
        listed = value if isinstance(value, (list, tuple)) else [value]
        if cls.model_fields[info.field_name].annotation is not bool and any(isinstance(v, bool) for v in listed):
            raise PydanticCustomError("no_bool", "input should not be true or false")
        return value


class OptimizerRecipe(_Section):
    """The optimizer. ``weight_decay`` covers all parameters, as in the papers, if ``decay_norm_and_bias`` is true."""

    name: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=1e-4, ge=0, le=1e6)
    decay_norm_and_bias: bool = True

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerRecipe:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        return self


class ScheduleRecipe(_Section):
    """The learning rate schedule. ``milestones`` are fractions of the run, so a short run keeps the shape."""

    name: Literal["step", "cosine", "constant"] = "cosine"
    milestones: tuple[Fraction, ...] = ()
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup_epochs: float = Field(default=0.0, ge=0, le=MAX_COUNT)

    @model_validator(mode="after")
    def _milestones_in_order(self) -> ScheduleRecipe:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must be in increasing order")
        if self.name == "step" and not self.milestones:
            raise ValueError("a step schedule needs milestones, as fractions of the run: [0.5, 0.75]")
        if self.name != "step" and self.milestones:
            raise ValueError(f"milestones belong to the step schedule, not to {self.name}")
        return self


class TransformRecipe(_Section):
    """Image size and augmentation. None means a value that fits the data and the model.

    ``mean`` and ``std`` are on the 0..1 scale, with one value per channel or one for all channels.
    """

    augment: Literal["imagenet", "cifar", "shift", "none"] = "imagenet"
    size: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    resize: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: bool = True
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    cutout: int = Field(default=0, ge=0, le=MAX_SIDE)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Recipe(_Section):
    """All settings of a training run. ``batch_size`` is the total over all devices, and ``lr`` is for that batch.

    The learning rate of gates attached by ``--attach`` is ``attached_lr`` times ``lr``.
    """

    name: Name = "custom"
    about: Name = ""
    epochs: int = Field(ge=1, le=MAX_COUNT)
    batch_size: int = Field(ge=1, le=MAX_COUNT)
    lr: float = Field(gt=0, le=_MAX_RATE)
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    transform: TransformRecipe = TransformRecipe()
    dropout: float | None = Field(default=None, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, le=1000)
    cutmix: float = Field(default=0.0, ge=0, le=1000)
    clip_grad_norm: float | None = Field(default=None, gt=0, le=_MAX_RATE)
    accumulate: int = Field(default=1, ge=1, le=MAX_COUNT)
    ema: float | None = Field(default=None, gt=0, lt=1)
    freeze_bn_epochs: int = Field(default=0, ge=0, le=MAX_COUNT)
    attached_lr: float = Field(default=1.0, gt=0, le=1e6)
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    channels_last: bool = False
    compile: Literal["senet", "inductor", "off"] = "senet"

    @model_validator(mode="before")
    @classmethod
    def _precision_as_text(cls, values: Any) -> Any:
        # YAML parses `precision: 32` as a number.
        if isinstance(values, dict) and type(values.get("precision")) is int:
            return {**values, "precision": str(values["precision"])}
        return values

    @model_validator(mode="before")
    @classmethod
    def _compile_of_earlier_recipes(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "compile" not in values:
            return values
        with suppress(ValidationError):  # it was true, false, yes, no, …, for PyTorch's own compiler
            return {**values, "compile": "inductor" if _BOOLEAN.validate_python(values["compile"]) else "off"}
        return values

    @field_validator("mixup", "cutmix")
    @classmethod
    def _off_or_enough(cls, value: float) -> float:
        if 0 < value < _LEAST_MIX:
            raise PydanticCustomError("mix", f"input should be 0, or at least {_LEAST_MIX}")
        return value

    @model_validator(mode="after")
    def _fits_the_run(self) -> Recipe:
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs must be below epochs={self.epochs}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}")
        return self

    def to_yaml(self) -> str:
        """The complete recipe as YAML, which :func:`load_recipe` reads back as an equal recipe."""
        return write(self.model_dump(mode="json"))


def list_recipes() -> list[str]:
    """Names of the packaged recipes."""
    folder = resources.files("senet.runs") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str | Path | Recipe, overrides: Iterable[str] = ()) -> Recipe:
    """A packaged recipe by name, or a YAML file, with ``key=value`` overrides applied in order.

    Raises:
        InputError: No such recipe, invalid YAML, an unknown key (the message suggests the closest one), or a bad value
            (the message names the field).
    """
    if isinstance(source, Recipe):
        where, values = f"recipe {source.name!r}", source.model_dump(mode="json")
    else:
        where, values = _read(source)
    for override in overrides:
        _set(values, override)
    return _validated(values, where)


def _read(source: str | Path) -> tuple[str, dict[str, Any]]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        where, text = f"recipe {path}", _file_text(path)
        default_name = path.stem.encode(errors="replace").decode()  # a file name may not be UTF-8
    else:
        if str(source) not in list_recipes():
            hint = did_you_mean(str(source), list_recipes())
            raise InputError(
                f"no recipe {str(source)!r}; {hint + ' ' if hint else ''}The recipes are {', '.join(list_recipes())}; "
                "or give a .yaml file"
            )
        where, default_name = f"recipe {source!r}", str(source)
        text = (resources.files("senet.runs") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    values = parse(text, where)
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a mapping of keys to values")
    return where, {"name": default_name, **values}


def _file_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"no recipe file {path}") from None
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror or error}") from None
    if len(content) > _MAX_BYTES:
        raise InputError(f"recipe {path} is larger than {_MAX_BYTES} bytes, so it is not a recipe")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is not UTF-8 text") from None


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise InputError(f"--set {brief(override)} is not KEY=VALUE, such as lr=0.1 or schedule.name=cosine")
    _check_known(path)
    node = values
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise InputError(f"--set {brief(override)}: the recipe's own {part} is a single value, not a section")
    node[path[-1]] = parse(text, f"--set {brief(override)}: the value")
    if path == ["schedule", "name"] and text != "step":
        # The milestones of the old schedule have no meaning for another kind of schedule.
        values["schedule"].pop("milestones", None)


def _check_known(path: Sequence[str]) -> None:
    model: type[BaseModel] | None = Recipe
    for depth, part in enumerate(path):
        if model is None:
            raise InputError(f"--set: {'.'.join(path[:depth])} is a single value and has no key {part!r}")
        if part not in model.model_fields:
            raise InputError(f"unknown recipe key {'.'.join(path)!r}; {_nearest('.'.join(path))}")
        model = _section_of(model, part)
    if model is not None:
        raise InputError(f"--set: {'.'.join(path)} is a section; set one of its keys, such as {path[-1]}.name")


def _section_of(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    kind = model.model_fields[field].annotation
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def recipe_keys() -> list[str]:
    """All keys that can be set, with dots in nested keys."""
    keys: list[str] = []
    for name in Recipe.model_fields:
        section = _section_of(Recipe, name)
        keys += [name] if section is None else [f"{name}.{inner}" for inner in section.model_fields]
    return keys


def _nearest(key: str) -> str:
    keys = recipe_keys()
    tails = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    tail = key.rsplit(".", 1)[-1]
    known = f"known keys: {', '.join(keys)}"
    return did_you_mean(key, keys) or did_you_mean(tail, tails, known, quote=lambda name: repr(tails[name]))


def _validated(values: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            key = ".".join(map(str, first["loc"]))
            raise InputError(f"{where}: unknown key {key!r}; {_nearest(key)}") from None
        raise InputError(f"{where}: {first_problem(error, Recipe)}") from None
