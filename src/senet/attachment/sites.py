"""``senet.find_sites``: the modules of a network where SE can be attached, and its cost there."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from senet.attachment.anchors import CONTAINERS, Anchors
from senet.attachment.patterns import Patterns, Place
from senet.attachment.policies import SitePolicy, chosen, policy_of
from senet.attachment.site import Site
from senet.errors import InputError
from senet.nn.attachment import without_gates
from senet.nn.carriers import CHILD, INPUT, Side
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
from senet.surgery.dataflow import Flow, Node
from senet.surgery.example_input import recorded
from senet.text import did_you_mean

_NAME_MODULES = ", or name modules with a known number of channels, sites=[…]"
GATED = "it already has SE or another channel gate"
AFTER_ACTIVATIONS = "after each convolution and activation"
AFTER_CONVOLUTIONS = "after each convolution"


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        sites: the selected sites.
        skipped: the skipped places, with reasons.
        mult_adds, images: the multiply-adds of the network itself, and the number of images they are for.
        fallback: where the sites are if no block has a place that can hold a gate; otherwise None.
    """

    sites: list[Site]
    skipped: list[tuple[str, str]]
    mult_adds: int
    images: int
    fallback: str | None = None


def find_sites(
    model: nn.Module,
    config: SEConfig | None = None,
    sites: str | SitePolicy | Sequence[str] = "auto",
    example_input: Any = None,
) -> list[Site]:
    """The sites that ``senet.attach`` would use with the same arguments. ``model`` does not change.

    Attached gates are ignored, because ``senet.attach`` replaces them.
    """
    check_is_network(model, "find_sites")
    with without_gates(model):
        return search(model, config or SEConfig(identity_init=True), sites, example_input).sites


