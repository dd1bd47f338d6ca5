"""Folds the gates of a network into copies of it, and proves that the folds are exact."""

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from senet.errors import InputError
from senet.folding.plan import CannotFold, Factor, Planner
from senet.folding.report import FOLDED, KEPT, SCALED, SiteFold
from senet.nn import attachment
from senet.nn.constant_gate import ConstantGate, replace_gate
from senet.ops.dispatch import use_backend
from senet.surgery.dataflow import Flow, Node
from senet.surgery.example_input import recorded
from senet.surgery.find_gates import Gate, find_gates
from senet.text import first_line

_RELATIVE = 1e-9  # relative to the largest output, in float64


class Folder:
    """Folds gates of one network, which is not changed.

    Args:
        network: the network.
        by: the constant excitation of each gate, (C,) in float64, by the gate's name.
        constants: replace gates that do not fold exactly with a ``ConstantGate``; otherwise, they stay.
        example_input: as in ``senet.attach``.

    Raises:
        InputError: the network does not run on the example input, in its own dtype or in float64.
    """

    def __init__(
        self, network: nn.Module, by: Mapping[str, Tensor], constants: bool, example_input: Any = None
    ) -> None:
        self.network, self.by, self.constants = network, by, constants
        self.gates = {gate.name: gate for gate in find_gates(network)}
        self.flow = recorded(network, example_input, asker="fold")
        self.planner = Planner(network, self.flow)
        self.plans: dict[str, list[Factor]] = {}
        self.reasons: dict[str, str] = {}
        for name, factors in by.items():
            try:
                self.plans[name] = self.planner.plan(self.gates[name], factors)
            except CannotFold as reason:
                self.reasons[name] = str(reason)
        self._prove(example_input)

    @torch.inference_mode(False)  # tensors copied in inference mode cannot train
    def apply(self, names: Collection[str]) -> nn.Module:
        """A copy of the network with these gates folded; ``constants`` decides about those that do not fold."""
        twin: Any = copy.deepcopy(self.network)
        left: dict[str, int] = {}
        for name in self.by:
            if name not in names:
                continue
            scaled = name not in self.plans
            if scaled and not self.constants:
                continue
            self._take_out(twin, name, scaled)
            left[name] = self.gates[name].channels if scaled else 0
        config = getattr(twin, "network_config", None)
        if left and dataclasses.is_dataclass(config) and not isinstance(config, type):
            before = getattr(config, "folded", None) or {}
            put_in = getattr(config, "attached", None) if before else attachment.described(self.network)
            twin.network_config = dataclasses.replace(config, attached=put_in, folded=before | left)
        return twin

    def sites(
        self, chosen: Collection[str], refused: Collection[str], variations: Mapping[str, float]
    ) -> tuple[SiteFold, ...]:
        """The fate of each gate under ``apply(chosen)``, in the network's order.

        Gates in ``refused`` were tried and cost too much accuracy.
        """
        stages = self.stages()
        return tuple(
            SiteFold(
                name=name,
                stage=stages[name][0],
                channels=gate.channels,
                map_size=stages[name][1],
                variation=variations.get(name, math.nan),
                parameters=sum(p.numel() for p in gate.module.parameters()),
                **self._fate(name, chosen, refused),
            )
            for name, gate in self.gates.items()
        )

    def stages(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The stage of each gate, numbered as in the paper, and the spatial size of its feature map.

        Feature maps of the same size form a stage; the largest at the end of a block is stage 2. A gate that never runs
        has stage 0.
        """
        sizes = {name: self._map_size(gate) for name, gate in self.gates.items()}
        sums = [n.spatial for n in self.flow.nodes if n.op == "add" and len(n.inputs) == 2 and n.is_map]
        known = {math.prod(size) for size in (*sizes.values(), *sums) if size}
        order = sorted(known, reverse=True)
        return {name: (order.index(math.prod(size)) + 2 if size else 0, size) for name, size in sizes.items()}

    def _map_size(self, gate: Gate) -> tuple[int, ...]:
        inside = self.planner.owned.get(gate.name, [])
        given: list[Node] = [node for node in inside if gate.name in node.returned_by]
        return given[-1].shape[2:] if given else ()

    def _fate(self, name: str, chosen: Collection[str], refused: Collection[str]) -> dict[str, Any]:
        if name not in self.by:
            return {"fate": KEPT, "reason": "it was not recorded"}
        if name in chosen and name in self.plans:
            return {"fate": FOLDED, "into": tuple(factor.path for factor in self.plans[name])}
        obstacle = self.reasons.get(name, "")
        reasons = [f"does not fold: {obstacle}"] if obstacle else []
        reasons += ["without it the accuracy is too low"] if name in refused else []
        fate = SCALED if name in chosen and self.constants else KEPT
        return {"fate": fate, "reason": "; ".join(reasons), "obstacle": obstacle}

    def _take_out(self, twin: nn.Module, name: str, scaled: bool) -> None:
        constant = None
        if scaled:
            like = next(twin.get_submodule(name).parameters())
            constant = ConstantGate(self.by[name].to(like.dtype).to(like.device))
        else:
            for factor in self.plans[name]:
                factor.apply(twin)
        replace_gate(twin, name, constant)

    def _prove(self, example_input: Any) -> None:
        """Compare with the network whose gates are held constant; folds that change the output are dropped."""
        if not self.plans:
            return
        wide = _Wide(self.network, self.by, _example(self.flow, example_input))
        if wide.agrees(self, self.plans):
            return
        for name in list(self.plans):
            if not wide.agrees(self, [name]):
                del self.plans[name]
                self.reasons[name] = "it was tried, and the output changed, or there was none"
        if not wide.agrees(self, self.plans):
            self.reasons |= dict.fromkeys(self.plans, "the folds do not work together")
            self.plans.clear()


class _Wide:
    """The network in float64 on the CPU."""

    def __init__(self, network: nn.Module, by: Mapping[str, Tensor], example: tuple[tuple[Any, ...], Any]) -> None:
        self.network = copy.deepcopy(network).cpu().double().eval()
        self.by = by
        self.args, self.kwargs = tree_map(_as_wide, example)

    def agrees(self, folder: Folder, names: Collection[str]) -> bool:
        """Whether folding these gates gives the same output as holding them constant."""
        wanted = self._constant(names)
        twin = copy.deepcopy(self.network)
        for name in names:
            folder._take_out(twin, name, False)
        try:
            found = self._run(twin)
        except InputError:
            return False  # for example, a caller uses the gate in a way that nn.Identity does not support
        return len(found) == len(wanted) and all(map(_is_close, found, wanted))

    def _constant(self, names: Collection[str]) -> list[Tensor]:
        with ExitStack() as stack:
            for name in names:
                gate = self.network.get_submodule(name)
                constant = ConstantGate(self.by[name])
                stack.callback(gate.register_forward_hook(_holding(constant), with_kwargs=True).remove)
            return self._run(self.network)

    def _run(self, network: nn.Module) -> list[Tensor]:
        try:
            with torch.no_grad(), use_backend("reference"), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                return list(_tensors(network(*self.args, **self.kwargs)))
        except (RuntimeError, TypeError) as error:
            kind, reason = type(network).__name__, first_line(error)
            raise InputError(
                f"fold: {kind} does not run in float64, which the check of folds needs: {reason}"
            ) from error


def _holding(constant: ConstantGate) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return constant(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    return hook


def _example(flow: Flow, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords for the check; noise of the recorded shapes if no example was given."""
    if isinstance(example_input, dict):
        return (), example_input
    if example_input is not None:
        return (example_input if isinstance(example_input, tuple) else (example_input,)), {}
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in flow.inputs), {}


def _as_wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().double() if value.is_floating_point() else value.detach().cpu()


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module):
            yield from (value for value in vars(leaf).values() if isinstance(value, Tensor))


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if not wanted.is_floating_point() or wanted.numel() == 0:
        return torch.equal(found, wanted)
    return bool(((found - wanted).abs().max() <= _RELATIVE * wanted.abs().max()).item())
