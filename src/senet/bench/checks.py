"""Correctness before speed: every timed candidate must compute the same function, measured against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from senet.acceleration.accelerate import accelerate
from senet.bench.candidates import CANDIDATES, DTYPES, Network, Runner, Setting, Twins, make_twins, precision
from senet.ops.dispatch import backend_for, use_backend

GRADIENTS_FLOAT64 = 1e-9  # relative; the depth of a network amplifies float64's rounding error of 1e-16
OUTPUTS = 1e-5  # relative; or MARGIN times the error of plain PyTorch in the same dtype, if that is larger
MARGIN = 3.0
# A single ReLU that flips through rounding changes the gradients below it by up to a percent; outputs are continuous.
GRADIENTS = 0.05
_CHECK_SIDE = 64


@dataclass(frozen=True)
class Check:
    """One comparison; ``error`` and ``allowed`` are relative to float64."""

    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.what}: {self.error:.1e} relative to float64 (allowed {self.allowed:.1e})"


def relative(found: Tensor, truth: Tensor) -> float:
    """The largest difference ÷ the largest true value."""
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


def check_outputs(setting: Setting, twins: Twins, runners: dict[str, Runner]) -> Iterable[Check]:
    """Compare the logits of each candidate's first step with float64, at the shapes that are timed.

    The limit is 1e-5, or three times the error of plain PyTorch in the same dtype, whichever is larger.
    """
    for network in ("plain", "se"):
        names = [name for name in runners if CANDIDATES[name].network == network]
        if not names:
            continue
        truth = _exact_logits(setting, twins, network)
        ordinary = relative(_ordinary_logits(setting, twins, network), truth)
        for name in names:
            logits = runners[name].run().to(truth.device)
            yield Check(f"{name}, outputs", relative(logits, truth), max(OUTPUTS, MARGIN * ordinary))


def _exact_logits(setting: Setting, twins: Twins, network: Network) -> Tensor:
    model = copy.deepcopy(twins.networks[network]).double().train(setting.mode == "train")
    with torch.no_grad(), use_backend("reference"):
        return model(twins.x.double())


def _ordinary_logits(setting: Setting, twins: Twins, network: Network) -> Tensor:
    model, x = copy.deepcopy(twins.networks[network]).train(setting.mode == "train"), twins.x
    if setting.mode == "inference":
        model, x = model.to(DTYPES[setting.dtype]), x.to(DTYPES[setting.dtype])
    with torch.no_grad(), use_backend("reference"), precision(setting):
        return model(x)


def check_gradients(setting: Setting) -> Iterable[Check]:
    """Compare the gradients of accelerated networks (parameters, image) and the logits with plain PyTorch in float64.

    The images are small. The first check, in float64, tests the math. The second, in the setting's own dtype, allows
    for its rounding and for the ReLUs that flip.
    """
    members = [CANDIDATES[name] for name in setting.candidates]
    ours = [c for c in members if c.home == "accelerated" and not c.compiled]
    small = replace(setting, batch=min(max(setting.batch, 2), 4), size=min(setting.size, _CHECK_SIDE))
    if setting.mode != "train" or not ours:
        return
    twins, backend = make_twins(small), chosen_backend(setting)
    for candidate in ours:
        model = twins.networks[candidate.network]
        exact = gradients(model, small, twins, "reference", torch.float64)
        found = gradients(model, small, twins, backend, torch.float64)
        yield Check(f"{candidate.name} ({backend}), gradients in float64", _spread(found, exact), GRADIENTS_FLOAT64)
        ordinary, own = (
            _spread(gradients(model, small, twins, name, torch.float32), exact) for name in ("reference", backend)
        )
        what = f"{candidate.name} ({backend}), gradients in {setting.dtype}"
        yield Check(what, own, max(GRADIENTS, MARGIN * ordinary))
    torch.compiler.reset()  # code compiled for these shapes must not affect compilation for the timed shapes


def chosen_backend(setting: Setting) -> str:
    """The backend that ``"auto"`` selects for large feature maps, so that small images are checked on the same path."""
    large = torch.empty((), device=setting.device, dtype=DTYPES[setting.dtype]).expand(1, 2**26)
    with use_backend("auto"):
        return backend_for(large)


def gradients(model: nn.Module, setting: Setting, twins: Twins, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """The logits and the gradients of the image and all parameters, from one training step.

    With another backend than ``"reference"``, the network is accelerated.
    """
    model = copy.deepcopy(model).to(dtype).train()
    if backend != "reference":
        model = accelerate(model)
    x = twins.x.to(dtype, copy=True).requires_grad_()
    half = precision(setting) if dtype != torch.float64 else torch.autocast(setting.device, enabled=False)
    with use_backend(backend):
        with half:
            logits = model(x)
            loss = F.cross_entropy(logits, twins.y)
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [logits.detach().double(), *(g.double() for g in (x.grad, *gradients) if g is not None)]


def _spread(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The root mean square over tensors of ‖found − truth‖ / ‖truth‖, so that gates count as much as convolutions."""
    if len(found) != len(truth):
        return math.nan
    total = 0.0
    for a, b in zip(found, truth, strict=True):
        scale = b.norm().item()
        total += ((a - b).norm().item() / scale) ** 2 if scale else float(a.norm().item() > 0)
    return math.sqrt(total / len(truth))
