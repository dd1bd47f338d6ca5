"""What a network costs: parameters, and multiply-adds counted by PyTorch's own counter, module by module.

The SE blocks' share is counted apart, in any network: ours, and whatever ``surgery.find_gates`` finds. A block is two
fully connected layers (multiply-adds), a pooling (one addition a value) and a scaling (one multiplication a value).
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
    """The cost of a network, or of one of its modules with all inside it.

    Attributes:
        params: trainable values.
        running_stats: batch norm's running means and variances.
        mult_adds: multiply-adds of convolutions and fully connected layers for one image, those of SE included.
        se_params, se_mult_adds: the SE blocks' part of ``params`` and ``mult_adds``.
        squeeze_adds: additions of the SE blocks' poolings: one for each value of the map; 0 for NoSqueeze.
        scale_mults: multiplications of the SE blocks' scalings: one for each value of the map.
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
        """What the paper prints as parameters of the ablations (section 6): the running statistics are counted."""
        return self.params + self.running_stats

    @property
    def paper_mult_adds(self) -> int:
        """What the paper prints as FLOPs: multiply-adds, and SE's poolings; its scalings are not counted."""
        return self.mult_adds + self.squeeze_adds


def module_costs(model: nn.Module, input_size: int, in_chans: int = 3) -> dict[str, Cost]:
    """The cost of every module of ``model`` by its qualified name, ``""`` being the whole; changes nothing in it.

    A module that stands in several places is counted in the first, with all its calls. The order is that of the first
    calls; modules that are not called themselves, lists say, come behind.

    Args:
        model: any network of images, on any device; on ``"meta"`` nothing is allocated or computed. Of a wrapped one
            (compiled, accelerated, for several devices) the network inside is counted, operation by operation.
        input_size: side of the image, in pixels; one image is run.
        in_chans: channels of the image.
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
    """The cost of ``model`` for one image of ``in_chans`` × ``input_size`` × ``input_size``; changes nothing in it."""
    return module_costs(model, input_size, in_chans)[""]


def model_cost(
    name: str, num_classes: int | None = None, in_chans: int = 3, input_size: int | None = None, **kwargs: Any
) -> Cost:
    """The cost of a registered network, without allocating it.

    Args:
        name: a registered name.
        num_classes: None is 1000, or 10 for networks of CIFAR's images.
        in_chans: channels of the image.
        input_size: None is the network's own.
        **kwargs: for ``create_model``: ``se=SEConfig(…)`` say.

    Raises:
        InputError: no such network, an argument that it does not take, or images too small for it.
    """
    size = image_side(name, input_size)
    return module_cost(meta_model(name, num_classes, in_chans, **kwargs), size, in_chans)


def image_side(name: str, input_size: int | None) -> int:
    """``input_size``, which a registered network must be able to take; None is the network's own."""
    spec = model_spec(name)
    size = spec.input_size if input_size is None else input_size
    if size < spec.min_size:
        raise InputError(f"input size {size} is not allowed; {name} needs images of at least {spec.min_size} pixels")
    return size


def meta_model(name: str, num_classes: int | None = None, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """A registered network without memory: shapes alone. The arguments are those of ``model_cost``."""
    classes = usual_classes(model_spec(name)) if num_classes is None else num_classes
    # Autograd, which says what memory a training step keeps, takes no tensors that were made in inference mode.
    with torch.device("meta"), torch.inference_mode(mode=False):
        return build_model(name, classes, in_chans, **kwargs)


def usual_classes(spec: ModelSpec) -> int:
    """The classes that a network is counted with: ImageNet's, or CIFAR-10's for images of that size."""
    return 10 if spec.input_size == CIFAR_SIDE else 1000


def lineage(name: str) -> Iterator[str]:
    """A qualified name, its ancestors' and ``""``, the root's."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def one_image(model: nn.Module, input_size: int, in_chans: int) -> Tensor:
    """A black image of the type of the parameters, where they are."""
    tensors = (*model.parameters(), *model.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    return torch.zeros(1, in_chans, input_size, input_size, device=like.device, dtype=like.dtype)


@contextmanager
def running_modules(model: nn.Module, before_change: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """The names of the modules that run, by one who calls the other; ``before_change`` gets the innermost one's.

    Every module is listened to, which keeps the fast forms away: they would not call it.
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
                continue  # cannot be listened to: its operations are its caller's
            # First and last, so that what other hooks compute, an attached gate say, is the module's own.
            first = module.register_forward_pre_hook(functools.partial(enter, name), prepend=True)
            hooks.callback(first.remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield running


class _Map:
    """The values of the map that a module pools and scales, which looks like a gate: the hook ``count`` adds them up.

    Attributes:
        multiplies: no call has shown yet that it is no gate: the output has the shape of the input.
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
    """Run ``model`` once; gives each module's multiply-adds to ``add``, and the modules in the order of first calls."""
    called: dict[str, None] = {}
    counted = 0

    def settle(name: str) -> None:
        nonlocal counted
        total = counter.get_total_flops()
        # The counter counts a multiplication and an addition as two operations.
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
