"""Options that several commands share, and how KEY=VALUE is read."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from senet.errors import InputError


def finite(value: float | None) -> float | None:
    """Refuse NaN, which lies in any range by typer's reckoning."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


MAX_SIDE = 8192  # as senet.data.transforms has it; a module too heavy to be imported here
MAX_BATCH = 65536

Device = Literal["auto", "cpu", "cuda", "mps"]
OnBad = Literal["skip", "fail"]
Crops = Literal["center", "ten"]

DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
DevicesOption = Annotated[
    int, typer.Option(min=1, max=65536, help="Devices of each machine; the recipe's batch is divided among them.")
]
NodesOption = Annotated[
    int, typer.Option("--num-nodes", min=1, max=65536, help="Machines (start one process on each, or use torchrun).")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=0, max=256, help="Processes that load images. Default: one a core up to 4; none for tiny images."),
]
RootOption = Annotated[str | None, typer.Option(help="Where torchvision data sets are kept. Default: data")]
OnBadOption = Annotated[OnBad, typer.Option("--on-bad-image", help="Skip and name unreadable images, or fail.")]
MaxPixelsOption = Annotated[
    int, typer.Option(min=1, max=10**10, help="Larger images count as unreadable and are not decoded.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: lr=0.1, schedule.name=cosine. Repeatable."),
]
SEOption = Annotated[
    list[str] | None,
    typer.Option("--se", metavar="KEY=VALUE", help="Change the SE block: reduction=8, gate=tanh. Repeatable."),
]
SitesOption = Annotated[
    str, typer.Option(help="Where to attach: auto, all, late, one_per_stage, or module paths with commas.")
]
AttachOption = Annotated[bool, typer.Option("--attach", help="Attach SE to a plain network, see `senet attach`.")]
EpochsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1_000_000, help="Epochs; the schedule keeps its shape. Default: the recipe's."),
]
RecipeOption = Annotated[str | None, typer.Option(help="A recipe's name or .yaml file. Default: what fits.")]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit-batches", min=1, max=2**31 - 1, help="Stop every epoch early, for a dry run."),
]
FractionOption = Annotated[
    float,
    typer.Option(callback=finite, min=0, max=1, help="Share of each class to validate on, if the data has no split."),
]
SeedOption = Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of weights, order and augmentation.")]
ChangedOption = Annotated[
    bool,
    typer.Option(
        "--allow-changed-data", help="Resume although images were added, removed or renamed (never with other classes)."
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier command left in --output.")]
CheckpointOption = Annotated[Path, typer.Option("--checkpoint", "-c", help="Weights: RUN/best.safetensors.")]
CropsOption = Annotated[Crops, typer.Option(help="One centre crop, or the mean over ten crops.")]
SizeOption = Annotated[
    int | None, typer.Option(min=1, max=MAX_SIDE, help="Side of the crop in pixels. Default: as in training.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, max=MAX_BATCH, help="Images at a time.")]


_YES_NO = {"yes": True, "on": True, "no": False, "off": False}


def key_values(entries: list[str] | None, option: str) -> tuple[tuple[str, Any], ...]:
    """``["reduction=8", "bias=false"]`` → ``(("reduction", 8), ("bias", False))``: values are read as YAML.

    No value of these options is text that means yes or no, so ``bias=no`` is taken for ``bias=false``.
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
    """Refuse a recipe that lies in the folder to be overwritten."""
    from senet.runs.outputs import refuse_inside

    if overwrite:
        refuse_inside(output, {"--recipe": recipe})


def attached_name(model: str) -> str:
    """The name of a plain network with gates attached; raises ``InputError`` for one that has SE already."""
    from senet.models.external import ATTACHED
    from senet.models.registry import model_spec

    return model_spec(model.removesuffix(ATTACHED) + ATTACHED).name


def check_changed(allowed: bool, resume: bool) -> None:
    """Refuse --allow-changed-data where nothing is resumed."""
    if allowed and not resume:
        raise InputError("--allow-changed-data goes with --resume")


def check_file(output: Path | None, overwrite: bool) -> None:
    """Refuse a file to write that is there and may not be replaced, or that is a folder."""
    if output is not None and output.is_dir():
        raise InputError(f"{output} is a folder; --output names a file")
    if output is not None and output.exists() and not overwrite:
        raise InputError(f"{output} exists; choose another --output, or --overwrite")


def resume_command(words: Sequence[str], *more: str) -> str:
    """The command as it was given, with --resume in place of --overwrite."""
    kept = [word for word in words if word not in ("--overwrite", "--resume")]
    return shlex.join(["senet", *kept, "--resume", *more])
