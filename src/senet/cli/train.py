"""``senet train``: train one network."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from senet.cli import options as opt
from senet.cli.groups import Attaching, Images, Place, Training, grouped
from senet.errors import InputError
from senet.system.allocator import keep_freed_memory
from senet.text import shown

if TYPE_CHECKING:
    from senet.runs.recipe import Recipe
    from senet.runs.settings import RunSettings


@grouped
def command(
    *,
    run: Annotated[Path | None, typer.Argument(help="With --resume: the run folder.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Folder of <class>/* images, or digits, cifar10, ...")] = None,
    model: Annotated[str | None, typer.Option(help="A name from `senet list`, torchvision:NAME, or timm:NAME.")] = None,
    gates: Attaching,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; must be new.")] = None,
    training: Training,
    pretrained: Annotated[str | None, typer.Option(help="Initial weights: default, a file, timm:…")] = None,
    seed: opt.SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run: --resume RUN.")] = False,
    allow_changed_data: opt.ChangedOption = False,
    overwrite: opt.OverwriteOption = False,
    place: Place,
    images: Images,
) -> None:
    """Train a network. Ctrl-C saves its state, and [bold]--resume[/] continues to the same result.

    Example: [cyan]senet train --data photos --model se_resnet20 --epochs 30 --output run[/]
    """
    from senet.cli.console import to_errors, to_output
    from senet.cli.tables import run_summary
    from senet.training.interrupt import Interrupted
    from senet.training.processes import check_processes, is_first_process

    check_processes(place.devices, place.num_nodes)
    from senet.runs.recipe import load_recipe
    from senet.runs.settings import RunSettings, default_recipe
    from senet.training.run import train

    folder = _folder(run, output, resume)
    opt.check_changed(allow_changed_data, resume)
    if resume and model is None:
        if training.is_given() or pretrained or gates.attach:
            raise InputError(
                "a resumed run keeps its recipe; omit --epochs, --compile, --set, --se, --recipe, --pretrained, and "
                "--attach"
            )
        moved = {} if data is None else {"data": data}
        settings, chosen = _saved(folder, **vars(place), workers=images.workers, root=images.root, **moved)
    else:
        if data is None or model is None:
            raise InputError("specify what to train: --model NAME --data FOLDER")
        changes = training.recipe_changes()
        if gates.attach:
            model = opt.attached_name(model)
            if pretrained is not None:
                changes = ["attached_lr=10", *changes]  # the network is trained already, its gates are not
        settings = RunSettings(
            data=data,
            model=model,
            sites=gates.sites,
            seed=seed,
            se=opt.key_values(training.se, "--se"),
            pretrained=pretrained,
            **vars(images),
            **vars(place),
        )
        chosen = load_recipe(training.recipe or default_recipe(data, model), changes)
        opt.check_recipe(training.recipe, folder, overwrite)
    keep_freed_memory()
    try:
        how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "allow_changed_data": allow_changed_data}
        result = train(settings, chosen, folder, console=to_errors(), **how)
    except Interrupted as stop:
        if is_first_process():
            print(shown(f"{stop}; continue with: senet train --resume {shlex.quote(str(folder))}"), file=sys.stderr)
        raise
    if is_first_process():
        to_output().print(run_summary(result), highlight=False)


def _saved(folder: Path, **place: Any) -> tuple[RunSettings, Recipe]:
    """Settings and recipe of the run in a folder, with ``place`` instead of where it ran before."""
    from senet.runs.settings import load_run

    settings, recipe = load_run(folder)
    return replace(settings, **place), recipe


def _folder(run: Path | None, output: Path | None, resume: bool) -> Path:
    """The run folder, from the argument or the option."""
    if run is not None and (not resume or output is not None):
        raise InputError(
            f"unexpected argument {str(run)!r}; use --resume RUN to resume a run, --output RUN for a new one"
        )
    folder = output or run
    if folder is None:
        raise InputError("specify the run folder: --output RUN for a new run, or --resume RUN to continue one")
    return folder