def check_is_network(model: Any, what: str) -> None:
    """Raise ``InputError`` if ``model`` is not a module but, for example, a name."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{what}: {model!r:.40} is not a network; pass a torch.nn.Module, as from senet.create_model")


def search(
    model: nn.Module, config: SEConfig, sites: str | SitePolicy | Sequence[str], example_input: Any = None
) -> Search:
    """Find the sites in the data flow of a run (see ``patterns``) and select among them, or look up named ones.

    Raises:
        InputError: the network does not run on the example, no site was found, or a named module cannot be a site.
    """
    if not isinstance(config, SEConfig):
        raise InputError(f"attach: config={config!r} is not allowed; pass a senet.SEConfig")
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("attach: the network has uninitialized lazy modules; run it once before attaching")
    if not isinstance(sites, (str, SitePolicy)):
        return _named(model, config, _names(sites), example_input)
    policy = policy_of(sites)
    flow = recorded(model, example_input, instead=_NAME_MODULES)
    found, skipped, fallback = _next_best(model, config, flow, policy.every_layer)
    if not found:
        raise InputError(f"attach: no site found in {type(model).__name__}: {_why_none(skipped, config)}")
    kept = chosen(found, policy, config)
    if not kept:
        raise InputError(f"attach: {len(found)} sites were found, but {policy} excludes all of them; allow more")
    names = {site.name for site in kept}
    skipped += [(site.name, "the policy excludes it") for site in found if site.name not in names]
    return Search(kept, skipped, flow.mult_adds, flow.images, fallback)


def _why_none(skipped: list[tuple[str, str]], config: SEConfig) -> str:
    if not skipped:
        return "it has no convolution followed by an activation; name modules yourself, sites=[…]"
    name, reason = skipped[0]
    return f"{len(skipped)} places were skipped, the first ({name}) because {reason}; name modules yourself, sites=[…]"


def _next_best(
    model: nn.Module, config: SEConfig, flow: Flow, every_layer: bool
) -> tuple[list[Site], list[tuple[str, str]], str | None]:
    """The sites, the skipped places, and the name of the fallback that was used, or None."""
    anchors, patterns = Anchors(model, config, flow), Patterns(flow)
    found, skipped = _found(anchors, config, _places(patterns, every_layer))
    for name, places in ((AFTER_ACTIVATIONS, patterns.activations), (AFTER_CONVOLUTIONS, patterns.convolutions)):
        if found or any(reason == GATED for _, reason in skipped):
            break
        found, _ = _found(anchors, config, places())
        if found:
            return found, skipped, name
    return found, skipped, None


def _found(anchors: Anchors, config: SEConfig, places: list[Place]) -> tuple[list[Site], list[tuple[str, str]]]:
    """The sites among the places, in execution order, and (place, reason) for the others."""
    sites: dict[str, Site] = {}
    skipped = []
    for place in places:
        if place.has_gate:
            skipped.append((_label(place.map), GATED))
            continue
        wanted, problem = anchors.placed(place)
        found = [anchor for node in wanted for anchor in anchors.of(node)]
        if not found:
            skipped.append((_label(place.map), problem or "no suitable module returns or takes this feature map"))
        for path, side, node in found:
            sites.setdefault(path, _site(path, side, place.kind, node, config))
    return _with_stages(list(sites.values())), skipped


def _places(patterns: Patterns, every_layer: bool) -> list[Place]:
    """A place per block; also after each convolution, if ``every_layer`` or if there are no blocks."""
    places = patterns.blocks()
    if every_layer or not (places or patterns.gates):
        taken = {id(place.map) for place in places}
        places += [place for place in patterns.activations() if id(place.map) not in taken]
    elif not places:  # a plain chain with gates of its own: report their places
        places = [place for place in patterns.activations() if place.has_gate]
    return sorted(places, key=lambda place: place.map.index)


def _label(node: Node) -> str:
    return next(iter((*node.returned_by, *node.passed_by)), node.owner or "the network itself")


def _site(path: str, side: Side, kind: str, node: Node, config: SEConfig) -> Site:
    site = Site(path, side, kind, node.shape[1], node.spatial, 0, config.placement, 0, 0, node.dtype, node.device)
    return _with_cost(site, config)


def _with_cost(site: Site, config: SEConfig) -> Site:
    with torch.device("meta"):
        gate = SqueezeExcite(site.channels, config)
    pixels = math.prod(site.map_size) if config.squeeze == "none" else 1
    mult_adds = (gate.fc1.weight.numel() + gate.fc2.weight.numel()) * pixels
    return replace(site, parameters=sum(p.numel() for p in gate.parameters()), mult_adds=mult_adds)


def _with_stages(sites: list[Site]) -> list[Site]:
    """Number the stages by feature map size: 2 is the largest, as conv2_x in Table 1 of the paper."""
    sizes = sorted({math.prod(site.map_size) for site in sites}, reverse=True)
    return [replace(site, stage=sizes.index(math.prod(site.map_size)) + 2) for site in sites]


def _names(sites: Any) -> list[str]:
    names = list(sites) if isinstance(sites, Iterable) else [sites]
    for each in names:
        if not isinstance(each, str):
            kind = type(each).__name__
            raise InputError(
                f"attach: sites contains a {kind}; use names, as in [site.name for site in find_sites(model)]"
            )
    return names


def _named(model: nn.Module, config: SEConfig, names: list[str], example_input: Any) -> Search:
    """The sites that the user or a saved description names."""
    if not names or len({name.removesuffix(INPUT) for name in names}) != len(names):
        raise InputError(f"attach: sites={names!r} is empty or names a module twice; list module paths")
    modules = dict(model.named_modules())
    aliases = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        _check_name(name, modules, aliases)
    try:
        flow = recorded(model, example_input, instead=_NAME_MODULES)
    except InputError:
        if example_input is not None:
            raise
        flow = None  # the attributes of the modules may be enough
    if flow is None:
        sites = [_unseen(name, modules[name.removesuffix(INPUT)], config) for name in names]
        return Search(sites, [], 0, 1)
    sites = [_seen(name, modules, flow, config) for name in names]
    return Search(_with_stages(sites), [], flow.mult_adds, flow.images)


def _check_name(name: str, modules: dict[str, nn.Module], aliases: dict[str, nn.Module]) -> None:
    path = name.removesuffix(INPUT)
    if path in aliases and path not in modules:
        first = next(each for each, module in modules.items() if module is aliases[path])
        raise InputError(f"attach: {path!r} is the same module as {first!r}; use that name")
    if not path or path not in modules:
        hint = did_you_mean(path, modules, "see model.named_modules()", count=3)
        raise InputError(f"attach: the network has no module {path!r}; {hint}")
    if isinstance(modules[path], CONTAINERS):
        raise InputError(
            f"attach: {path!r} is a {type(modules[path]).__name__}, which only runs its children; name the last child"
        )
    if isinstance(modules[path], torch.jit.ScriptModule):
        raise InputError(f"attach: {path!r} is TorchScript, which cannot be modified; name another module")
    if hasattr(modules[path], CHILD):
        raise InputError(f"attach: {path!r} already has an attribute 'se'; name a module inside it")


def _seen(name: str, modules: dict[str, nn.Module], flow: Flow, config: SEConfig) -> Site:
    path, side = name.removesuffix(INPUT), "input" if name.endswith(INPUT) else "output"
    if side == "input":
        nodes = [node for node in flow.nodes if path in node.taken_by]
    else:
        nodes = [node for node in flow.nodes if path in node.returned_by or path in node.passed_by]
    if not nodes:
        what = "does not take a tensor as its first argument" if side == "input" else "does not return a single tensor"
        what = what if flow.calls[path] else "is not called on this input"
        raise InputError(f"attach: {path!r} {what}; name another module")
    node = nodes[-1]
    if not 3 <= len(node.shape) <= 5 or node.channel not in (1, None) or len({n.shape[1] for n in nodes}) > 1:
        shapes = " and ".join(str(n.shape) for n in nodes)
        raise InputError(
            f"attach: {path!r} has shape {shapes}, but SE needs (N, C, *spatial) with known channels in axis 1"
        )
    return _site(path, "input" if side == "input" else "output", "named", node, config)


def _unseen(name: str, module: nn.Module, config: SEConfig) -> Site:
    side: Side = "input" if name.endswith(INPUT) else "output"
    words = ("num_features", "num_channels", "out_channels" if side == "output" else "in_channels")
    channels = next((getattr(module, word) for word in words if isinstance(getattr(module, word, None), int)), None)
    weight = next(module.parameters(), None)
    if channels is None or weight is None:
        raise InputError(
            f"attach: the channels of {name!r} are unknown, because the network does not run on a guessed input; "
            "pass example_input="
        )
    path = name.removesuffix(INPUT)
    site = Site(path, side, "named", channels, (), 2, config.placement, 0, 0, weight.dtype, weight.device)
    return _with_cost(site, config)
