"""``senet.attach`` and ``senet.detach``: add SE blocks to an existing network, and remove them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from senet.acceleration.accelerate import is_accelerated
from senet.attachment.policies import SitePolicy
from senet.attachment.report import AttachReport
from senet.attachment.site import Site
from senet.attachment.sites import check_is_network, search
from senet.errors import InputError
from senet.nn.attachment import attach_all, attached, detach_all, without_gates
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite

IDENTITY = SEConfig(identity_init=True)


def attach(
    model: nn.Module,
    config: SEConfig = IDENTITY,
    sites: str | SitePolicy | Sequence[str] = "auto",
    example_input: Any = None,
    dry_run: bool = False,
) -> AttachReport:
    """Add SE blocks to any convolutional network, in place.

    With ``identity_init``, every gate starts at exactly 1: in evaluation and in training, the output does not change by
    a bit until the gates are trained. The network keeps its parameters, hooks, and keys. A gate at module
    ``layer1.0.bn3`` has the keys ``layer1.0.bn3.se.…``. Copies, pickles, ``torch.compile``, ``torch.export``, and ONNX
    export still work. Apply DistributedDataParallel and ``torch.compile`` after attaching. If a helper replaces a
    module that has a gate, the new module gets the gate, or the next call raises ``InputError``.

    Sites are found in the data flow of a run on ``example_input`` (see ``senet.attachment.patterns``). It runs in
    evaluation mode, and does not change statistics, modes, gradients, or random generators.

    Args:
        model: a 1-D, 2-D, or 3-D classifier, detector, segmentation network, or any other network that computes
            feature maps (N, C, *spatial).
        config: the configuration of the SE blocks. ``placement`` is their position in residual blocks (Fig. 5).
            ``stages`` selects stages: feature maps of the same size form a stage, and the largest is stage 2, as in
            the paper.
        sites: ``"auto"``: one site per block; ``"all"``: also after each convolution and activation; ``"late"``: the
            last two stages; ``"one_per_stage"``; a ``SitePolicy``; or a list of modules whose output to rescale
            (``"path:input"`` for the input).
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments; None to guess an input from the
            first convolution.
        dry_run: report the sites without changing the network.

    Returns:
        a report of the gates and their cost. ``print`` shows a table; ``parameters()`` returns the new parameters.

    Raises:
        InputError: no site was found; the network does not run on the example, or is wrapped, compiled, or
            accelerated; or it has attached gates with the same configuration. Gates with a different configuration are
            replaced.
    """
    _check(model, "attach to")
    before = attached(model)
    if before and not dry_run and all(getattr(se, "config", None) == config for se in before.values()):
        raise InputError(
            f"attach: {len(before)} gates with this configuration are already attached; detach them first, "
            "or pass a different config, which replaces them"
        )
    with torch.inference_mode(False), without_gates(model):  # parameters created in inference mode cannot be trained
        found = search(model, config, sites, example_input)
        own = list(model.parameters())
        gates = {} if dry_run else {site.name: _gate(site, config, model) for site in found.sites}
    if gates:
        detach_all(model)
        attach_all(model, gates)
    return AttachReport(type(model).__name__, config, found, tuple(gates.values()), tuple(own))


def detach(model: nn.Module) -> list[str]:
    """Remove all attached gates. If it was not trained since, the network is the same as before ``senet.attach``.

    Returns:
        the names of the sites that had a gate; empty if nothing was attached.
    """
    _check(model, "detach from")
    return list(detach_all(model))


def _check(model: Any, verb: str) -> None:
    """Reject models that would ignore the change: compiled code keeps the hooks of its first run."""
    what = verb.split()[0]
    check_is_network(model, what)
    if isinstance(model, DataParallel):
        raise InputError(f"{what}: the model is wrapped in DataParallel; {verb} model.module before wrapping")
    if is_accelerated(model):
        raise InputError(f"{what}: the model is accelerated; {verb} the ordinary model, then accelerate it")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{what}: the model is TorchScript, which cannot be modified; {verb} it before scripting")
    for path, module in model.named_modules():
        part = f"the model's {path!r}" if path else "the model"
        if isinstance(module, DistributedDataParallel):
            inner = f"model.{path}.module" if path else "model.module"
            raise InputError(f"{what}: {part} is wrapped in {type(module).__name__}; {verb} {inner} before wrapping")
        # Importing the class of compiled modules would load the compiler.
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(f"{what}: {part} is compiled; {verb} the ordinary model, then compile it")


def _gate(site: Site, config: SEConfig, model: nn.Module) -> SqueezeExcite:
    gate = SqueezeExcite(site.channels, config)
    gate.train(model.get_submodule(site.path).training)
    if site.device.type == "meta":
        return gate.to_empty(device="meta")
    # Under autocast, the feature map may have a dtype that no parameter has.
    own = list(dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point()))
    return gate.to(site.device, site.dtype if site.dtype in own or not own else own[0])
