"""What a network costs: parameters, and multiply-adds counted by PyTorch's own counter, module by module.

The SE blocks' share is counted apart, in any network: ours, and whatever ``gates.recognise`` finds. A block is two
fully connected layers (multiply-adds), a pooling (one addition a value) and a scaling (one multiplication a value).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from senet.gates.recognise import find_gates, plain_network
from senet.models.registry import ModelSpec, create_model, model_spec
from senet.nn.squeeze_excite import SqueezeExcite

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

    Args:
        model: any network of images, on any device; on ``"meta"`` nothing is allocated or computed. Of a wrapped one
            (compiled, accelerated, for several devices) the network inside is counted, operation by operation.
        input_size: side of the image, in pixels; one image is run.
        in_chans: channels of the image.
    """
    model = plain_network(model)
    gates = {gate.name: gate.module for gate in find_gates(model)}
    tally: dict[str, Counter[str]] = defaultdict(Counter)

    def add(name: str, **amounts: int) -> None:
        for ancestor in lineage(name):
            tally[ancestor].update(amounts)

    for key, parameter in model.named_parameters():
        owner = key.rpartition(".")[0]
        inside = any(ancestor in gates for ancestor in lineage(owner))
        add(owner, params=parameter.numel(), se_params=parameter.numel() if inside else 0)
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            add(key.rpartition(".")[0], running_stats=buffer.numel())
    with ExitStack() as hooks:
        for name, gate in gates.items():
            hooks.callback(gate.register_forward_hook(_map_counter(add, name)).remove)
        with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(one_image(model, input_size, in_chans))
    # The counter counts a multiplication and an addition as two operations; it knows modules by the root's class.
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    root = type(model).__name__
    names = [name for name, _ in model.named_modules()]
    for name in names:
        tally[name]["mult_adds"] = counts.get(f"{root}.{name}" if name else "Global", 0)
    for name in gates:
        add(name, se_mult_adds=tally[name]["mult_adds"])
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
    """
    spec = model_spec(name)
    model = meta_model(name, num_classes, in_chans, **kwargs)
    return module_cost(model, input_size or spec.input_size, in_chans)


def meta_model(name: str, num_classes: int | None = None, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """A registered network without memory: shapes alone. The arguments are those of ``model_cost``."""
    classes = usual_classes(model_spec(name)) if num_classes is None else num_classes
    with torch.device("meta"):
        return create_model(name, classes, in_chans, **kwargs)


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
    reference = next(model.parameters())
    return torch.zeros(1, in_chans, input_size, input_size, device=reference.device, dtype=reference.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode for a while, then each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _map_counter(add: Any, name: str) -> Any:
    """A forward hook that counts the values of the map that a gate pools and scales."""

    def count(gate: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        squeezes = not isinstance(gate, SqueezeExcite) or gate.config.squeeze != "none"
        add(name, squeeze_adds=args[0].numel() if squeezes else 0, scale_mults=output.numel())

    return count
