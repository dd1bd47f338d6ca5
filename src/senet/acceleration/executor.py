"""Inference graphs that run consecutive convolutions in one library call, on memory planned for the input shape.

At batch size 1, a few hundred small Python steps, each with caches that a convolution has just evicted, take a share of
the time. For each input shape, consecutive custom convolutions (senet.ops.conv.native) become one step. Feature maps
that are only used inside such a run share a workspace; the others are new tensors.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from senet.acceleration.modules import Convolved, FoldedConv2d, FoldedGate, FoldedLinear, FoldedSum, FoldedTail
from senet.ops.conv.program import Run, Step
from senet.ops.layout import is_last

WORKSPACE = 64 * 2**20  # bytes that are held between calls; of larger maps Python's part is small


class Program:
    """A graph whose steps call what their modules do, not the modules."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._steps: Any = type(graph).forward
        self._modules = graph
        for name, module in graph.named_children():
            if isinstance(module, FoldedConv2d):
                setattr(self, name, module.runner())
            elif isinstance(module, (FoldedGate, FoldedLinear, FoldedSum, FoldedTail, Run)):
                setattr(self, name, module.forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modules, name)

    def __call__(self, *inputs: Any) -> Any:
        """What the graph returns for its inputs."""
        return self._steps(self, *inputs)


class Planned:
    """A graph that is planned anew for each shape of its one input; other calls run its steps one by one."""

    KEPT = 8  # shapes

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, self.ordinary = graph, Program(graph)
        self.plans: dict[tuple[Any, ...], Program] = {}

    def __call__(self, *inputs: Any) -> Any:
        """What the graph returns for its inputs."""
        x = inputs[0]
        if len(inputs) != 1 or not isinstance(x, Tensor) or x.ndim != 4 or not x.is_cpu or not is_last(x):
            return self.ordinary(*inputs)
        key = (x.shape, x.dtype, torch.get_num_threads())
        program = self.plans.get(key)
        if program is None:
            result, program = self._plan(x)
            if len(self.plans) >= self.KEPT:
                self.plans.clear()
            self.plans[key] = program
            return result
        return program(x)

    def _plan(self, x: Tensor) -> tuple[Any, Program]:
        """What the graph returns for x, and the graph with its runs in one step each."""
        recorder = _Recorder(self.graph)
        result = recorder.run(x)
        runs = _runs(list(self.graph.graph.nodes), recorder.steps)
        parts = {run[0]: _in_one_step(run, recorder) for run in runs}
        if sum(part.workspace for part in parts.values()) > WORKSPACE:
            return result, self.ordinary
        graph, copies = fx.Graph(), dict[Any, fx.Node]()
        holder = fx.GraphModule(self.graph, self.graph.graph)
        inside = {node for run in runs for node in run}
        for node in self.graph.graph.nodes:
            if node in parts:
                part, name = parts[node], f"run_{node.name}"
                holder.add_module(name, part)
                called = graph.call_module(name, tuple(copies[source] for source in part.inputs))
                for index, key in enumerate(part.outputs):
                    several = len(part.outputs) > 1
                    copies[key] = graph.call_function(operator.getitem, (called, index)) if several else called
            elif node not in inside:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return result, Program(fx.GraphModule(holder, graph))


class _Recorder(fx.Interpreter):
    """Runs a graph and notes which nodes are convolutions of our own for these maps, and the shapes of all maps."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.steps: dict[fx.Node, Convolved] = {}
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, (FoldedConv2d, FoldedSum, FoldedTail)) and not n.kwargs:
            step = module.step(*self.fetch_args_kwargs_from_env(n)[0])
            if step is not None:
                self.steps[n] = step
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result


def _runs(nodes: Sequence[fx.Node], steps: dict[fx.Node, Convolved]) -> list[list[fx.Node]]:
    """Nodes that follow one another and are convolutions, at least two."""
    runs: list[list[fx.Node]] = [[]]
    for node in nodes:
        if node in steps:
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _in_one_step(nodes: list[fx.Node], recorder: _Recorder) -> Run:
    steps, inside = [], set(nodes)
    for node in nodes:
        known = recorder.steps[node]
        x, shortcut, *_ = (*node.args, None)
        assert isinstance(x, fx.Node)
        assert shortcut is None or isinstance(shortcut, fx.Node)
        options = known.relu, known.gated, known.overwrites
        steps.append(Step(known.own, x, shortcut, node, recorder.shapes[node], *options))
    sources = [source for node in nodes for source in node.all_input_nodes if source not in inside]
    outside: dict[Any, torch.Size] = {source: recorder.shapes[source] for source in sources}
    wanted = [node for node in nodes if any(user not in inside for user in node.users)]
    return Run(steps, outside, wanted)
