"""Groups of options that several commands share, as dataclasses. ``options`` defines each option."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from senet.cli import options as opt
from senet.data import MAX_PIXELS

_OPTIONS: dict[str, Any] = {
    "recipe": opt.RecipeOption,
    "epochs": opt.EpochsOption,
    "compile": opt.RecipeCompileOption,
    "changes": opt.SetOption,
    "se": opt.SEOption,
    "attach": opt.AttachOption,
    "sites": opt.SitesOption,
    "device": opt.DeviceOption,
    "devices": opt.DevicesOption,
    "num_nodes": opt.NodesOption,
    "workers": opt.WorkersOption,
    "root": opt.RootOption,
    "val_fraction": opt.FractionOption,
    "on_bad_image": opt.OnBadOption,
    "max_pixels": opt.MaxPixelsOption,
    "limit_batches": opt.LimitOption,
    "size": opt.SizeOption,
    "batch_size": opt.BatchOption,
}


@dataclass(frozen=True)
class Training:
    """The recipe and the configuration of the gates."""

    recipe: str | None = None
    epochs: int | None = None
    compile: opt.Compile | None = None
    changes: list[str] | None = None
    se: list[str] | None = None

    def is_given(self) -> bool:
        """Whether any of these options is given."""
        return self.epochs is not None or bool(self.recipe or self.compile or self.changes or self.se)

    def recipe_changes(self) -> list[str]:
        """The recipe's overrides in order; ``--epochs`` is short for ``--set epochs=``, and so is ``--compile``."""
        short = {"epochs": self.epochs, "compile": self.compile}
        return [f"{key}={value}" for key, value in short.items() if value is not None] + list(self.changes or [])


@dataclass(frozen=True)
class Attaching:
    """Whether to attach gates to a plain network, and where."""

    attach: bool = False
    sites: str = "auto"


@dataclass(frozen=True)
class Place:
    """The devices of a run."""

    device: opt.Device = "auto"
    devices: int = 1
    num_nodes: int = 1


@dataclass(frozen=True)
class Images:
    """How a run reads its images, and how many."""

    workers: int | None = None
    root: str | None = None
    val_fraction: float = 0.2
    on_bad_image: Literal["skip", "fail"] = "skip"
    max_pixels: int = MAX_PIXELS
    limit_batches: int | None = None


class Without:
    """Annotates a group: the command lacks these options of it."""

    def __init__(self, *names: str) -> None:
        self.names = names


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Expand the arguments of a command that are groups, so that typer sees each field as an option."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    taken: dict[str, list[str]] = {}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        left_out = [name for each in get_args(kind)[1:] if isinstance(each, Without) for name in each.names]
        kind = get_args(kind)[0] if left_out and get_origin(kind) is Annotated else kind
        if not is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind
        taken[parameter.name] = [field.name for field in fields(kind) if field.name not in left_out]
        parameters += [
            inspect.Parameter(field.name, parameter.kind, default=field.default, annotation=_OPTIONS[field.name])
            for field in fields(kind)
            if field.name not in left_out
        ]

    @functools.wraps(command)
    def ungrouped(**values: Any) -> Any:
        for name, kind in groups.items():
            values[name] = kind(**{option: values.pop(option) for option in taken[name]})
        return command(**values)

    ungrouped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    ungrouped.__annotations__ = {}
    return ungrouped
