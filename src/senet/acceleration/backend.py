"""``torch.compile(model, backend="senet")``: what is done with the graphs that Dynamo captures.

Dynamo guards everything that was read, captures anew when it changes, and breaks the graph where it cannot see. A graph
goes through the passes of this package; what they do not know runs as it was captured.
"""

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._inductor import list_mode_options

from senet.acceleration.checkpoints import run_checkpoints, take_in_checkpoints
from senet.acceleration.executor import Program
from senet.acceleration.fold import Folding, fold
from senet.acceleration.gates import lift_gates
from senet.acceleration.microbatch import InCache
from senet.acceleration.operations import (
    Order,
    is_repeatable,
    is_weight,
    take_out_idle,
    value_of,
    without_private_writes,
)
from senet.acceleration.report import AS_CAPTURED, Acceleration, Decision, Mode
from senet.acceleration.sweep import training_form
from senet.acceleration.weights import Followed, count_optimizer_steps, counting_updates, why_not
from senet.errors import InputError
from senet.ops.border import UnsuitedMapError
from senet.ops.conv import early_gate
from senet.text import first_line

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
THEN = ("auto", "eager", "inductor")
PASSES = ("gates", "fold", "micro-batches", "sweeps")  # in the order in which they run


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
    mode: str | None = None
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("backend", ("auto", *early_gate.BACKENDS)), ("then", THEN)):
            if getattr(self, name) not in allowed:
                raise InputError(f"accelerate: {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.mode not in (None, "default", *list_mode_options()):
            raise InputError(f"accelerate: mode={self.mode!r} is not one of {', '.join(list_mode_options())}")

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
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend ``"senet"`` of ``torch.compile``.

    Args:
        module: a graph captured by Dynamo.
        example_inputs: what it was captured with; parameters and buffers are among them.
        options: see ``Options``.
        mode: that of ``torch.compile``, for Inductor.

    Raises:
        InputError: an option is unknown, or the requested backend cannot run here.
    """
    given = {} if mode is None else {"mode": mode}
    return rewritten(module, example_inputs, Options.of({**given, **(options or {})}), Acceleration())


def rewritten(
    module: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: Acceleration
) -> Callable[..., Any]:
    """What runs instead of a captured graph; decisions go to ``report``."""
    wants_gradient = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    if wants_gradient:
        run_checkpoints(module)
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
    compiler = _inductor(options, example_inputs)
    try:
        if wants_gradient:
            run = _training(module, example_inputs, options, report, compiler)
        else:
            run = Inference(module, example_inputs, backend, report, options.without, compiler)
        return counting_updates(run, module.graph)
    except Exception as error:
        if isinstance(error, InputError):
            raise
        text = (
            f"senet: a pass failed, and the captured graph runs unchanged: {type(error).__name__}: {first_line(error)}"
        )
        warnings.warn(text, stacklevel=2)
        return module.forward


def _training(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    report: Acceleration,
    compiler: Compiler | None,
) -> Callable[..., Any]:
    if "sweeps" in options.without:
        return module.forward if compiler is None else compiler(module, example_inputs)
    work, decisions = training_form(module, options.backend if compiler is None else "traced")
    for decision in decisions:
        report.add(decision)
    return work.forward if compiler is None else compiler(work, example_inputs)


def _inductor(options: Options, example_inputs: Sequence[Any]) -> Compiler | None:
    """Inductor's compiler, if the graph goes there."""
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in example_inputs)
    if options.then == "eager" or (options.then == "auto" and not on_gpu):
        return None
    settings = list_mode_options(options.mode) if options.mode not in (None, "default") else {}

    def compiler(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx  # deferred: importing Inductor takes a second

        with torch._inductor.config.patch(settings):
            compiled: Any = compile_fx(module, list(inputs))
        return cast(Callable[..., Any], compiled)

    return compiler


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
        example_inputs: what it was captured with.
        backend: one of ``early_gate.BACKENDS``.
        report: what is told what was done.
        without: passes that are not applied.
        compiler: Inductor's, if the folded graph goes there. Its weights are inputs, written anew when they change.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        backend: str,
        report: Acceleration,
        without: tuple[str, ...] = (),
        compiler: Compiler | None = None,
    ) -> None:
        backend, self._compiler = backend if compiler is None else "reference", compiler
        self.ordinary = module.forward
        self._backend, self._making = backend, threading.Lock()
        graph = copy.deepcopy(module.graph)
        places = {node.name: index for index, node in enumerate(graph.find_nodes(op="placeholder"))}
        work = fx.GraphModule(module, graph)
        take_in_checkpoints(work)
        take_out_idle(graph)
        without_private_writes(graph)
        left = {} if "gates" in without else lift_gates(graph)
        writes = not Order(graph).is_free_of_writes()
        repeatable = is_repeatable(graph)
        self._folding = Folding(work) if "fold" in without else fold(work, backend)
        self._followed_names = list(self._folding.weights)
        # Placeholders; with Inductor's option freezing, Dynamo puts the weights into the graph's module.
        self._followed: list[int | str] = [
            places[name] if node.op == "placeholder" else str(node.target)
            for name, node in self._folding.weights.items()
        ]
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
                last = alone and compiler is None and isinstance(value, Tensor) and value.ndim == 4
                self._inputs.append((places[node.name], last))
        self._work, self._in_parts = work, backend == "native" and repeatable and len(self._inputs) == 1
        self._in_parts &= "micro-batches" not in without
        self._state: tuple[Followed, Callable[..., Any]] | None = None
        for name, why in left.items():
            report.add(Decision(name, "inference", AS_CAPTURED, "torch", why))
        self._report = report
        count_optimizer_steps()
        if compiler is not None:  # now, while Dynamo knows which sizes are dynamic
            followed = self._weights(tuple(example_inputs))
            if why_not(followed) is None:
                self._state = self._made(followed, tuple(example_inputs))

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
        followed = self._weights(given)
        state = self._state
        if state is None or not self._is_current(state, followed, given):
            reason = why_not(followed)
            if reason is not None:
                for name in self._folding.forms:
                    self._report.add(Decision(name, "inference", AS_CAPTURED, "torch", reason))
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

    def _weights(self, given: tuple[Any, ...]) -> list[Tensor]:
        """The weights that are folded."""
        return [given[place] if isinstance(place, int) else attrgetter(place)(self._work) for place in self._followed]

    def _is_current(self, state: Any, followed: list[Tensor], given: tuple[Any, ...]) -> bool:
        try:
            return state[0].are(followed) and all(getattr(self._work, n) is given[p] for n, p in self._bound)
        except RuntimeError:  # a tensor without a version
            return False

    def _made(self, followed: list[Tensor], given: tuple[Any, ...]) -> tuple[Followed, Callable[..., Any]]:
        known, state = Followed(followed), self._state
        for name, form in self._folding.forms.items():
            self._report.add(Decision(name, "inference", form, self._backend))
        by_name = dict(zip(self._followed_names, followed, strict=True))
        same = all(getattr(self._work, name, None) is given[place] for name, place in self._bound)
        if state is not None and self._compiler is not None and same:
            self._write_anew(by_name)
            return known, state[1]
        for name, place in self._bound:
            if name in self._work._parameters or name in self._work._buffers:
                delattr(self._work, name)
            setattr(self._work, name, given[place])
        with torch.no_grad():
            self._folding.make(lambda node: by_name[node.name] if isinstance(node, fx.Node) else node)
        self._work.recompile()
        if self._compiler is not None:
            return known, self._compiler(self._work, [given[place] for place, _ in self._inputs])
        run = InCache(self._work) if self._in_parts else Program(self._work)
        return known, run

    @torch.no_grad()
    def _write_anew(self, by_name: dict[str, Tensor]) -> None:
        """Write the folded weights into the tensors that the compiled graph reads."""
        for name, maker in self._folding.makers.items():
            made = maker(lambda node: by_name[node.name] if isinstance(node, fx.Node) else node)
            for old, new in zip(self._work.get_submodule(name).buffers(), made.buffers(), strict=True):
                old.copy_(new)
