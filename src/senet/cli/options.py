"""Options that several commands share, and the parser of KEY=VALUE."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from senet.errors import InputError


def finite(value: float | None) -> float | None:
    """Reject infinity and NaN. typer's range check accepts NaN."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


MAX_SIDE = 8192  # as in senet.data.transforms, which is too heavy to import here
MAX_BATCH = 65536

Device = Literal["auto", "cpu", "cuda", "mps"]
OnBad = Literal["skip", "fail"]
Crops = Literal["center", "ten"]
Compile = Literal["senet", "inductor", "off"]

DeviceOption = Annotated[Device, typer.Option(help="Device to compute on.")]
DevicesOption = Annotated[
    int, typer.Option(min=1, max=65536, help="Devices per machine; the recipe's batch is divided among them.")
]
NodesOption = Annotated[
    int,
    typer.Option(
        "--num-nodes", min=1, max=65536, help="Number of machines (start one process on each, or use torchrun)."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=256, help="Processes that load images. Default: one per core, up to 4; none for tiny images."
    ),
]
RootOption = Annotated[str | None, typer.Option(help="Folder of torchvision's datasets. Default: data")]
OnBadOption = Annotated[OnBad, typer.Option("--on-bad-image", help="Skip and list unreadable images, or fail.")]
MaxPixelsOption = Annotated[
    int, typer.Option(min=1, max=10**10, help="Images with more pixels count as unreadable and are not decoded.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe: lr=0.1, schedule.name=cosine. Repeatable."),
]
SEOption = Annotated[
    list[str] | None,
    typer.Option("--se", metavar="KEY=VALUE", help="Configure the SE block: reduction=8, gate=tanh. Repeatable."),
]
SitesOption = Annotated[
    str, typer.Option(help="Where to attach: auto, all, late, one_per_stage, or comma-separated module paths.")
]
AttachOption = Annotated[bool, typer.Option("--attach", help="Attach SE to a plain network; see `senet attach`.")]
EpochsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1_000_000, help="Number of epochs; the schedule keeps its shape. Default: the recipe's."),
]
RecipeOption = Annotated[
    str | None, typer.Option(help="Name of a recipe, or a .yaml file. Default: chosen by data and network.")
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit-batches", min=1, max=2**31 - 1, help="Maximum number of batches per epoch, for a dry run."),
]
FractionOption = Annotated[
    float,
    typer.Option(
        callback=finite, min=0, max=1, help="Fraction of each class to validate on, if the data has no split."
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of weights, image order, and augmentation.")
]
ChangedOption = Annotated[
    bool,
    typer.Option(
        "--allow-changed-data", help="Resume even if images were added, removed, or renamed (the classes must match)."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the results of an earlier command in --output.")
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", "-c", help="Weight file, such as RUN/best.safetensors.")
]
CropsOption = Annotated[Crops, typer.Option(help="One center crop, or the mean over ten crops.")]
CompileOption = Annotated[
    Compile | None,
    typer.Option(
        "--compile", help="Compiler: this package's, PyTorch's, or none. Default: senet from 256 images on, else off."
    ),
]
RecipeCompileOption = Annotated[
    Compile | None,
    typer.Option("--compile", help="Compiler: this package's, PyTorch's, or none. Default: the recipe's."),
]
SizeOption = Annotated[
    int | None, typer.Option(min=1, max=MAX_SIDE, help="Side of the crop in pixels. Default: as in training.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, max=MAX_BATCH, help="Images per batch.")]


_YES_NO = {"yes": True, "on": True, "no": False, "off": False}


def key_values(entries: list[str] | None, option: str) -> tuple[tuple[str, Any], ...]:
    """``["reduction=8", "bias=false"]`` → ``(("reduction", 8), ("bias", False))``: values are parsed as YAML.

    None of these options takes "yes" or "no" as text, so ``bias=no`` means ``bias=false``.
    """
    from senet.system.yaml_text import parse

    pairs: dict[str, Any] = {}
    for entry in entries or []:
        key, equals, text = entry.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{option} {entry!r} is not KEY=VALUE")
        value = parse(text, f"{option} {entry[:80]!r}: the value")
        pairs[key.strip()] = _YES_NO.get(value.lower(), value) if isinstance(value, str) else value
    return tuple(pairs.items())


def check_recipe(recipe: str | None, output: Path, overwrite: bool) -> None:
    """Reject a recipe inside the folder that will be overwritten."""
    from senet.runs.outputs import refuse_inside

    if overwrite:
        refuse_inside(output, {"--recipe": recipe})


def attached_name(model: str) -> str:
    """The name of a plain network with gates attached. Raises ``InputError`` if the network already has SE."""
    from senet.models.external import ATTACHED
    from senet.models.registry import model_spec

    return model_spec(model.removesuffix(ATTACHED) + ATTACHED).name


def check_changed(allowed: bool, resume: bool) -> None:
    """Reject --allow-changed-data without --resume."""
    if allowed and not resume:
        raise InputError("--allow-changed-data needs --resume")


def check_file(output: Path | None, overwrite: bool) -> None:
    """Reject an output file that is a folder, or that exists and must not be replaced."""
    if output is not None and output.is_dir():
        raise InputError(f"{output} is a folder; give a file as --output")
    if output is not None and output.exists() and not overwrite:
        raise InputError(f"{output} already exists; choose another --output, or use --overwrite")


def resume_command(words: Sequence[str], *more: str) -> str:
    """The given command with --resume instead of --overwrite."""
    kept = [word for word in words if word not in ("--overwrite", "--resume")]
    return shlex.join(["senet", *kept, "--resume", *more])
