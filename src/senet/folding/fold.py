"""``senet.fold``: remove gates from a network, by name or within an accuracy budget."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from senet.acceleration.accelerate import is_accelerated
from senet.errors import InputError
from senet.folding.apply import Folder
from senet.folding.report import FoldReport, FoldStep
from senet.folding.search import Evaluate, Measure, Progress, accuracy_of, search
from senet.inspection.excitations import Excitations
from senet.surgery.find_gates import Gate, find_gates, plain_network


def fold(
    model: nn.Module,
    excitations: Excitations,
    sites: str | Sequence[str] = "*",
    *,
    stage: int | None = None,
    evaluate: Evaluate | Iterable[Any] | None = None,
    max_drop: float | None = None,
    constants: bool = False,
    measure: Measure | None = None,
    example_input: Any = None,
    progress: Progress | None = None,
) -> FoldReport:
    """Replace gates with their mean excitation and fold these constants into other weights, in a copy of the network.

    A gate held at its mean g (C,) over ``excitations`` is one factor per channel. The factors move into the norm,
    convolution, or linear layer before the gate, or into the input channels of the layers after it
    (``senet.folding.plan``). A check in float64 proves that the result equals the network with constant gates. The cost
    is the benefit of the gate's movement from image to image, which ``evaluate`` measures.

    With ``evaluate``, gates are tried in the order of their movement, least first, and the accuracy is measured after
    each one. With ``max_drop``, a fold that would exceed the limit is rejected, and the search continues without it.

    Args:
        model: any network with SE gates (ours, timm's, torchvision's, attached ones), in any mode. It is not changed.
        excitations: the excitations of this network, from ``senet.record_excitations``.
        sites: a shell pattern of gate names, such as ``"layer4.*"``, or a list of names.
        stage: fold only gates of this stage. Feature maps of the same size form a stage; the largest is stage 2, as in
            the paper.
        evaluate: a function that returns a network's accuracy in percent, or a loader of (images, targets) for the
            top-1 accuracy.
        max_drop: maximum loss of accuracy, in the unit of ``evaluate`` (percentage points).
        constants: replace gates that do not fold exactly with a ``ConstantGate``. Otherwise, they stay, and the report
            gives the reason.
        measure: a function of two networks that returns the time of the second ÷ the first, as (quartile, median,
            quartile).
        example_input: an input of the network, as in ``senet.attach``; None means a guess.
        progress: called as ``progress(done, total, gate)`` before each measurement.

    Returns:
        the report. Its ``network`` is the copy, an ordinary network that saves, exports, and trains.

    Raises:
        InputError: no matching gates; excitations of another network, or with NaN; ``max_drop`` without ``evaluate``;
            an accelerated network, or one on the meta device.
    """
    if max_drop is not None and (evaluate is None or not max_drop >= 0):
        raise InputError(f"fold: max_drop={max_drop} requires evaluate= and a value of at least 0")
    network, gates = _opened(model)
    names = _named(gates, sites)
    by = _constants(gates, excitations)
    # Compiled parts run eagerly, because compiled code does not call hooks that were added later.
    with torch.compiler.set_stance("force_eager"), torch.inference_mode(False):
        folder = Folder(network, by, constants, example_input)
    chosen = _of_stage(folder, names, stage)
    missing = [name for name in chosen if name not in by]
    if missing and not isinstance(sites, str):
        raise InputError(f"fold: {missing[0]!r} is not among the {len(by)} recorded gates; record it too")
    variations = {name: excitations[name].variation() for name in by}
    candidates = [name for name in sorted(by, key=variations.__getitem__) if name in chosen]
    if not constants:
        candidates = [name for name in candidates if name in folder.plans]
    steps: Sequence[FoldStep] = ()
    if evaluate is not None:
        function = evaluate if callable(evaluate) else accuracy_of(evaluate)
        steps = search(folder, candidates, variations, function, max_drop, measure, progress)
        candidates = [step.site for step in steps if step.site and step.kept]
    folded = folder.apply(candidates)
    counts = [sum(p.numel() for p in each.parameters()) for each in (network, folded)]
    refused = {step.site for step in steps if not step.kept}
    found = folder.sites(candidates, refused, variations)
    return FoldReport(folded, type(network).__name__, found, tuple(steps), (counts[0], counts[1]), max_drop)


def _opened(model: nn.Module) -> tuple[nn.Module, list[Gate]]:
    """The network without its wrappers, and its gates."""
    if is_accelerated(model):
        raise InputError("fold: the network is accelerated; fold the original network, then accelerate the result")
    network = plain_network(model)
    gates = find_gates(network)
    if not gates:
        raise InputError(f"fold: {type(network).__name__} has no SE gates, so there is nothing to fold")
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise InputError("fold: the network is on the meta device and has no weights; load them before folding")
    return network, gates


def _named(gates: list[Gate], sites: str | Sequence[str]) -> list[str]:
    known = [gate.name for gate in gates]
    if isinstance(sites, str):
        found = fnmatch.filter(known, sites)
        if not found:
            raise InputError(
                f"fold: no gate matches {sites!r}; there are {len(known)} gates, the first is {known[0]!r}"
            )
        return found
    for name in sites:
        if name not in known:
            raise InputError(
                f"fold: there is no gate {name!r}; there are {len(known)} gates, the first is {known[0]!r}"
            )
    if not sites:
        raise InputError("fold: sites is empty; give a pattern or a list of names")
    return list(sites)


def _of_stage(folder: Folder, names: list[str], stage: int | None) -> list[str]:
    if stage is None:
        return names
    stages = folder.stages()
    found = [name for name in names if stages[name][0] == stage]
    if not found:
        known = ", ".join(map(str, sorted({number for number, _ in stages.values() if number})))
        raise InputError(f"fold: there is no gate in stage {stage}; choose one of {known}")
    return found


def _constants(gates: Sequence[Gate], excitations: Excitations) -> dict[str, Tensor]:
    """The mean excitation of each recorded gate, (C,) float64, in the network's order."""
    channels: Mapping[str, int] = {gate.name: gate.channels for gate in gates}
    for site in excitations:
        if site.name not in channels:
            raise InputError(
                f"fold: the excitations belong to another network: this has no gate {site.name!r}; record them again"
            )
        if site.channels != channels[site.name]:
            raise InputError(
                f"fold: the excitations belong to another network: {site.name!r} has {site.channels} channels there "
                f"and {channels[site.name]} here; record them again"
            )
        mean, _ = site.overall()
        if not np.isfinite(mean).all():
            raise InputError(f"fold: the excitations of {site.name!r} are NaN or empty; record them again")
    if not len(excitations):
        raise InputError("fold: no gate was recorded; record the excitations again")
    return {name: torch.from_numpy(excitations[name].overall()[0]) for name in channels if name in excitations.sites}
