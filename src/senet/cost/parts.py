"""The cost of a registered network, in total and by part: stem, stages, and head, or single blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from senet.cost.count import Cost, image_side, meta_model, module_costs
from senet.cost.memory import Memory, activation_memory
from senet.models.base import FIRST_STAGE, ConvNet, FlatConvNet
from senet.models.external import ATTACHED
from senet.models.registry import NetworkConfig
from senet.nn.attachment import attached

Per = Literal["stage", "block"]
STEM, HEAD = "stem", "head"


@dataclass(frozen=True)
class Part:
    """A part of a network: its cost, and the bytes it is the first to keep for the backward pass."""

    name: str
    cost: Cost
    saved: int


@dataclass(frozen=True)
class NetworkCost:
    """A network's cost for one image of ``input_size`` pixels per side; with attached gates, ``name`` ends in +se."""

    name: str
    input_size: int
    cost: Cost
    memory: Memory
    parts: list[Part]


def network_cost(name: str, input_size: int | None = None, per: Per = "stage", **kwargs: Any) -> NetworkCost:
    """The cost of a registered network; nothing is allocated.

    Args:
        name: a registered name.
        input_size: side of the image, in pixels; None means the network's default.
        per: see ``cost_parts``.
        **kwargs: ``num_classes``, ``in_chans``, and further arguments of ``create_model``.

    Raises:
        InputError: unknown network, or images that are too small for it.
    """
    size = image_side(name, input_size)
    return _counted(meta_model(name, **kwargs), size, per)


def config_cost(config: NetworkConfig, input_size: int | None = None, per: Per = "stage") -> NetworkCost:
    """The cost of the network that ``config`` creates, including attached and folded gates; see ``network_cost``."""
    size = image_side(config.model, input_size)
    with torch.device("meta"), torch.inference_mode(mode=False):
        return _counted(config.create(), size, per)


def _counted(model: nn.Module, size: int, per: Per) -> NetworkCost:
    config: Any = model.network_config
    name = config.model + ATTACHED if attached(model) else config.model
    costs, memory = module_costs(model, size, config.in_chans), activation_memory(model, size, config.in_chans)
    return NetworkCost(name, size, costs[""], memory, cost_parts(model, costs, memory, per))


def cost_parts(model: nn.Module, costs: dict[str, Cost], memory: Memory, per: Per = "stage") -> list[Part]:
    """The parts of a network in order; they add up to the whole network.

    Args:
        model: the network. Our networks are split into stages (numbered as in the paper) or blocks, any other network
            into its children or grandchildren.
        costs, memory: from ``module_costs`` and ``activation_memory``.
        per: ``"stage"`` or ``"block"``. Everything outside the parts is the head.
    """
    if isinstance(model, ConvNet):
        groups = _stages(model, list(costs))
    else:
        groups = {name: [name] for name, _ in model.named_children() if name in costs}  # else shared, and counted there
    if per == "block":
        stem = {name: group for name, group in groups.items() if name == STEM}
        rows = [root for name, group in groups.items() if name != STEM for root in group]
        groups = stem | {name: [name] for root in rows for name in _blocks(model, root, costs)}
    parts = [_part(name, group, costs, memory) for name, group in groups.items()]
    named = [name for group in groups.values() for name in group]
    inside = _part(HEAD, named, costs, memory)
    rest = _minus(costs[""], inside.cost), memory.saved[""] - inside.saved
    parts.append(Part(HEAD, *rest))
    return [part for part in parts if part.cost != Cost() or part.saved]


def _part(name: str, group: Sequence[str], costs: dict[str, Cost], memory: Memory) -> Part:
    total = functools.reduce(_plus, (costs[module] for module in group), Cost())
    return Part(name, total, sum(memory.saved.get(module, 0) for module in group))


def _stages(model: ConvNet, order: list[str]) -> dict[str, list[str]]:
    """The modules of each part, except the head, which is the rest.

    ``order`` lists the modules in call order: those that run before the first stage are the stem.
    """
    if isinstance(model, FlatConvNet):
        rows = [list(row) for row in model.stage_rows]
    else:
        names = {id(module): name for name, module in model.named_modules()}
        rows = [[names[id(stage)]] for stage in model.stages()]
    before = set(order[: order.index(rows[0][0])])
    stem = [name for name in _outside(model, [name for row in rows for name in row]) if name in before]
    return {STEM: stem} | {f"stage {number}": row for number, row in enumerate(rows, FIRST_STAGE)}


def _outside(model: nn.Module, taken: Sequence[str], prefix: str = "") -> Iterator[str]:
    """The largest modules that do not overlap those in ``taken``."""
    for child, module in model.named_children():
        name = prefix + child
        if name in taken:
            continue
        if any(other.startswith(f"{name}.") for other in taken):
            yield from _outside(module, taken, f"{name}.")
        else:
            yield name


def _blocks(model: nn.Module, root: str, costs: dict[str, Cost]) -> list[str]:
    """The blocks of a part: the children of a ``Sequential``, else the module itself."""
    module = model.get_submodule(root)
    children = [f"{root}.{name}" for name, _ in module.named_children()]
    children = [name for name in children if name in costs]
    return children if children and (isinstance(module, nn.Sequential) or not isinstance(model, ConvNet)) else [root]


def _plus(a: Cost, b: Cost) -> Cost:
    return Cost(*(getattr(a, field.name) + getattr(b, field.name) for field in fields(Cost)))


def _minus(a: Cost, b: Cost) -> Cost:
    return Cost(*(getattr(a, field.name) - getattr(b, field.name) for field in fields(Cost)))
