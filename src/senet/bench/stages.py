"""Where the tax arises: each stage of a network timed alone, on the input that it gets in the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from senet.acceleration.accelerate import accelerate
from senet.bench.candidates import BASE, CANDIDATES, DTYPES, Runner, Setting, Twins, precision
from senet.models.base import FIRST_STAGE, ConvNet
from senet.ops.dispatch import use_backend
from senet.system.timing import interleaved, ratio

Stage = Callable[[Tensor], Tensor]
_STAGED = ("se-reference", "se-accelerated")


@dataclass(frozen=True)
class StageCost:
    """One stage of one candidate.

    Attributes:
        candidate: its name.
        stage: numbered as in the paper; 2 is the first stage after the stem.
        ms, plain_ms: median time of the stage, for this candidate and for plain eager, in milliseconds.
        share: (ms − plain_ms) ÷ the time of all plain stages, which is what this stage adds to the total.
        over_plain: median of the per-round ratios to plain eager.
    """

    candidate: str
    stage: int
    ms: float
    plain_ms: float
    share: float
    over_plain: float


def stage_costs(setting: Setting, twins: Twins, runners: dict[str, Runner], rounds: int) -> list[StageCost]:
    """Time the stages of SE candidates and of plain eager in turn; empty for networks without stages.

    Each stage of an accelerated network is accelerated by itself, if it is a module.
    """
    names = [n for n in (BASE, *_STAGED) if n in runners and isinstance(runners[n].model, ConvNet)]
    if len(names) < 2 or BASE not in names:
        return []
    steps: dict[str, Callable[[], object]] = {}
    stages: dict[int, list[str]] = {}
    for name in names:
        model = runners[name].model
        assert isinstance(model, ConvNet)
        for number, (stage, entry) in enumerate(entries(model, name, setting, twins), FIRST_STAGE):
            owner: nn.Module = model
            if CANDIDATES[name].home == "accelerated":
                if not isinstance(stage, nn.Module):
                    continue
                stage = owner = accelerate(stage, backend=CANDIDATES[name].backend)
            steps[f"{name}/{number}"] = _step(owner, stage, entry, name, setting)
            stages.setdefault(number, []).append(name)
    times = interleaved(steps, rounds=rounds, warmup=2, device=setting.device)
    total = sum(times[f"{BASE}/{number}"].median for number in stages)
    costs = []
    for number in stages:
        plain = times[f"{BASE}/{number}"]
        for name in stages[number]:
            own = times[f"{name}/{number}"]
            share = (own.median - plain.median) / total
            over = ratio(own, plain).median
            costs.append(StageCost(name, number, 1e3 * own.median, 1e3 * plain.median, share, over))
    return [cost for cost in costs if cost.candidate != BASE]


def entries(model: ConvNet, name: str, setting: Setting, twins: Twins) -> list[tuple[Stage, Tensor]]:
    """The stages and the input of each."""
    x = twins.x if setting.mode == "train" else twins.x.to(DTYPES[setting.dtype])
    pairs = []
    with torch.no_grad(), use_backend(CANDIDATES[name].backend), precision(setting):
        x = model.stem(x)
        for stage in model.stages():
            pairs.append((stage, x))
            x = stage(x)
    return pairs


def _step(owner: nn.Module, stage: Stage, entry: Tensor, name: str, setting: Setting) -> Callable[[], object]:
    backend, train = CANDIDATES[name].backend, setting.mode == "train"
    entry = entry.clone().requires_grad_(train)

    def run() -> None:
        with torch.set_grad_enabled(train), use_backend(backend):
            with precision(setting):
                out = stage(entry)
            if train:
                out.backward(torch.ones_like(out))
                owner.zero_grad(set_to_none=True)
                entry.grad = None

    return run
