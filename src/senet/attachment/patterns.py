"""Finds the places for SE in the data flow of a network. A "map" is a feature map.

Class names do not matter, so any implementation of a ResNet works. The rules, in order of precedence:

- Inverted residuals: after the activation of a depthwise convolution that a linear 1×1 convolution follows
  (MobileNetV3, EfficientNet).
- Residual blocks: at the end of the branch, before the addition (section 3.3, Fig. 3).
- Modules that concatenate, possibly followed by one convolution: their output (SE-Inception, Fig. 2).
- Sums of maps with different resolutions (HRNet): each term that ends in a convolution.
- If a network has none of these: after each convolution, norm, and activation (as in the paper's VGG-16).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from senet.surgery.dataflow import NORMS, PRODUCTS, RESHAPES, Flow, Node

ACTIVATIONS = frozenset(
    {
        *("relu", "hardtanh", "relu6", "silu", "gelu", "hardswish", "leaky_relu", "elu", "celu", "selu", "mish"),
        *("_prelu_kernel", "prelu", "rrelu", "rrelu_with_noise", "softplus", "tanh", "sigmoid", "hardsigmoid"),
        *("clamp", "clamp_min", "threshold"),
    }
)
# A gate before one of these is equivalent to a gate after it.
SCALINGS = frozenset({"mul", "div", "neg", "clone", "_to_copy", "alias", "detach", "native_dropout", "dropout"})
SUMS = frozenset({"add", "lerp", "sub"})
LONGEST_BRANCH = 16  # convolutions; a longer path spans other blocks and is not a residual branch


@dataclass
class Place:
    """A feature map to be rescaled.

    Attributes:
        kind: ``"depthwise"``, ``"residual"``, ``"concat"``, ``"fusion"``, or ``"activation"``.
        map: its node; in a residual block, the end of the branch.
        has_gate: whether it already has an SE block or another channel gate.
        block: the residual block, for that kind.
    """

    kind: str
    map: Node
    has_gate: bool = False
    block: "Block | None" = None


@dataclass
class Block:
    """A residual block: its input, the end of its shortcut, the sum, and the nodes of both paths as bit masks."""

    split: Node
    shortcut: Node
    total: Node
    body: int
    side: int


class Patterns:
    """The places of one recorded run."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.gates = [node for node in flow.nodes if _gated_map(node) is not None]
        self.gated = {id(_gated_map(gate)) for gate in self.gates}
        self.gate_bits = _bits(self.gates)
        self.conv_bits = _bits([node for node in flow.nodes if node.kernel])
        self.up_bits = _bits([node for node in flow.nodes if node.upsamples])

    def blocks(self) -> list[Place]:
        """One place per block of the network, in execution order; empty for a plain chain of convolutions."""
        places = list(self._depthwise())
        inverted = _bits([place.map for place in places])
        residual, fusions = self._residual(inverted)
        places += residual
        inside = 0
        for place in residual:
            inside |= place.block.body | place.block.side if place.block is not None else 0
        others = (*self._concatenations(), *fusions)
        places += [place for place in others if not inside >> place.map.index & 1]
        return sorted(_distinct(places), key=lambda place: place.map.index)

    def activations(self) -> list[Place]:
        """A place after each convolution, norm, and activation, in execution order."""
        places = []
        for node in self.flow.nodes:
            end = self._unit(node) if node.kernel and node.is_map else None
            if end is not None and not end.is_flat:
                places.append(Place("activation", end, has_gate=self._is_gated(end)))
        return _distinct(places)

    def convolutions(self) -> list[Place]:
        """A place after each convolution and norm, whatever follows; none if no convolution depends on another.

        A network whose only convolution embeds image patches is not a convolutional network.
        """
        convolutions = [node for node in self.flow.nodes if node.kernel]
        if not any((node.ancestors & ~(1 << node.index)) & self.conv_bits for node in convolutions):
            return []
        places = []
        for node in convolutions:
            after = following(node)
            end = after if after is not None and after.op in NORMS else node
            if end.is_map and not end.is_flat and end.users:
                places.append(Place("activation", end, has_gate=self._is_gated(end)))
        return _distinct(places)

    def _unit(self, conv: Node) -> Node | None:
        """The activation after a convolution and its norm; None if there is none."""
        node: Node | None = conv
        while node is not None:
            node = following(node)
            if node is not None and (node.op in ACTIVATIONS or _is_written_out(node)):
                return node if node.is_map else None
            # Reshapes are allowed: instance norms run as batch norms on (1, N·C, *spatial).
            if node is None or not (node.op in NORMS | SCALINGS | RESHAPES or _shifts(node)):
                return None
        return None

    def _is_gated(self, node: Node) -> bool:
        return id(node) in self.gated or any(id(user) in self.gated for user in node.users if user.op in SCALINGS)

    def _depthwise(self) -> Iterator[Place]:
        for node in self.flow.nodes:
            if not (node.groups > 1 and node.is_map and node.groups == node.shape[1]):
                continue
            end = self._unit(node)
            if end is None:
                continue
            gated = self._is_gated(end)
            after = next((g for g in self.gates if _gated_map(g) is end), end) if gated else end
            if any(self._is_linear(user) for user in after.users):
                yield Place("depthwise", end, has_gate=gated)

    def _is_linear(self, node: Node) -> bool:
        """Whether a node is a 1×1 convolution whose norm is not followed by an activation."""
        if node.kernel != 1 or node.groups != 1:
            return False
        after = following(node)
        if after is not None and after.op in NORMS:
            node = after
        return not any(user.op in ACTIVATIONS or _is_written_out(user) for user in node.users)

    def _residual(self, inverted: int) -> tuple[list[Place], list[Place]]:
        """The residual blocks, and the terms of other sums."""
        found: list[tuple[Place, Block]] = []
        fusions: list[Place] = []
        for node in self.flow.nodes:
            operands = node.inputs
            if node.op != "add" or len(operands) != 2 or not node.is_map:
                continue
            if any(operand.shape != node.shape or not operand.is_map for operand in operands):
                continue
            block = self._block(node, *operands)
            if block is not None:
                branch = next(operand for operand in operands if operand is not block.shortcut)
                found.append((Place("residual", branch, block=block), block))
            elif self._is_fusion(*operands):
                fusions += [f for operand in operands if (f := self._summand(operand)) is not None]
        blocks = [block for _, block in found]
        kept = [(place, block) for place, block in found if not _is_subsumed(block, blocks)]
        for place, block in kept:
            block.total = _with_activation(block.total)
            place.has_gate = bool(block.body & self.gate_bits) or self._is_gated(place.map)
        return [place for place, block in kept if not block.body & inverted], fusions

    def _block(self, total: Node, a: Node, b: Node) -> Block | None:
        """The residual block that ends in a + b, or None. The branch is the path with more convolutions in a row."""
        alone = {id(a): a.ancestors & ~b.ancestors, id(b): b.ancestors & ~a.ancestors}
        shared = a.ancestors & b.ancestors
        count = max((bits & self.conv_bits).bit_count() for bits in alone.values())
        if not shared or not 0 < count <= LONGEST_BRANCH or any(bits & self.up_bits for bits in alone.values()):
            return None
        depths = {id(node): self._depth(node, alone[id(node)]) for node in (a, b)}
        shortcut, branch = sorted((a, b), key=lambda node: depths[id(node)])
        if depths[id(shortcut)] == depths[id(branch)]:
            return None  # parallel branches (RepVGG's, shake-shake's)
        body, side = alone[id(branch)], alone[id(shortcut)]
        return Block(self.flow.nodes[shared.bit_length() - 1], shortcut, total, body, side)

    def _depth(self, end: Node, bits: int) -> int:
        """The largest number of convolutions in a row that lead to a node, among the nodes of ``bits``."""
        depths: dict[int, int] = {}
        for node in self.flow.nodes[(bits & -bits).bit_length() - 1 : end.index + 1] if bits else ():
            if bits >> node.index & 1:
                before = max((depths.get(id(source), 0) for source in node.inputs), default=0)
                depths[id(node)] = before + bool(node.kernel)
        return depths.get(id(end), 0)

    def _is_fusion(self, a: Node, b: Node) -> bool:
        """Whether the paths of two maps differ by a change of resolution or by many convolutions."""
        for mine, other in ((a, b), (b, a)):
            body = mine.ancestors & ~other.ancestors
            if body & self.up_bits or (body & self.conv_bits).bit_count() > LONGEST_BRANCH:
                return True
        return False

    def _summand(self, node: Node) -> Place | None:
        """The norm of the convolution that ends a term of a sum, before any interpolation."""
        while node.upsamples and not node.kernel and len(node.inputs) == 1:
            (node,) = node.inputs
        if node.op in NORMS and node.inputs[0].kernel:
            return Place("fusion", node, has_gate=self._is_gated(node))
        return None

    def _concatenations(self) -> Iterator[Place]:
        for node in self.flow.nodes:
            if node.op != "cat" or len(node.inputs) < 2 or not node.is_map or node.is_flat or not node.owner:
                continue
            if node.shape[1] != sum(each.shape[1] for each in node.inputs):
                continue
            end = _end_within(node)
            if end is not None and end.users and end.is_map:
                gates = end.ancestors & self.gate_bits & ~node.ancestors
                yield Place("concat", end, bool(gates) or self._is_gated(end) or self._is_gated_after(end))

    def _is_gated_after(self, end: Node) -> bool:
        """Whether a 1×1 convolution outside the module follows the concatenation, and then a gate (VoVNet)."""
        conv = following(end)
        if conv is None or conv.kernel != 1:
            return False
        unit = self._unit(conv)
        return unit is not None and self._is_gated(unit)


