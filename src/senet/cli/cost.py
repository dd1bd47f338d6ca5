"""``senet cost``: what a network costs, and the costs that the paper prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from senet.cli import options as opt
from senet.errors import InputError

if TYPE_CHECKING:
    from senet.models.registry import NetworkConfig

Format = Literal["table", "csv", "json"]


def command(
    model: Annotated[str | None, typer.Argument(help="A network from `senet list`, or a weight file of senet.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All networks (counts only, no memory).")] = False,
    vs_paper: Annotated[bool, typer.Option("--vs-paper", help="Compare with the published figures.")] = False,
    per: Annotated[Literal["stage", "block"] | None, typer.Option(help="List the parts of the network, too.")] = None,
    input_size: Annotated[
        int | None, typer.Option(max=opt.MAX_SIDE, help="Side of the image in pixels. Default: the network's own.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="Output format.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write csv or json to this file.")] = None,
    overwrite: opt.OverwriteOption = False,
) -> None:
    """Count parameters, multiply-adds, and feature-map memory for one image, and SE's share of each.

    Example: [cyan]senet cost se_resnet50 --per stage[/], [cyan]senet cost --all --vs-paper[/]
    """
    _check(model, every, vs_paper, per, input_size, form, output, overwrite)
    from senet.cli import cost_tables as tables
    from senet.cli.console import to_output

    console = to_output() if form == "table" else None
    if vs_paper:
        from senet.cost.paper import compared, rows_of

        figures = compared() if model is None else compared(rows_of(_network(model)[0].model))
        records = tables.paper_records(figures)
        if console:
            tables.paper_table(figures, console)
    elif model is None:
        records = tables.zoo_records(input_size)
        if console:
            tables.zoo_table(records, console)
    else:
        records = _one(model, per, input_size, console)
    if form != "table":
        tables.write(records, form, output)


def _one(
    model: str, per: Literal["stage", "block"] | None, input_size: int | None, console: Any
) -> list[dict[str, Any]]:
    """The records of a network and its twin, or of the network's parts."""
    from senet.cli import cost_tables as tables
    from senet.cost.count import image_side
    from senet.cost.parts import config_cost

    config, has_gates = _network(model)
    size = image_side(config.model, input_size)
    plain, gated = (config_cost(side, size, per or "stage") for side in _sides(config, has_gates))
    own = gated if has_gates else plain
    if console:
        tables.twins_table(plain, gated, console)
        if per:
            tables.parts_table(own, console)
    return tables.part_records(own) if per else tables.twin_records(plain, gated)


def _network(model: str) -> tuple[NetworkConfig, bool]:
    """The configuration of a network, given by name or weight file, and whether it has gates."""
    from senet.cost.count import usual_classes
    from senet.models.registry import NetworkConfig, model_spec

    if model.endswith(".safetensors"):
        from senet.weights.load import described_network, load_weights

        state, metadata = load_weights(model)
        config, _ = described_network(metadata, model, state)
    else:
        spec = model_spec(model)
        config = NetworkConfig(model, usual_classes(spec), se=spec.se)
    return config, config.se is not None or config.attached is not None


def _sides(config: NetworkConfig, has_gates: bool) -> tuple[NetworkConfig, NetworkConfig]:
    """The plain network and the one with gates. One of them is ``config``, the other is its twin."""
    from senet.models.external import ATTACHED
    from senet.models.registry import model_spec

    spec = model_spec(config.model)
    plain, se = (spec.name, spec.twin) if spec.se is None else (spec.twin, spec.name)
    bare = replace(config, model=plain, se=None, attached=None, folded=None)
    if config.attached:
        return bare, config
    if se.endswith(ATTACHED):
        raise InputError(
            f"{spec.name}: give a network from `senet list` or a weight file; module_costs counts any other"
        )
    return bare, replace(config, model=se) if has_gates else replace(bare, model=se, se=model_spec(se).se)


def _check(
    model: str | None,
    every: bool,
    vs_paper: bool,
    per: str | None,
    input_size: int | None,
    form: str,
    output: Path | None,
    overwrite: bool,
) -> None:
    if every == (model is not None):
        raise InputError("specify a network: senet cost MODEL, or senet cost --all")
    if per and (every or vs_paper):
        raise InputError(f"--per {per} divides one network; omit {'--all' if every else '--vs-paper'}")
    if vs_paper and input_size is not None:
        raise InputError("--vs-paper counts at the paper's image sizes; omit --input-size")
    if input_size is not None and input_size < 1:
        raise InputError(f"--input-size {input_size} is not allowed; it must be at least 1")
    if output is not None and form == "table":
        raise InputError("--output needs --format csv or --format json")
    opt.check_file(output, overwrite)
