"""Which of the sites found get a gate: all, late stages, one a stage, wide maps, or what a budget allows."""

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
    """A choice of sites; every condition that is given must hold.

    Args:
        every_layer: also behind each convolution, norm and activation, not only one site a block.
        last_stages: only the last so many stages (maps of one size are a stage). Late gates tell classes apart, early
            ones are shared by all (section 7.2 of the paper).
        one_per_stage: only the last site of each stage.
        min_channels: only maps of at least so many channels.
        max_parameters: add at most so many parameters. Sites are taken in the order of their cost, cheapest first,
            so that the budget buys the most sites.
        max_milliseconds: add at most so much time to a forward pass of one image; each gate is timed alone, on a map
            of the example's size, on the map's device.

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
    """The policy of a name: ``"auto"``, ``"all"``, ``"late"`` (the last two stages) or ``"one_per_stage"``."""
    if isinstance(sites, SitePolicy):
        return sites
    if sites not in POLICIES:
        names, hint = ", ".join(POLICIES), did_you_mean(sites, POLICIES)
        raise InputError(
            f"attach: sites={sites!r} is no policy ({names}) and no list of module paths{'; ' + hint if hint else ''}"
        )
    return POLICIES[sites]


def sites_from(text: str) -> str | list[str]:
    """A policy's name, or module paths with commas, as they are written on a command line.

    One word that is no policy is a module, unless it looks like a policy mistyped.
    """
    is_word = not any(sign in text for sign in ".,:")
    if is_word and (not text.strip() or difflib.get_close_matches(text, POLICIES, n=1)):
        return text.strip()
    return [path.strip() for path in text.split(",") if path.strip()]


def chosen(sites: list[Site], policy: SitePolicy, config: SEConfig) -> list[Site]:
    """The sites that fulfil the policy and the configuration's ``stages``, in their order."""
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
    """As many sites as the budget allows, the cheapest first, in their own order."""
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
    """The fastest of a few calls of a gate on one image's map."""
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
