"""The input that a network runs on to record its data flow: the user's example, or a guess from the network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from senet.errors import InputError
from senet.surgery.dataflow import Flow, record
from senet.text import first_line

# Spatial sizes to try, likeliest first, by number of spatial axes: signals, images, and clips.
SIDES: dict[int, list[tuple[int, ...]]] = {
    1: [(1024,), (128,), (16000,)],
    2: [(side, side) for side in (224, 256, 299, 384, 64, 32, 28)],
    3: [(8, 64, 64), (16, 112, 112), (32, 32, 32)],
}


def recorded(model: nn.Module, example_input: Any, asker: str = "attach", instead: str = "") -> Flow:
    """The data flow of ``model`` on ``example_input``.

    Args:
        model: the network.
        example_input: a tensor, a tuple of arguments, a dict of keyword arguments, or None: inputs are then guessed
            from the first convolution of the network and from its timm or Hugging Face configuration.
        asker: the name of the calling function in messages.
        instead: an alternative to an example in messages.

    Raises:
        InputError: the input is on a different device than the model, or the model does not run on it.
    """
    if example_input is not None:
        if isinstance(example_input, Mapping):  # the processors of Hugging Face return other mappings than dict
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
        what, advice = "guessed inputs", "pass example_input="
    raise InputError(
        f"{asker}: {type(model).__name__} does not run on {what}: {reason}; {advice}{instead}"
    ) from problem


def guesses(model: nn.Module) -> list[Any]:
    """Inputs that ``model`` may accept, likeliest first, with the dtype and device of its first convolution."""
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
    """The image sizes in the network's Hugging Face or timm configuration."""
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
                f"{asker}: example_input is on {tensor.device}, the model is on {device}; move one of them with .to()"
            )