def _is_subsumed(block: Block, blocks: list[Block]) -> bool:
    """Whether a sum is part of a larger block (Res2Net), or spans other blocks (a long shortcut)."""
    for other in blocks:
        is_alike = other.total.owner == block.total.owner
        if other is not block and is_alike and other.body >> block.total.index & 1:
            return True
        if not is_alike and block.body >> other.total.index & 1:
            return True
    return False


def following(node: Node) -> Node | None:
    """The only operation that reads a map, or the product in ``x · sigmoid(x)``; None if there are several."""
    users = list(dict.fromkeys(node.users))
    if len(users) == 1:
        return users[0]
    last = users[-1] if users else None
    if last is not None and _is_written_out(last) and all(user is last or last.comes_from(user) for user in users):
        return last
    return None


def _is_written_out(node: Node) -> bool:
    """Whether a node is x · f(x) with an elementwise f: Swish and similar activations, written out."""
    if node.op != "mul" or len(node.inputs) != 2 or len({each.shape for each in node.inputs}) != 1 or node.is_flat:
        return False
    x, f = sorted(node.inputs, key=lambda each: each.index)
    steps = 0
    while f is not x and len(f.inputs) == 1 and f.op in ACTIVATIONS | SCALINGS | {"add"} and steps < 6:
        (f,) = f.inputs
        steps += 1
    return f is x and steps > 0


