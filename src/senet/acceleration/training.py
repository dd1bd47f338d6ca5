"""The training form of networks from other libraries: norm + SE + shortcut + ReLU run as ``ResidualTail``.

The modules of the network run in the order of their trace. Only the tails of residual blocks are replaced, and they use
the network's own norms and FCs, so that parameters, statistics, and their updates are those of the network.
"""

from torch import Tensor, fx, nn

from senet.acceleration.foreign import ForeignGate
from senet.acceleration.report import Known, known_gates
from senet.acceleration.trace import RELUS, added_to, called_module, only_user, take_out_identities, traced
from senet.errors import InputError
from senet.nn.attachment import CHILD, gate_of_output, rescale_input, rescale_output
from senet.nn.residual_tail import ResidualTail
from senet.nn.squeeze_excite import SqueezeExcite
from senet.ops.tail.norms import NORMS


class SweptTail(nn.Module):
    """A residual tail that holds the norm and the gate of the block it was cut from."""

    def __init__(self, norm: nn.Module, se: SqueezeExcite | None, relu: bool) -> None:
        super().__init__()
        self.tail, self.norm, self.se = ResidualTail(activation=relu), norm, se

    def forward(self, u: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """See ``ResidualTail``."""
        return self.tail(u, self.norm, self.se, shortcut)


class Swept:
    """The training form of a network, or why there is none. Not a module: it has no keys.

    Args:
        model: in training mode; its modules are used, not copied.

    Attributes:
        graph: the network with its tails swept; None where nothing is gained.
        names: the gates that are computed in the sweeps.
        reason: why there is no graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self.inside = list(model.modules())[1:]
        self.graph: fx.GraphModule | None = None
        self.names: tuple[str, ...] = ()
        known, _ = known_gates(model)
        self.reason = self._why_not(known)
        if self.reason is not None:
            return
        try:
            graph = traced(model, set(known))
        except InputError as error:
            self.reason = str(error).removeprefix("accelerate: ")
            return
        take_out_identities(graph)
        self.names = _sweep(graph, known)
        self.reason = None if self.names else "no gate follows a norm"
        self.graph = graph if self.names else None

    def _why_not(self, known: dict[str, Known]) -> str | None:
        if not known:
            return "there is no gate"
        if any(isinstance(module, ResidualTail) for module in self.inside):
            return "the network already runs fused tails"
        if any(getattr(module, "grad_checkpointing", False) for module in self.inside):
            return "it uses activation checkpointing, which a trace does not show"
        return None

    def is_hooked(self) -> bool:
        """Whether somebody listens to a module, which this may not call."""
        return any(map(hooks_of, self.inside))


def hooks_of(module: nn.Module) -> int:
    """How many hooks a module has, those of attached gates not counted; a forward of its own is one, too."""
    forward = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    backward = len(module._backward_hooks) + len(module._backward_pre_hooks)
    listening = sum(hook not in (rescale_output, rescale_input) for hook in forward)
    return backward + listening + ("forward" in vars(module))


def _sweep(module: fx.GraphModule, known: dict[str, Known]) -> tuple[str, ...]:
    """Put a ``SweptTail`` wherever a gate follows a norm; returns those gates."""
    modules = dict(module.named_modules())
    names = []
    for node in list(module.graph.nodes):
        norm = called_module(modules, node)
        if norm is None or type(norm) not in NORMS:
            continue
        name, block, chain = f"{node.target}.{CHILD}", None, [node]
        if gate_of_output(norm) is None:
            user = only_user(node)
            gate = None if user is None or user.op != "call_module" else known.get(str(user.target))
            block = gate.as_block() if isinstance(gate, ForeignGate) else gate
            if user is None or block is None:
                continue
            name = str(user.target)
            chain.append(user)
        names.append(name)
        _replace(module, chain, norm, block)
    module.delete_all_unused_submodules()
    module.recompile()
    return tuple(names)


def _replace(module: fx.GraphModule, chain: list[fx.Node], norm: nn.Module, block: SqueezeExcite | None) -> None:
    """Take norm and gate, and the sum and the ReLU that follow, out of the graph, for one swept tail."""
    modules = dict(module.named_modules())
    args, user = [chain[0].args[0]], only_user(chain[-1])
    shortcut = None if user is None else added_to(user, chain[-1])
    if user is not None and shortcut is not None:
        chain.append(user)
        args.append(shortcut)
        user = only_user(user)
    relu = user is not None and (type(called_module(modules, user)) is nn.ReLU or _is_relu(user))
    if user is not None and relu:
        chain.append(user)
    name = f"swept_{len(modules)}_{str(chain[0].target).replace('.', '_')}"  # a norm may stand in several places
    module.add_submodule(name, SweptTail(norm, block, relu))
    with module.graph.inserting_after(chain[-1]):
        tail = module.graph.call_module(name, tuple(args))
    chain[-1].replace_all_uses_with(tail)
    for node in reversed(chain):
        module.graph.erase_node(node)


def _is_relu(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in RELUS
