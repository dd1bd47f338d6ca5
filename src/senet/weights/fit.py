"""Fits the weights of a file to a network, or reports in one line why they do not fit."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.models.base import ConvNet
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
from senet.weights.files import is_extra_state
from senet.weights.key_maps import Layout

_LOG = logging.getLogger("senet.weights")
COUNTER = "num_batches_tracked"
# Without 8-bit floats: they come with scales, which nothing here reads.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GROUPS = 4  # groups of keys that a message names
# Arguments that change the function of a gate but not the shape of a weight.
_SAME_SHAPES = ("squeeze", "gate", "placement", "identity_init")


def fit(state: dict[str, Any], model: nn.Module, label: str) -> dict[str, Any]:
    """``state`` with exactly the keys of ``model``.

    - The classifier is newly initialized if the file has none or one for a different number of classes. It is dropped
      if ``model`` has none.
    - Gates that the file lacks keep their values if they are identity-initialized: the output is that of the plain
      network.
    - FC biases that the file's gates lack are 0, which is the same function.
    - Batch norm counters that an old file lacks are added.
    - Extra states come from the file, or stay as they are. Those without a module are ignored, with a warning.

    Args:
        state: the weights, under our key names.
        model: the network; not changed.
        label: the name of the file in messages.

    Raises:
        InputError: keys are missing or unexpected, or shapes differ (the message counts and groups them), or values
            have an incompatible dtype or are not finite (the message names the first one).
    """
    own = model.state_dict()
    extra = {key: own.pop(key) for key in list(own) if is_extra_state(key)}
    extra |= {key: state[key] for key in extra if key in state}
    state = _without_extra(state, extra, label)
    head = f"{_head_name(model)}."
    if not any(key.startswith(head) for key in own):  # the model returns features
        state = {key: value for key, value in state.items() if not key.startswith(head)}
    headless = not any(key.startswith(head) for key in state)
    anew = {
        key: value
        for key, value in own.items()
        if key.startswith(head) and (headless or (key in state and state[key].shape != value.shape))
    }
    state = state | anew | {key: own[key] for key in own if key.endswith(COUNTER) and key not in state}
    gates = {name: module for name, module in model.named_modules() if isinstance(module, SqueezeExcite)}
    gate_keys = [f"{name}.{key}" for name, gate in gates.items() for key in gate.state_dict()]
    biases = [key for key in gate_keys if key.endswith(".bias")]
    if not any(key in state for key in gate_keys):
        if all(gate.config.identity_init for gate in gates.values()):
            state = state | {key: own[key] for key in gate_keys}
    elif not any(key in state for key in biases):
        state = state | {key: torch.zeros_like(own[key]) for key in biases}
    _check(state, own, label, gate_keys)
    check_values(state, own, label)
    if anew:
        what = "no classifier" if headless else "a different number of classes"
        _LOG.warning("%s has %s: %s are newly initialized", label, what, ", ".join(anew))
    return state | extra


def _without_extra(state: dict[str, Any], extra: dict[str, Any], label: str) -> dict[str, Tensor]:
    unknown = [key for key in state if is_extra_state(key) and key not in extra]
    if unknown:
        _LOG.warning("%s: ignored extra states of unknown modules: %s", label, grouped(unknown))
    return {key: value for key, value in state.items() if not is_extra_state(key)}


def check_values(state: dict[str, Tensor], own: dict[str, Tensor], label: object) -> None:
    """Reject values that the network's dtypes cannot represent, or that are not finite.

    Args:
        state: weights with the keys and shapes of ``own``.
        own: the tensors of the network; on the ``meta`` device, only their dtype matters.
        label: the name of the file in messages.

    Raises:
        InputError: integers, booleans, complex numbers, or 8-bit floats for a floating-point weight; fractions for an
            integer; NaN or infinity. The message names the weight.
    """
    for key, value in state.items():
        if value is own[key]:
            continue
        if not _holds(own[key].dtype, value):
            there, here = (str(each.dtype).removeprefix("torch.") for each in (value, own[key]))
            raise InputError(f"{label}: {key!r} is {there} in the file and {here} in this network; save it as {here}")
        wrong = _not_finite(value.to(own[key].dtype))  # the conversion may overflow to infinity
        if wrong and (own[key].is_meta or not _not_finite(own[key])):  # some buffers, like masks, start infinite
            raise InputError(
                f"{label}: {key!r} has {wrong:,} of {value.numel():,} values that are NaN or infinity; the file is "
                "damaged or its training diverged, use an earlier one"
            )


def _holds(kind: torch.dtype, value: Tensor) -> bool:
    """Whether the dtype ``kind`` can represent the values, up to rounding."""
    if value.dtype == kind:
        return True
    if kind.is_complex:
        return value.is_complex() or value.dtype in _FLOATS
    if kind.is_floating_point:
        return value.dtype in _FLOATS
    if kind == torch.bool or value.dtype == torch.bool or value.is_complex():
        return False
    # integer counters: some tools cast a whole file to half precision
    return not value.is_floating_point() or bool((value == value.round()).all())


def _not_finite(value: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not (value.is_floating_point() or value.is_complex()) or value.dtype.itemsize == 1:
        return 0
    return int(value.numel() - value.isfinite().sum())


def _head_name(model: nn.Module) -> str:
    """The name of the classifier; in networks of other libraries, the last linear layer."""
    if isinstance(model, ConvNet):
        return model.head_name
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else ConvNet.head_name


def _check(state: dict[str, Tensor], own: dict[str, Tensor], label: str, gate_keys: list[str]) -> None:
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of a different shape": shapes,
    }
    found = [f"{len(keys)} {what} ({grouped(keys)})" for what, keys in problems.items() if keys]
    if not found:
        return
    hint = ""
    if shapes:
        key = shapes[0]
        hint = f"; {key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in this network"
    elif not problems["unexpected"] and set(problems["missing"]) == set(gate_keys):
        hint = "; these are weights of the plain network: se=SEConfig(identity_init=True) starts from its output"
    raise InputError(f"{label}: does not fit this network: {'; '.join(found)}{hint}")


def grouped(keys: Iterable[str]) -> str:
    """The keys in a few groups by common prefix, with counts: ``layer1.0.se 4, layer1.1.se 4``."""
    words = [key.split(".") for key in keys]
    depth = max(map(len, words))
    groups: Counter[str] = Counter()
    while depth and (not groups or len(groups) > _GROUPS):
        groups = Counter(".".join(word[:depth]) for word in words)
        depth -= 1
    shown = [(" ".join(name.split()), count) for name, count in list(groups.items())[:_GROUPS]]
    named = [name if count == 1 else f"{name} {count}" for name, count in shown]
    rest = sum(list(groups.values())[_GROUPS:])
    return ", ".join(named) + (f", and {rest} more" if rest else "")


def gate_configs(model: nn.Module) -> dict[str, SEConfig]:
    """The configuration of each of our gates by name, including attached ones."""
    return {name: module.config for name, module in model.named_modules() if isinstance(module, SqueezeExcite)}


def check_gates(file: Mapping[str, SEConfig], model: nn.Module, label: str) -> None:
    """Reject gate weights that have the same shapes as those of ``model`` but compute a different function.

    Args:
        file: the gates of the file's network; empty if it has none.
        model: the network.
        label: the name of the file in messages.

    Raises:
        InputError: the gates differ; the message names the arguments of ``SEConfig``.
    """
    for gate, own in gate_configs(model).items():
        theirs = file.get(gate, own)
        different = [name for name in _SAME_SHAPES if getattr(theirs, name) != getattr(own, name)]
        if different:
            there, here = (", ".join(f"{n}={getattr(se, n)!r}" for n in different) for se in (theirs, own))
            raise InputError(
                f"{label}: its gates have {there}, but those of this network have {here}; pass se=SEConfig({there})"
            )


@dataclasses.dataclass(frozen=True)
class Structure:
    """What distinguishes ResNets whose weights have the same names and shapes; None if unknown or not applicable."""

    ceil_pool: bool | None = None
    stride_in_1x1: bool | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Structure":
        """The structure of a network."""
        return cls(**model.structure()) if isinstance(model, ConvNet) else cls()

    @classmethod
    def of_layout(cls, layout: Layout) -> "Structure":
        """The structure of the networks that weights in this layout were trained in."""
        return cls(layout.caffe_pool, layout.stride_in_1x1)

    def check(self, model: nn.Module, label: str) -> None:
        """Reject weights of this structure for a ``model`` of a different one, which computes a different function.

        Raises:
            InputError: they differ; the message names the arguments of ``create_model`` that match.
        """
        own = dataclasses.asdict(Structure.of(model))
        wanted = [
            f"{name}={value}"
            for name, value in dataclasses.asdict(self).items()
            if value is not None and own[name] is not None and own[name] != value
        ]
        if wanted:
            message = f"{label}: was trained in a different network; create this one with {', '.join(wanted)}"
            raise InputError(message)
