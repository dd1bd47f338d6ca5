"""``senet attach``: where SE goes in a network, and what it costs there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from senet.cli import options as opt
from senet.errors import InputError

if TYPE_CHECKING:
    from senet.attachment.policies import SitePolicy
    from senet.attachment.report import AttachReport

MODEL_HELP = "A network from `senet list`, torchvision:NAME, or timm:NAME."


def command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    sites: opt.SitesOption = "auto",
    se: opt.SEOption = None,
    min_channels: Annotated[
        int | None, typer.Option(max=2**31 - 1, help="Only feature maps with at least this many channels.")
    ] = None,
    last_stages: Annotated[
        int | None, typer.Option(max=2**31 - 1, help="Only this many stages, counted from the end.")
    ] = None,
    max_parameters: Annotated[int | None, typer.Option(max=2**31 - 1, help="Add at most this many parameters.")] = None,
    max_milliseconds: Annotated[
        float | None, typer.Option(callback=opt.finite, help="Add at most this much time per image.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(max=opt.MAX_SIDE, help="Side of the image in pixels. Default: the network's own.")
    ] = None,
    num_classes: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of classes.")] = 1000,
    pretrained: Annotated[str | None, typer.Option(help="Initial weights: a file, or default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the network to this .safetensors file.")
    ] = None,
    overwrite: opt.OverwriteOption = False,
    form: Annotated[Literal["table", "json"], typer.Option("--format", help="Output format.")] = "table",
) -> None:
    """Show where SE blocks go in a network and what they cost; with [bold]--output[/], save the network with them.

    The gates start at exactly 1, so the output of the network does not change until they are trained.

    Example: [cyan]senet attach torchvision:resnet50[/], [cyan]senet attach timm:convnext_tiny --sites late[/]
    """
    if output is not None and output.suffix != ".safetensors":
        raise InputError(f"--output {output}: give a path that ends in .safetensors")
    opt.check_file(output, overwrite)
    from senet.weights.create import create_model

    limits = {
        "min_channels": min_channels,
        "last_stages": last_stages,
        "max_parameters": max_parameters,
        "max_milliseconds": max_milliseconds,
    }
    policy = site_policy(sites, {name: value for name, value in limits.items() if value is not None})
    config = gate_config(se)
    network = create_model(model, num_classes, pretrained=pretrained)
    from senet.attachment.attach import attach

    example = example_for(model, network, size)
    report = attach(network, config, policy, example, dry_run=output is None)
    if output is not None:
        from senet.hub.save import save

        save(network, output)
    if form == "json":
        print_json(model, report)
    else:
        print(f"SE in {model}\n\n{report}" + ("" if output is None else f"\nwritten: {output}"))


def gate_config(se: list[str] | None) -> Any:
    """The ``SEConfig`` of ``--se KEY=VALUE`` options, with ``identity_init=True`` unless they set it."""
    from senet.nn.squeeze_excite import SEConfig

    return SEConfig.from_dict({"identity_init": True, **dict(opt.key_values(se, "--se"))})


def site_policy(sites: str, limits: dict[str, Any]) -> SitePolicy | list[str]:
    """The policy that ``--sites`` and the limits describe, or the module paths that ``--sites`` lists."""
    from dataclasses import replace

    from senet.attachment.policies import policy_of, sites_from

    wanted = sites_from(sites)
    if isinstance(wanted, str):
        return replace(policy_of(wanted), **limits)
    if limits:
        raise InputError(f"--sites names modules; omit --{next(iter(limits)).replace('_', '-')}")
    return wanted


def example_for(name: str, network: Any, size: int | None) -> Any:
    """An image of ``size`` or the network's own size. None if the network is not 2-D: ``attach`` finds its input."""
    import torch
    from torch import nn

    from senet.models.registry import model_spec

    convolution = next((m for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if size is not None and size < 1:
        raise InputError(f"--size {size} is not allowed; it must be at least 1")
    if not isinstance(convolution, nn.Conv2d):
        return None
    side = size or model_spec(name).input_size
    return torch.zeros(1, convolution.in_channels, side, side)


def print_json(name: str, report: AttachReport) -> None:
    """Print the report as JSON."""
    import json

    fields = ("name", "kind", "stage", "channels", "map_size", "placement", "parameters", "mult_adds")
    print(
        json.dumps(
            {
                "model": name,
                "config": report.config.to_dict(),
                "parameters": report.own_parameters,
                "added_parameters": report.added_parameters,
                "mult_adds": report.search.mult_adds,
                "added_mult_adds": report.added_mult_adds,
                "sites": [{field: getattr(site, field) for field in fields} for site in report.sites],
                "fallback": report.search.fallback,
                "skipped": [{"place": place, "reason": reason} for place, reason in report.skipped],
            },
            indent=2,
        )
    )
