"""``senet.attach`` and ``senet.detach``: SE blocks into a network that exists, and out again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from senet.errors import InputError
from senet.gates.accelerate import Accelerated
from senet.gates.attach_report import AttachReport
from senet.gates.policies import SitePolicy
from senet.gates.sites import Site, search
from senet.nn.attachment import attach_all, attached, detach_all
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite

IDENTITY = SEConfig(identity_init=True)


def attach(
    model: nn.Module,
    config: SEConfig = IDENTITY,
    sites: str | SitePolicy | Sequence[str] = "auto",
    example_input: Any = None,
    dry_run: bool = False,
) -> AttachReport:
    """Put SE blocks into any convolutional network, in place.

    With ``identity_init`` every gate starts at exactly 1: the output stays what it was, bit for bit, in evaluation and
    in training, until the gates have learned something. The network keeps its classes, parameters, hooks and keys; a
    gate at module ``layer1.0.bn3`` has the keys ``layer1.0.bn3.se.…``. Copies, pickles, ``torch.compile``,
    ``torch.export`` and ONNX export work as before; DistributedDataParallel and ``torch.compile`` come after attaching.

    Sites are found by the data flow of a run on ``example_input`` (see ``senet.gates.patterns``), in evaluation mode
    and without traces in statistics, modes, gradients or random generators.

    Args:
        model: 1-D, 2-D or 3-D; a classifier, detector, segmenter or anything else that computes on maps (N, C, *S).
        config: the block. ``placement`` says where it sits in residual blocks (Fig. 5), ``stages`` which stages get
            one: maps of one size are a stage, the largest is number 2 as in the paper.
        sites: ``"auto"``: one in each block; ``"all"``: behind each convolution and activation too; ``"late"``: the
            last two stages; ``"one_per_stage"``; a ``SitePolicy``; or a list of modules whose output to rescale
            (``"path:input"``: what they take).
        example_input: a tensor, a tuple of arguments or a dict of keywords; None: guessed from the first convolution.
        dry_run: report what would be done and change nothing.

    Returns:
        what was attached and what it costs; ``print`` shows a table, ``parameters()`` gives the new parameters.

    Raises:
        InputError: no site was found; the network does not run on the example, or is wrapped, compiled or accelerated;
            or it has attached gates of the same configuration. Gates of another configuration are replaced.
    """
    _check(model)
    before = attached(model)
    if before and not dry_run and all(getattr(se, "config", None) == config for se in before.values()):
        raise InputError(
            f"attach: {len(before)} gates of this configuration are attached already; detach them first, "
            "or give another config, which replaces them"
        )
    removed = detach_all(model)
    try:
        found = search(model, config, sites, example_input)
        gates = {} if dry_run else {site.name: _gate(site, config, model) for site in found.sites}
    except BaseException:
        attach_all(model, removed)
        raise
    own = list(model.parameters())
    attach_all(model, removed if dry_run else gates)
    return AttachReport(type(model).__name__, config, found, tuple(gates.values()), tuple(own))


def detach(model: nn.Module) -> list[str]:
    """Take every attached gate out again; the network is what it was before ``senet.attach``, if not trained since.

    Returns:
        the names of the sites that had one; an empty list where nothing was attached.
    """
    _check(model)
    return list(detach_all(model))


def _check(model: nn.Module) -> None:
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise InputError(
            f"attach: the model is wrapped in {type(model).__name__}; attach to model.module before wrapping"
        )
    if "_orig_mod" in model._modules:  # asking for the class would load the compiler
        raise InputError("attach: the model is compiled; attach to the ordinary model, then compile it")
    if isinstance(model, Accelerated):
        raise InputError("attach: the model is accelerated; attach to the ordinary model, then accelerate it")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("attach: the model is TorchScript, which cannot be changed; attach before scripting")


def _gate(site: Site, config: SEConfig, model: nn.Module) -> SqueezeExcite:
    gate = SqueezeExcite(site.channels, config)
    gate.train(model.get_submodule(site.path).training)
    return gate.to_empty(device="meta") if site.device.type == "meta" else gate.to(site.device, site.dtype)
