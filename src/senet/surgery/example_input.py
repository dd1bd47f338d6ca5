"""On what a network is run to see its data flow: the example that a person gives, or one guessed from the network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from senet.errors import InputError
from senet.surgery.dataflow import Flow, record
from senet.text import first_line

# Sides to try, likeliest first, by the number of spatial axes: of images, of the usual small data sets, of clips.
SIDES: dict[int, list[tuple[int, ...]]] = {
    1: [(1024,), (128,), (16000,)],
    2: [(side, side) for side in (224, 256, 299, 384, 64, 32, 28)],
    3: [(8, 64, 64), (16, 112, 112), (32, 32, 32)],
}


def recorded(model: nn.Module, example_input: Any, asker: str = "attach", instead: str = "") -> Flow:
    """The data flow of ``model`` on ``example_input``: a tensor, a tuple of arguments, a dict of keywords, or None.

    With None inputs are guessed from the network's first convolution and from what timm or Hugging Face say in its
    configuration. In messages, ``asker`` is the function that asks, ``instead`` is another remedy than an example.

    Raises:
        InputError: the input is on another device than the model, or the model does not run on it.
    """
    if example_input is not None:
        if isinstance(example_input, Mapping):  # what Hugging Face's processors return is no dict
            example_input = dict(example_input)
        _check_device(model, example_input, asker)
    inputs = guesses(model) if example_input is None else [example_input]
    problem: Exception | None = None
    for each in inputs:
        kwargs = each if isinstance(each, dict) else {}
        args = () if kwargs else each if isinstance(each, tuple) else (each,)
        try:
            return record(model, args, kwargs)
        except Exception as error:
            problem = problem or error
    reason = "it has no convolution to guess one from" if problem is None else first_line(problem)
    what, advice = "example_input", "check it"
    if example_input is None:
        what, advice = "guessed inputs", "give example_input="
    raise InputError(
        f"{asker}: {type(model).__name__} does not run on {what}: {reason}; {advice}{instead}"
    ) from problem


def guesses(model: nn.Module) -> list[Any]:
    """Inputs that ``model`` may take, likeliest first, in the type and on the device of its first convolution."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if first is None:
        return []
    axes = first.weight.ndim - 2
    sides = [*(_own_sides(model) if axes == 2 else []), *SIDES[axes]]
    weight = first.weight
    return [
        torch.zeros(1, first.in_channels, *side, dtype=weight.dtype, device=weight.device)
        for side in dict.fromkeys(sides)
    ]


def _own_sides(model: nn.Module) -> list[tuple[int, ...]]:
    """The sides of images that the network's configuration says, of Hugging Face or of timm."""
    sides: list[tuple[int, ...]] = []
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int):
        sides.append((size, size))
    elif isinstance(size, (list, tuple)):
        sides.append(tuple(size))
    for attribute in ("pretrained_cfg", "default_cfg"):
        configuration = getattr(model, attribute, None)
        if isinstance(configuration, Mapping) and configuration.get("input_size"):
            return [*sides, tuple(configuration["input_size"][1:])]
    return sides


def _check_device(model: nn.Module, example_input: Any, asker: str) -> None:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    for tensor in tree_leaves(example_input):
        if isinstance(tensor, Tensor) and len(devices) == 1 and tensor.device not in devices:
            (device,) = devices
            raise InputError(
                f"{asker}: example_input is on {tensor.device}, the model on {device}; move one of them with .to()"
            )