def _shifts(node: Node) -> bool:
    """Whether a node adds a constant, as in a frozen batch norm."""
    return node.op in ("add", "sub") and len(node.inputs) == 1


def _gated_map(node: Node) -> Node | None:
    """The map that a node multiplies by a data-dependent factor per channel; None for any other node."""
    if node.op != "mul" or len(node.inputs) != 2 or any(len(each.shape) < 3 for each in node.inputs):
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        source = gate
        while source.op == "expand" or (source.op in RESHAPES and source.inputs[0].is_flat):
            (source,) = source.inputs
        if len(source.shape) < 3 or not source.is_flat or source.shape[1] == 1:
            continue
        if not x.is_flat or (source.comes_from(x) and source is not x and _computes(source, x)):
            return x
    return None


def _computes(gate: Node, x: Node) -> bool:
    """Whether a convolution or matrix product lies between a 1×1 feature map and its gate."""
    node = gate
    while node is not x and node.inputs:
        if node.kernel or node.op in PRODUCTS:
            return True
        node = node.inputs[0]
    return False


def _with_activation(total: Node) -> Node:
    after = following(total)
    return after if after is not None and after.op in ACTIVATIONS else total


def _end_within(cat: Node) -> Node | None:
    """The output of the module that concatenates, if at most one convolution and a gate follow; otherwise None."""
    node: Node | None = cat
    convolutions = 0
    while node is not None:
        if cat.owner in node.returned_by or cat.owner in node.passed_by:
            return node
        gate = next((user for user in node.users if _gated_map(user) is node), None)
        node = gate if gate is not None else following(node)
        if node is None or len(node.shape) < 3:
            return None
        convolutions += bool(node.kernel)
        allowed = NORMS | ACTIVATIONS | SCALINGS | RESHAPES | {"permute", "transpose"}
        if convolutions > 1 or not (node.kernel or node.op in allowed or _is_written_out(node) or _shifts(node)):
            return None
    return None


def _bits(nodes: list[Node]) -> int:
    bits = 0
    for node in nodes:
        bits |= 1 << node.index
    return bits


def _distinct(places: list[Place]) -> list[Place]:
    """One place per map: the first one found."""
    return list({id(place.map): place for place in reversed(places)}.values())[::-1]
