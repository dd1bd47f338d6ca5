"""Runs the early layers of an inference graph on a few images at a time, so that feature maps stay in the cache.

In the first stage of ResNet-50, a feature map is 3 MB per image. With eight images, every layer reads it from memory
and writes it back, and freeing and reallocating memory causes page faults. Two images fit in the cache. Measured with
benchmarks/tax.py.
"""

from typing import Any

import torch
from torch import Tensor, fx

from senet.acceleration.executor import Planned

_WORTH_IT = 512 * 2**10  # bytes of a map of one image from which it is worth cutting the batch
_AT_ONCE = 8 * 2**20  # bytes of the largest map that are computed at once
_UNKNOWN: Any = object()


class InCache:
    """A graph of one input, run in two parts: the first on micro-batches, the second on the whole batch."""

    KEPT = 64  # sizes of images

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.whole = Planned(graph)
        self.plans: dict[tuple[int, ...], tuple[Planned, Planned, int] | None] = {}
        self.parts: dict[fx.Node, tuple[Planned, Planned] | None] = {}

    def __call__(self, *inputs: Any) -> Any:
        """What the graph returns for one input (N, …), or for several, which are not cut."""
        x = inputs[0]
        plan = self._plan_for(x) if len(inputs) == 1 and isinstance(x, Tensor) else None
        if plan is None or x.shape[0] <= plan[2]:
            return self.whole(*inputs)
        first, second, images = plan
        return second(torch.cat([first(part) for part in x.split(images)]))

    def _plan_for(self, x: Tensor) -> tuple[Planned, Planned, int] | None:
        if x.ndim < 2 or x.shape[0] < 2:
            return None
        key = tuple(x.shape[1:])
        plan = self.plans.get(key, _UNKNOWN)
        if plan is _UNKNOWN:
            with torch.random.fork_rng(devices=()):
                plan = self._plan(x[:1])
            if len(self.plans) >= self.KEPT:
                self.plans.clear()
            self.plans[key] = plan
        return plan

    def _plan(self, x: Tensor) -> tuple[Planned, Planned, int] | None:
        nodes = list(self.graph.graph.nodes)
        try:
            sizes = _sizes(self.graph, x)
        except (RuntimeError, ValueError, TypeError):
            return None  # its batches are of a certain size, as those of frames in videos
        large = [index for index, node in enumerate(nodes) if sizes.get(node, 0) > _WORTH_IT]
        if not large:
            return None
        images = max(1, _AT_ONCE // max(sizes.values()))
        cut = next((node for index, node in enumerate(nodes) if index >= large[-1] and _is_neck(nodes, index)), None)
        if cut is None:
            return None
        if cut not in self.parts:
            first, second = _cut(self.graph, cut)
            self.parts[cut] = (first, second) if _takes_images_alone(first, x) else None
        parts = self.parts[cut]
        return None if parts is None else (*parts, images)


def _takes_images_alone(first: Planned, x: Tensor) -> bool:
    """Whether the early layers return for two images at once what they return for each: the mean of a batch is neither.

    The images are random and differ in mean and size; what is cut off by mistake is then off by far more than rounding.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    two = torch.randn(2, *x.shape[1:], generator=generator, device="cpu") * torch.tensor([1.0, 3.0]).view(
        -1, *[1] * (x.ndim - 1)
    )
    two[1] += 1
    two = two.to(x)
    if x.ndim == 4:
        two = two.contiguous(memory_format=torch.channels_last)
    try:
        whole, alone = first(two), torch.cat([first(image) for image in two.split(1)])
    except (RuntimeError, ValueError, TypeError):
        return False
    if not isinstance(whole, Tensor) or whole.shape != alone.shape:
        return False
    return bool(((whole - alone).abs().amax() <= 0.05 * alone.abs().amax()).item())


class _Recorder(fx.Interpreter):
    """Notes the bytes of what each node returns."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.sizes: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op.startswith("call"):
            self.sizes[n] = result.numel() * result.element_size()
        return result


def _sizes(graph: fx.GraphModule, x: Tensor) -> dict[fx.Node, int]:
    recorder = _Recorder(graph)
    recorder.run(x)
    return recorder.sizes


def _is_neck(nodes: list[fx.Node], index: int) -> bool:
    """Whether all that runs after the node depends on what ran before through this node alone."""
    if not nodes[index].op.startswith("call"):
        return False
    before = set(nodes[:index])
    return not any(
        source in before and source.op != "get_attr" for n in nodes[index + 1 :] for source in n.all_input_nodes
    )


def _cut(graph: fx.GraphModule, cut: fx.Node) -> tuple[Planned, Planned]:
    """The graph up to and including a node, and the rest."""
    parts = (fx.Graph(), fx.Graph())
    copies: tuple[dict[fx.Node, fx.Node], ...] = ({}, {})
    part = 0
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            for each in (0, 1):
                copies[each][node] = parts[each].node_copy(node)
            continue
        copies[part][node] = parts[part].node_copy(node, copies[part].__getitem__)
        if node is cut:
            parts[0].output(copies[0][node])
            part = 1
            copies[1][node] = parts[1].placeholder("x")
    return Planned(fx.GraphModule(graph, parts[0])), Planned(fx.GraphModule(graph, parts[1]))
