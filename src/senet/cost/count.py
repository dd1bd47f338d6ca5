"""The cost of a network: parameters, and multiply-adds from PyTorch's own counter, per module.

The share of SE is counted separately in any network whose gates ``surgery.find_gates`` finds. An SE block costs two
fully connected layers (multiply-adds), a pooling (one addition per value), and a scaling (one multiplication per
value).
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from senet.errors import InputError
from senet.models.registry import ModelSpec, build_model, model_spec
from senet.nn.modes import evaluating
from senet.nn.squeeze_excite import SqueezeExcite
from senet.surgery.find_gates import find_gates, plain_network

CIFAR_SIDE = 32


@dataclass(frozen=True)
class Cost:
    """The cost of a network, or of one of its modules including its submodules.

    Attributes:
        params: number of trainable parameters.
        running_stats: number of running means and variances in batch norm.
        mult_adds: multiply-adds of convolutions and fully connected layers for one image, including SE.
        se_params, se_mult_adds: the part of ``params`` and ``mult_adds`` that belongs to SE blocks.
        squeeze_adds: additions in the pooling of SE blocks, one per value of the feature map; 0 for NoSqueeze.
        scale_mults: multiplications in the scaling of SE blocks, one per value of the feature map.
    """

    params: int = 0
    running_stats: int = 0
    mult_adds: int = 0
    se_params: int = 0
    se_mult_adds: int = 0
    squeeze_adds: int = 0
    scale_mults: int = 0

    @property
    def params_with_statistics(self) -> int:
        """The parameters that the paper prints for its ablations (section 6), which include running statistics."""
        return self.params + self.running_stats

    @property
    def paper_mult_adds(self) -> int:
        """The FLOPs that the paper prints: multiply-adds and the pooling of SE, without its scaling."""
        return self.mult_adds + self.squeeze_adds


def module_costs(model: nn.Module, input_size: int, in_chans: int = 3) -> dict[str, Cost]:
    """Count the cost of every module of ``model``, which is not changed.

    Args:
        model: any image network, on any device. On ``"meta"``, nothing is allocated or computed. If the network is
            wrapped (compiled, accelerated, data-parallel), the network inside is counted, one operation at a time.
        input_size: side of the image, in pixels; the network runs once on one image.
        in_chans: channels of the image.

    Returns:
        the cost by qualified name, in the order of the first calls; ``""`` is the whole network. Modules that are never
        called, such as lists, come last. A module that is registered in several places is counted in the first one,
        with all its calls.
    """
    model = plain_network(model)
    maps = {gate.name: _Map(gate.module) for gate in find_gates(model)}
    tally: dict[str, Counter[str]] = defaultdict(Counter)

    def add(name: str, **amounts: int) -> None:
        for ancestor in lineage(name):
            tally[ancestor].update(amounts)

    order = _count_multiply_adds(model, one_image(model, input_size, in_chans), maps.values(), add)
    gates = {name for name, scaled in maps.items() if scaled.multiplies}
    for key, parameter in model.named_parameters():
        owner = key.rpartition(".")[0]
        inside = not gates.isdisjoint(lineage(owner))
        add(owner, params=parameter.numel(), se_params=parameter.numel() if inside else 0)
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            add(key.rpartition(".")[0], running_stats=buffer.numel())
    for name in gates:
        se_mult_adds = tally[name]["mult_adds"]
        add(name, se_mult_adds=se_mult_adds, squeeze_adds=maps[name].squeezed, scale_mults=maps[name].scaled)
    names = dict.fromkeys([*order, *(name for name, _ in model.named_modules())])
    return {name: Cost(**tally[name]) for name in names}


def module_cost(model: nn.Module, input_size: int, in_chans: int = 3) -> Cost:
    """The cost of ``model``, which is not changed, for one image of ``in_chans`` × ``input_size`` × ``input_size``."""
    return module_costs(model, input_size, in_chans)[""]


def model_cost(
    name: str, num_classes: int | None = None, in_chans: int = 3, input_size: int | None = None, **kwargs: Any
) -> Cost:
    """The cost of a registered network, without allocating it.

    Args:
        name: a registered name.
        num_classes: None means 1000, or 10 for CIFAR networks.
        in_chans: channels of the image.
        input_size: side of the image, in pixels; None means the network's default.
        **kwargs: passed to ``create_model``, such as ``se=SEConfig(…)``.

    Raises:
        InputError: unknown network, an argument that it does not accept, or images that are too small for it.
    """
    size = image_side(name, input_size)
    return module_cost(meta_model(name, num_classes, in_chans, **kwargs), size, in_chans)


def image_side(name: str, input_size: int | None) -> int:
    """``input_size``, checked against the network's minimum; None means the network's default."""
    spec = model_spec(name)
    size = spec.input_size if input_size is None else input_size
    if size < spec.min_size:
        raise InputError(f"input size {size} is not allowed; {name} needs images of at least {spec.min_size} pixels")
    return size


def meta_model(name: str, num_classes: int | None = None, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """A registered network on the meta device. The arguments are those of ``model_cost``."""
    classes = usual_classes(model_spec(name)) if num_classes is None else num_classes
    # Autograd, which tells what a training step keeps in memory, rejects tensors created in inference mode.
    with torch.device("meta"), torch.inference_mode(mode=False):
        return build_model(name, classes, in_chans, **kwargs)


def usual_classes(spec: ModelSpec) -> int:
    """The default number of classes: that of CIFAR-10 for networks with its image size, else that of ImageNet."""
    return 10 if spec.input_size == CIFAR_SIDE else 1000


def lineage(name: str) -> Iterator[str]:
    """A qualified name, the names of its ancestors, and ``""`` for the root."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def one_image(model: nn.Module, input_size: int, in_chans: int) -> Tensor:
    """A black image, with the dtype and the device of the parameters."""
    tensors = (*model.parameters(), *model.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return torch.zeros(1, in_chans, input_size, input_size, device=like.device, dtype=like.dtype)


@contextmanager
def running_modules(model: nn.Module, before_change: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """The call stack of modules, by name. ``before_change`` gets the innermost name before the stack changes.

    Every module gets hooks. They also disable the fast forms, which would not call the modules.
    """
    running = [""]

    def enter(name: str, *call: Any) -> None:
        if before_change is not None:
            before_change(running[-1])
        running.append(name)

    def leave(*call: Any) -> None:
        if before_change is not None:
            before_change(running[-1])
        running.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks: its operations count as its caller's
            # First and last, so that the work of other hooks, such as an attached gate, counts as the module's.
            first = module.register_forward_pre_hook(functools.partial(enter, name), prepend=True)
            hooks.callback(first.remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield running


class _Map:
    """Counts the values of the feature map that a candidate gate pools and scales; ``count`` is its forward hook.

    Attributes:
        multiplies: every call so far returned the shape of its input. Otherwise, the module is not a gate.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.multiplies = module, True
        self.squeezed = self.scaled = 0

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or not isinstance(output, Tensor) or output.shape != x.shape:
            self.multiplies = False
            return
        self.scaled += output.numel()
        if not isinstance(module, SqueezeExcite) or module.config.squeeze != "none":
            self.squeezed += x.numel()


class _ShapesOfNorms(TorchFunctionMode):
    """Batch norms without memory give maps of the same shape: PyTorch's own way to it takes half of the whole time.

    Nothing in them is counted.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and args[0].is_meta:
            return torch.empty_like(args[0])
        return func(*args, **kwargs or {})


def _count_multiply_adds(model: nn.Module, x: Tensor, maps: Iterable[_Map], add: Callable[..., None]) -> list[str]:
    """Run ``model`` once and pass each module's multiply-adds to ``add``; returns the modules in call order."""
    called: dict[str, None] = {}
    counted = 0

    def settle(name: str) -> None:
        nonlocal counted
        total = counter.get_total_flops()
        # The counter counts a multiply-add as two operations.
        add(name, mult_adds=(total - counted) // 2)
        counted = total
        called[name] = None

    with ExitStack() as hooks:
        for scaled in maps:
            hooks.callback(scaled.module.register_forward_hook(scaled.count, with_kwargs=True).remove)
        hooks.enter_context(evaluating(model))
        hooks.enter_context(torch.no_grad())
        hooks.enter_context(_ShapesOfNorms())
        counter = hooks.enter_context(FlopCounterMode(display=False))
        hooks.enter_context(running_modules(model, settle))
        model(x)
    return list(called)
