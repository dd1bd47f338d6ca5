"""Maps a feature map in the data flow to the module at which it can be rescaled."""

import torch
from torch import nn

from senet.attachment.patterns import ACTIVATIONS, SCALINGS, SUMS, Place, following
from senet.nn.carriers import CHILD, Side
from senet.nn.squeeze_excite import SEConfig
from senet.surgery.dataflow import NORMS, RESHAPES, Flow, Node

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # an added child would take part in their iteration

Anchor = tuple[str, Side, Node]


class Anchors:
    """Finds the modules of a network that can hold gates.

    The first choice is the module that returns the feature map, the innermost of several. The next is a module that
    passes it on unchanged, or the only one that takes it. If a function computes the map, it is the last module before.
    """

    def __init__(self, model: nn.Module, config: SEConfig, flow: Flow) -> None:
        self.config, self.flow = config, flow
        self.modules = dict(model.named_modules())

    def placed(self, place: Place) -> tuple[list[Node], str]:
        """The feature maps to rescale for the configured placement (Fig. 5), or an empty list and the reason."""
        placement, block = self.config.placement, place.block
        if placement == "standard":
            return [place.map], ""
        if block is None:
            return [], f"placement {placement!r} needs a residual block"
        if placement == "post":
            return [block.total], ""
        if placement == "identity":
            own = block.shortcut is not block.split
            return ([block.shortcut], "") if own else ([], "its shortcut is the identity, which no module returns")
        body = [node for node in self.flow.nodes[: place.map.index + 1] if block.body >> node.index & 1]
        if placement == "pre":
            return [node for node in body if block.split in node.inputs], "no single layer takes the block's input"
        spatial = [node for node in body if node.kernel > 1]
        if not spatial:
            return [], "its branch has no convolution larger than 1×1"
        norm = following(spatial[-1])
        return [norm if norm is not None and norm.op in NORMS else spatial[-1]], ""

    def of(self, node: Node) -> list[tuple[str, Side, Node]]:
        """The modules at which a feature map can be rescaled: one, those of all terms of a sum, or none."""
        if self.config.placement == "pre":
            first = [path for source in node.inputs for path in source.taken_by if path == node.owner]
            return [(path, "input", node.inputs[0]) for path in first if self._can_take(path)][:1]
        if not node.is_map:
            return []
        for path in node.returned_by:
            if self._can_hold(path):
                return [(path, "output", node)]
        if len(node.inputs) == 1 and (node.op in SCALINGS | RESHAPES or node.op in ("permute", "transpose")):
            before = self.of(node.inputs[0]) if _is_alone(node.inputs[0], node) else []
            if before:
                return before
        if len(node.users) == 1:
            for path in node.passed_by:
                if self._can_hold(path):
                    return [(path, "output", node)]
            for path in node.taken_by:
                if self._can_take(path) and node.users[0].owner == path:
                    return [(path, "input", node)]
        return self._before(node)

    def _before(self, node: Node) -> list[tuple[str, Side, Node]]:
        if node.op in ACTIVATIONS | NORMS and len(node.inputs) == 1 and _is_alone(node.inputs[0], node):
            return self.of(node.inputs[0])
        if node.op in SUMS:
            each = [self.of(source) for source in node.inputs if source.shape == node.shape]
            return [anchor for anchors in each for anchor in anchors] if all(each) else []
        return []

    def _can_hold(self, path: str) -> bool:
        """Whether a module can get a child ``se``: called once, not a container, no attribute ``se``, not the root."""
        module = self.modules.get(path)
        if not path or module is None or self.flow.calls[path] != 1:
            return False
        return not isinstance(module, (*CONTAINERS, torch.jit.ScriptModule)) and not hasattr(module, CHILD)

    def _can_take(self, path: str) -> bool:
        """Whether a gate on the module's input precedes a single layer, not a whole block."""
        return self._can_hold(path) and next(self.modules[path].children(), None) is None


def _is_alone(node: Node, reader: Node) -> bool:
    return all(user is reader for user in node.users)
