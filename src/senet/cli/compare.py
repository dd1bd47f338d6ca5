"""``senet compare``: does SE help on this data?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from senet.cli import options as opt
from senet.cli.groups import Attaching, Images, Place, Training, Without, grouped
from senet.system.allocator import keep_freed_memory
from senet.text import shown

DEFAULT_MODEL = "se_resnet14"
DEFAULT_OUTPUT = Path("comparison")


@grouped
def command(
    *,
    data: Annotated[str, typer.Option(help="Folder of <class>/* images, or digits, cifar10, ...")] = "digits",
    model: Annotated[
        str, typer.Option(help="An SE network or its plain twin, torchvision:NAME, or timm:NAME.")
    ] = DEFAULT_MODEL,
    gates: Attaching,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results; must be new.")
    ] = DEFAULT_OUTPUT,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs per network; a single run gives no interval.")] = 3,
    training: Training,
    seed: opt.SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the comparison in --output.")] = False,
    allow_changed_data: Annotated[
        bool,
        typer.Option("--allow-changed-data", help="With --resume: repeat the runs whose images have changed since."),
    ] = False,
    overwrite: opt.OverwriteOption = False,
    place: Annotated[Place, Without("devices", "num_nodes")],
    images: Images,
) -> None:
    """Train an SE network and its plain twin under equal conditions, and report whether SE helps.

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
        model=opt.attached_name(model) if gates.attach else model,
        sites=gates.sites,
        seed=seed,
        se=opt.key_values(training.se, "--se"),
        **vars(images),
        **vars(place),
    )
    chosen = load_recipe(training.recipe or default_recipe(data, model), training.recipe_changes())
    opt.check_recipe(training.recipe, output, overwrite)
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
