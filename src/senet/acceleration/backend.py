"""``torch.compile(model, backend="senet")``: what is done with the graphs that Dynamo captures.

Dynamo guards everything that was read, captures anew when it changes, and breaks the graph where it cannot see. A graph
goes through the passes of this package; what they do not know runs as it was captured.
"""

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from senet.acceleration.executor import Program
from senet.acceleration.fold import Folding, fold
from senet.acceleration.gates import lift_gates
from senet.acceleration.microbatch import InCache
from senet.acceleration.operations import (
    Order,
    is_weight,
    take_out_idle,
    value_of,
    without_private_writes,
)
from senet.acceleration.report import AS_CAPTURED, Acceleration, Decision, Mode
from senet.acceleration.weights import Followed, count_optimizer_steps, why_not
from senet.errors import InputError
from senet.ops.border import UnsuitedMapError
from senet.ops.conv import early_gate
from senet.text import first_line

THEN = ("auto", "eager", "inductor")
PASSES = ("gates", "fold", "micro-batches")  # in the order in which they run


@dataclass(frozen=True)
class Options:
    """The options of the backend.

    Attributes:
        backend: who computes the replaced operations: ``"native"`` (C++ on the CPU), ``"triton"``, ``"reference"``
            (PyTorch), or ``"auto"``.
        then: who runs the graph afterwards: ``"eager"``, ``"inductor"``, or ``"auto"``: Inductor on a CUDA device.

    Raises:
        InputError: a value is not one of these.
    """

    backend: str = "auto"
    then: str = "auto"
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("backend", ("auto", *early_gate.BACKENDS)), ("then", THEN)):
            if getattr(self, name) not in allowed:
                raise InputError(f"accelerate: {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> "Options":
        """The options of ``torch.compile(…, options=values)``."""
        values = values or {}
        unknown = [name for name in values if name not in cls.__dataclass_fields__]
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise InputError(f"backend 'senet': there is no option {unknown[0]!r}; known: {known}")
        return cls(**values)


def compile_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend ``"senet"`` of ``torch.compile``.

    Args:
        module: a graph captured by Dynamo.
        example_inputs: what it was captured with; parameters and buffers are among them.
        options: see ``Options``.

    Raises:
        InputError: an option is unknown, or the requested backend cannot run here.
    """
    return rewritten(module, example_inputs, Options.of(options), Acceleration())


def rewritten(
    module: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: Acceleration
) -> Callable[..., Any]:
    """What runs instead of a captured graph; decisions go to ``report``."""
    wants_gradient = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    mode: Mode = "training" if wants_gradient else "inference"
    report.graphs[mode] = report.graphs.get(mode, 0) + 1
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        frame = reason.user_stack[-1] if reason.user_stack else None
        where = "" if frame is None else f" ({frame.filename}:{frame.lineno})"
        report.breaks.append(f"{first_line(reason.reason)}{where}")
    backend = _chosen(options.backend, example_inputs)
    if backend is None:
        return module.forward
    try:
        return module.forward if wants_gradient else Inference(module, backend, report, options.without)
    except Exception as error:
        if isinstance(error, InputError):
            raise
        text = (
            f"senet: a pass failed, and the captured graph runs unchanged: {type(error).__name__}: {first_line(error)}"
        )
        warnings.warn(text, stacklevel=2)
        return module.forward


def _chosen(requested: str, example_inputs: Sequence[Any]) -> str | None:
    """The backend for the device and dtype of the network; None where it is on several devices, or has no weights."""
    floating = [x for x in example_inputs if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]
    devices = sorted({str(x.device) for x in floating})
    weight = next((x for x in floating if x.ndim > 1), None)
    if requested != "auto" and len(devices) > 1:
        where = " and ".join(devices)
        raise InputError(
            f"accelerate: backend {requested!r} cannot run here: the network is on {where}; move it to one device"
        )
    if len(devices) != 1 or weight is None or devices[0] == "meta":
        return None
    if requested == "auto":
        return next(b for b in ("native", "triton", "reference") if early_gate.why_not(b, weight) is None)
    reason = early_gate.why_not(requested, weight)
    if reason is not None:
        raise InputError(f"accelerate: backend {requested!r} cannot run here: {reason}; use 'auto'")
    return requested


class Inference:
    """A captured graph in its inference form, which follows the weights.

    Args:
        module: the captured graph.
        backend: one of ``early_gate.BACKENDS``.
        report: what is told what was done.
        without: passes that are not applied.
    """

    def __init__(
        self, module: fx.GraphModule, backend: str, report: Acceleration, without: tuple[str, ...] = ()
    ) -> None:
        self.ordinary = module.forward
        self._backend, self._making = backend, threading.Lock()
        graph = copy.deepcopy(module.graph)
        places = {node.name: index for index, node in enumerate(graph.find_nodes(op="placeholder"))}
        work = fx.GraphModule(module, graph)
        take_out_idle(graph)
        without_private_writes(graph)
        left = {} if "gates" in without else lift_gates(graph)
        writes = not Order(graph).is_free_of_writes()
        self._folding = Folding(work) if "fold" in without else fold(work, backend)
        self._followed = [places[name] for name in self._folding.weights]
        self._followed_names = list(self._folding.weights)
        self._bound: list[tuple[str, int]] = []
        self._inputs: list[tuple[int, bool]] = []
        for node in list(graph.find_nodes(op="placeholder")):
            if not node.users:
                graph.erase_node(node)
            elif is_weight(node):
                self._bind(work, node, places[node.name])
            else:
                value = value_of(node)
                alone = all(user.op == "call_module" for user in node.users) and not writes
                last = alone and isinstance(value, Tensor) and value.ndim == 4
                self._inputs.append((places[node.name], last))
        self._work, self._in_parts = work, backend == "native" and not writes and len(self._inputs) == 1
        self._in_parts &= "micro-batches" not in without
        self._state: tuple[Followed, Callable[..., Any]] | None = None
        for name, form in self._folding.forms.items():
            report.add(Decision(name, "inference", form, backend))
        for name, why in left.items():
            report.add(Decision(name, "inference", AS_CAPTURED, "torch", why))
        count_optimizer_steps()

    def _bind(self, work: fx.GraphModule, node: fx.Node, place: int) -> None:
        """Let the graph read a weight that is not folded as an attribute: the very tensor of the network."""
        name = f"weight_{place}"
        with work.graph.inserting_before(node):
            attribute = work.graph.get_attr(name) if hasattr(work, name) else work.graph.create_node("get_attr", name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        work.graph.erase_node(node)
        self._bound.append((name, place))

    def __call__(self, *given: Any) -> Any:
        """The outputs of the captured graph."""
        followed = [given[place] for place in self._followed]
        state = self._state
        if state is None or not self._is_current(state, followed, given):
            if why_not(followed) is not None:
                return self.ordinary(*given)
            with self._making:
                state = self._state = self._made(followed, given)
        inputs = [
            given[place].contiguous(memory_format=torch.channels_last) if last else given[place]
            for place, last in self._inputs
        ]
        try:
            return state[1](*inputs)
        except UnsuitedMapError:
            return self.ordinary(*given)

    def _is_current(self, state: Any, followed: list[Tensor], given: tuple[Any, ...]) -> bool:
        try:
            return state[0].are(followed) and all(getattr(self._work, n) is given[p] for n, p in self._bound)
        except RuntimeError:  # a tensor without a version
            return False

    def _made(self, followed: list[Tensor], given: tuple[Any, ...]) -> tuple[Followed, Callable[..., Any]]:
        known = Followed(followed)
        by_name = dict(zip(self._followed_names, followed, strict=True))
        for name, place in self._bound:
            if name in self._work._parameters or name in self._work._buffers:
                delattr(self._work, name)
            setattr(self._work, name, given[place])
        with torch.no_grad():
            self._folding.make(lambda node: by_name[node.name] if isinstance(node, fx.Node) else node)
        self._work.recompile()
        run = InCache(self._work) if self._in_parts else Program(self._work)
        return known, run
