"""Selects the sites that get a gate: all, late stages, one per stage, wide feature maps, or within a budget."""

from __future__ import annotations

import difflib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from senet.attachment.site import Site
from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
from senet.text import did_you_mean

_ROUNDS = 7


@dataclass(frozen=True)
class SitePolicy:
    """A selection of sites. A site must satisfy all given conditions.

    Args:
        every_layer: also use the sites after each convolution, norm, and activation, not only one per block.
        last_stages: use only this many last stages (feature maps of the same size form a stage). Late gates distinguish
            classes; early ones are shared by all classes (section 7.2 of the paper).
        one_per_stage: use only the last site of each stage.
        min_channels: use only feature maps with at least this many channels.
        max_parameters: the most parameters to add. The cheapest sites are used first, which gives the most sites.
        max_milliseconds: the most time to add to a forward pass of one image. Each gate is timed separately, with the
            size and device of its feature map in the example.

    Raises:
        InputError: a value is not allowed.
    """

    every_layer: bool = False
    last_stages: int | None = None
    one_per_stage: bool = False
    min_channels: int = 1
    max_parameters: int | None = None
    max_milliseconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("last_stages", "min_channels", "max_parameters", "max_milliseconds"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float) if name == "max_milliseconds" else int)
            if value is None and name != "min_channels":
                continue
            if isinstance(value, bool) or not is_number or not value > 0:
                raise InputError(f"SitePolicy: {name}={value!r} is not allowed; it must be a number above 0")

    def __str__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"SitePolicy({', '.join(given)})"


POLICIES = {
    "auto": SitePolicy(),
    "all": SitePolicy(every_layer=True),
    "late": SitePolicy(last_stages=2),
    "one_per_stage": SitePolicy(one_per_stage=True),
}


def policy_of(sites: str | SitePolicy) -> SitePolicy:
    """The policy with a name: ``"auto"``, ``"all"``, ``"late"`` (the last two stages), or ``"one_per_stage"``."""
    if isinstance(sites, SitePolicy):
        return sites
    if sites not in POLICIES:
        names, hint = ", ".join(POLICIES), did_you_mean(sites, POLICIES)
        raise InputError(
            f"attach: sites={sites!r} is neither a policy ({names}) nor a list of module paths"
            f"{'; ' + hint if hint else ''}"
        )
    return POLICIES[sites]


def sites_from(text: str) -> str | list[str]:
    """Parse the name of a policy, or comma-separated module paths, from a command line.

    A single word that is not a policy is a module, unless it looks like a mistyped policy.
    """
    is_word = not any(sign in text for sign in ".,:")
    if is_word and (not text.strip() or difflib.get_close_matches(text, POLICIES, n=1)):
        return text.strip()
    return [path.strip() for path in text.split(",") if path.strip()]


def chosen(sites: list[Site], policy: SitePolicy, config: SEConfig) -> list[Site]:
    """The sites that satisfy the policy and the configuration's ``stages``, in the given order."""
    kept = [site for site in sites if site.channels >= policy.min_channels and config.in_stage(site.stage)]
    stages = sorted({site.stage for site in sites})
    if policy.last_stages is not None:
        kept = [site for site in kept if site.stage in stages[-policy.last_stages :]]
    if policy.one_per_stage:
        last = {site.stage: site for site in kept}
        kept = list(last.values())
    if policy.max_parameters is not None:
        kept = _within(kept, policy.max_parameters, lambda site: site.parameters)
    if policy.max_milliseconds is not None:
        timed = functools.cache(functools.partial(_milliseconds, config))
        kept = _within(
            kept,
            policy.max_milliseconds,
            lambda site: timed(site.channels, site.map_size, site.dtype, site.device),
        )
    return kept


def _within(sites: list[Site], budget: float, cost: Callable[[Site], float]) -> list[Site]:
    """The cheapest sites that fit the budget, in the given order."""
    taken = set()
    for site in sorted(sites, key=cost):
        budget -= cost(site)
        if budget < 0:
            break
        taken.add(site.name)
    return [site for site in sites if site.name in taken]


def _milliseconds(
    config: SEConfig, channels: int, map_size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> float:
    """The fastest of a few calls of a gate on the feature map of one image."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        gate = SqueezeExcite(channels, config).to(device, dtype)
        x = torch.zeros(1, channels, *map_size, dtype=dtype, device=device)
        times = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            gate(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return 1000 * min(times)
