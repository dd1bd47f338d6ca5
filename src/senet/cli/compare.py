"""``senet compare``: does SE help on this data?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from senet.cli import options as opt
from senet.data import MAX_PIXELS
from senet.system.allocator import keep_freed_memory
from senet.text import shown

DEFAULT_MODEL = "se_resnet14"
DEFAULT_OUTPUT = Path("comparison")


def command(
    data: Annotated[str, typer.Option(help="A folder of <class>/*, or digits, cifar10, ...")] = "digits",
    model: Annotated[
        str, typer.Option(help="An SE network or its plain twin; torchvision:NAME, timm:NAME.")
    ] = DEFAULT_MODEL,
    attach: opt.AttachOption = False,
    sites: opt.SitesOption = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results; must be new.")
    ] = DEFAULT_OUTPUT,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each network; one gives no interval.")] = 3,
    recipe: opt.RecipeOption = None,
    epochs: opt.EpochsOption = None,
    changes: opt.SetOption = None,
    se: opt.SEOption = None,
    seed: opt.SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --output.")] = False,
    allow_changed_data: Annotated[
        bool,
        typer.Option("--allow-changed-data", help="With --resume: train runs on other images anew on those of today."),
    ] = False,
    overwrite: opt.OverwriteOption = False,
    device: opt.DeviceOption = "auto",
    workers: opt.WorkersOption = None,
    root: opt.RootOption = None,
    val_fraction: opt.FractionOption = 0.2,
    on_bad_image: opt.OnBadOption = "skip",
    max_pixels: opt.MaxPixelsOption = MAX_PIXELS,
    limit_batches: opt.LimitOption = None,
) -> None:
    """Train an SE network and its plain twin alike, and say whether SE helps.

    Example: [cyan]senet compare --data photos --model se_resnet20 --seeds 3 --epochs 30[/]
    """
    from senet.cli.console import to_errors, to_output
    from senet.cli.tables import comparison_table
    from senet.training.processes import check_processes

    check_processes(devices=1, num_nodes=1)
    from senet.comparison.compare import compare
    from senet.runs.recipe import load_recipe
    from senet.runs.settings import RunSettings, default_recipe
    from senet.training.interrupt import Interrupted

    opt.check_changed(allow_changed_data, resume)
    settings = RunSettings(
        data=data,
        model=opt.attached_name(model) if attach else model,
        sites=sites,
        seed=seed,
        se=opt.key_values(se, "--se"),
        val_fraction=val_fraction,
        limit_batches=limit_batches,
        on_bad_image=on_bad_image,
        max_pixels=max_pixels,
        root=root,
        workers=workers,
        device=device,
    )
    chosen = load_recipe(recipe or default_recipe(data, model), opt.recipe_changes(epochs, changes))
    opt.check_recipe(recipe, output, overwrite)
    keep_freed_memory()
    try:
        comparison = compare(
            settings,
            chosen,
            output,
            seeds=seeds,
            resume=resume,
            overwrite=overwrite,
            allow_changed_data=allow_changed_data,
            console=to_errors(),
        )
    except Interrupted as stop:
        print(shown(f"{stop}; continue with: {opt.resume_command(sys.argv[1:])}"), file=sys.stderr)
        raise
    comparison_table(comparison, to_output())
