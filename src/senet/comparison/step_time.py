"""Times a training step of both twins, interleaved, so that drift of the machine affects both equally."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from senet.data.sources import DataSource
from senet.runs.recipe import Recipe
from senet.runs.settings import RunSettings
from senet.system.device import pick_device
from senet.system.timing import Ratio, interleaved, ratio
from senet.training.classifier import build_optimizer
from senet.training.interrupt import Interrupted, StopRequest
from senet.training.run import build_classifier

BUDGET = 12.0  # seconds for all rounds
ROUNDS = (5, 40)
CPU_BATCH = 128  # on a CPU, larger batches take the same time per image, but longer to measure


@dataclass(frozen=True)
class StepTimes:
    """Seconds of each model's fastest step, and the ratio SE / plain: median and quartiles over rounds."""

    seconds: dict[str, float]
    ratio: Ratio
    batch: int


def time_steps(
    settings: RunSettings, recipe: Recipe, source: DataSource, plain: str, se: str, stop: StopRequest
) -> StepTimes:
    """Time the forward pass, backward pass, and optimizer step of each network on one batch of noise."""
    device = pick_device(settings.device)
    batch = recipe.batch_size // recipe.accumulate // (settings.devices * settings.num_nodes)
    batch = max(2, min(batch, len(source.train), CPU_BATCH if device.type == "cpu" else batch))
    steps = {
        name: _step(replace(settings, model=name, se=settings.se if name == se else ()), recipe, source, device, batch)
        for name in (plain, se)
    }
    for step in steps.values():  # the first step allocates, compiles, and selects algorithms
        step()
        if stop.requested:
            raise Interrupted(stop.signal)
    start = time.perf_counter()
    for step in steps.values():
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    rounds = int(min(max(BUDGET / (time.perf_counter() - start), ROUNDS[0]), ROUNDS[1]))
    times = interleaved(steps, rounds=rounds, warmup=2, device=device.type)
    return StepTimes({name: timing.fastest for name, timing in times.items()}, ratio(times[se], times[plain]), batch)


def _step(
    settings: RunSettings, recipe: Recipe, source: DataSource, device: torch.device, batch: int
) -> Callable[[], object]:
    classifier, _ = build_classifier(settings, recipe, source)
    classifier.to(device).train()
    optimizer = build_optimizer(classifier.model, recipe)
    size = classifier.spec.size
    generator = torch.Generator().manual_seed(0)
    shape = (batch, source.in_chans, size, size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    targets = torch.randint(len(source.classes), (batch,), generator=generator).to(device)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(recipe.precision)

    def step() -> None:
        with torch.autocast(device.type, half) if half is not None else nullcontext():
            logits = classifier(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
