"""Layouts: how other libraries name the weights of these networks. Each has a key map, and conversions if needed.

A key map is a list of rows ``theirs → ours``. ``{s}`` and ``{b}`` stand for numbers, ``{m}`` for one word,
``{module}`` and ``{rest}`` for anything. A key without a row keeps its name. A layout is recognized by one of its keys,
never by the file name.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from senet.errors import InputError

State = dict[str, Tensor]
Rows = tuple[tuple[str, str], ...]

_HOLES = {"s": r"\d{1,4}", "b": r"\d{1,4}", "m": r"[^./_]+", "module": r".+", "rest": r".+"}


@dataclass(frozen=True)
class Layout:
    """The naming scheme of one origin.

    Attributes:
        name: the origin.
        mark: a regular expression for a key that neither the layouts after this one nor ours have.
        rows: the key map.
        blobs: a key map that is applied first and names numbered tensors.
        count_from: added to every number in a key: −1 if they count from 1, since we count from 0.
        dropped: prefix of keys that our network has no counterpart for.
        change: conversion of the renamed tensors.
        changes: description of ``dropped`` and ``change``, quoted in docs/weights.md.
        caffe_pool: whether the stem pools as in Caffe (no padding, sizes rounded up); None if unknown or no stem.
        stride_in_1x1: whether bottlenecks without groups have their stride in the first 1×1; None if unknown.
    """

    name: str
    mark: str
    rows: Rows = ()
    blobs: Rows = ()
    count_from: int = 0
    dropped: str | None = None
    change: Callable[[State], State] | None = None
    changes: str = "none"
    caffe_pool: bool | None = None
    stride_in_1x1: bool | None = None

    def key(self, key: str) -> str:
        """Our name for their key."""
        return self._renamed(self._renamed(key, self.blobs), self.rows)

    def _renamed(self, key: str, rows: Rows) -> str:
        for pattern, target in _compiled(rows):
            if match := pattern.fullmatch(key):
                words = match.groupdict()
                numbers = {name: int(word) + self.count_from for name, word in words.items() if name in ("s", "b")}
                return target.format(**words | numbers)
        return key

    def convert(self, state: State) -> State:
        """Their weights under our names. Raises ``InputError`` if two of their keys map to one of ours."""
        ours: State = {}
        for key, value in state.items():
            if self.dropped is not None and key.startswith(self.dropped):
                continue
            name = self.key(key)
            if name in ours:
                raise InputError(f"two weights of this file map to {name!r}, one of them is {key!r}")
            ours[name] = value
        return ours if self.change is None else self.change(ours)


@functools.cache
def _compiled(rows: Rows) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for theirs, ours in rows:
        words = re.split(r"\{(\w+)\}", theirs)  # alternates between literal text and placeholders
        parts = [f"(?P<{word}>{_HOLES[word]})" if i % 2 else re.escape(word) for i, word in enumerate(words)]
        compiled.append((re.compile("".join(parts)), ours))
    return compiled


def _bottlenecks_only(state: State) -> State:
    """Reject timm's ``legacy_seresnet18`` and ``34``: their basic blocks have a ReLU before the gate."""
    if "layer1.0.conv2.weight" in state and "layer1.0.conv3.weight" not in state:
        raise InputError("its basic blocks have a ReLU before the gate, which no network here has")
    return state


def _fully_connected(state: State) -> State:
    """Convert the matrices of the gates' FCs to 1×1 convolutions."""
    gate = re.compile(r".+\.se\.fc[12]\.weight")
    return {key: v[:, :, None, None] if gate.fullmatch(key) and v.ndim == 2 else v for key, v in state.items()}


def _timm_vgg(state: State) -> State:
    """Convert timm's hidden layers, which are convolutions over the 7 × 7 feature map, to matrices."""
    return {key: v.flatten(1) if key.startswith("classifier.") and v.ndim == 4 else v for key, v in state.items()}


def _rgb(state: State) -> State:
    """Convert the first convolution from BGR to RGB."""
    for key in ("conv1.weight", "conv1.0.weight", "conv1.conv.weight"):
        if key in state and state[key].ndim == 4:
            state = state | {key: state[key].flip(1)}
    return state


def _folded_biases(state: State) -> State:
    """Fold biases of convolutions into the mean of the norm that follows: (w·x + b) − m = w·x − (m − b)."""
    folded = dict(state)
    for key in state:
        module, _, leaf = key.rpartition(".conv.")
        mean = f"{module}.bn.running_mean"
        if leaf == "bias" and mean in state and state[mean].shape == state[key].shape:
            folded[mean] = state[mean] - folded.pop(key)
    return folded


def _caffe(state: State) -> State:
    """Divide Caffe's batch norm statistics, which are weighted sums, by the sum of the weights."""
    ours = dict(state)
    for key, count in state.items():
        norm, _, leaf = key.rpartition(".")
        if leaf == "count" and count.numel() == 1:
            del ours[key]
            for name in (f"{norm}.running_mean", f"{norm}.running_var"):
                if name in state:
                    ours[name] = state[name] / count if count.item() else torch.zeros_like(state[name])
    return _rgb(ours)


def _unit(theirs: str, conv: str, norm: str, their_norm: str = "/bn") -> Rows:
    """The rows for a convolution and its norm."""
    return ((f"{theirs}.{{rest}}", f"{conv}.{{rest}}"), (f"{theirs}{their_norm}.{{rest}}", f"{norm}.{{rest}}"))


# Caffe numbers the blobs of a layer, and uses two layers for a norm.
CAFFE_BLOBS: Rows = (
    ("{module}/bn/scale.0", "{module}/bn.weight"),
    ("{module}/bn/scale.1", "{module}/bn.bias"),
    ("{module}/bn.0", "{module}/bn.running_mean"),
    ("{module}/bn.1", "{module}/bn.running_var"),
    ("{module}/bn.2", "{module}/bn.count"),
    ("{module}.0", "{module}.weight"),
    ("{module}.1", "{module}.bias"),
)
_CADENE: Rows = (("{module}.se_module.{rest}", "{module}.se.{rest}"), ("last_linear.{rest}", "fc.{rest}"))
_DEEP_STEM: Rows = (
    *((f"layer0.conv{n}.{{rest}}", f"conv1.{3 * n - 3}.{{rest}}") for n in (1, 2, 3)),
    *((f"layer0.bn{n}.{{rest}}", f"conv1.{3 * n - 2}.{{rest}}") for n in (1, 2)),
    ("layer0.bn3.{rest}", "bn1.{rest}"),
)
# The convolutions of a BN-Inception module: in Caffe, in Cadene's code, ours.
_UNITS = (
    ("1x1", "1x1", "branch1x1"),
    ("3x3_reduce", "3x3_reduce", "branch3x3_1"),
    ("3x3", "3x3", "branch3x3_2"),
    ("double3x3_reduce", "double_3x3_reduce", "branch3x3dbl_1"),
    ("double3x3a", "double_3x3_1", "branch3x3dbl_2"),
    ("double3x3b", "double_3x3_2", "branch3x3dbl_3"),
    ("pool_proj", "pool_proj", "branch_pool"),
)
_STEM = (("conv1/7x7_s2", "conv1"), ("conv2/3x3_reduce", "conv2_reduce"), ("conv2/3x3", "conv2"))
_INCEPTION = (*_STEM, *((f"inception_{{m}}/{caffe}", f"inception_{{m}}.{ours}") for caffe, _, ours in _UNITS))
_CADENE_INCEPTION = (
    *((theirs.replace("/", "_"), ours) for theirs, ours in _STEM),
    *((f"inception_{{m}}_{cadene}", f"inception_{{m}}.{ours}") for _, cadene, ours in _UNITS),
)

_CAFFE_CHANGES = "Caffe's BatchNorm statistics are divided by their factor; the first convolution goes from BGR to RGB"

OWN = Layout("senet, timm, torchvision", mark="")
# Weights known by their source to be timm's or torchvision's own, which the keys cannot show.
PUBLISHED = replace(OWN, caffe_pool=False, stride_in_1x1=False)
LAYOUTS = (
    Layout(
        "timm `legacy_*` and Cadene, SENet-154",
        mark=r"layer0\.conv3\.weight",
        rows=_DEEP_STEM + _CADENE,
        caffe_pool=True,
    ),
    Layout(
        "timm `legacy_*` and Cadene, SE-ResNet and SE-ResNeXt",
        mark=r"layer0\.conv1\.weight",
        rows=(("layer0.{rest}", "{rest}"), *_CADENE),
        change=_bottlenecks_only,
        changes="timm's `legacy_seresnet18` and `34` are rejected: they have a ReLU before the gate",
        caffe_pool=True,
        stride_in_1x1=True,
    ),
    Layout(
        "moskomule/senet.pytorch",
        mark=r".+\.se\.fc\.0\.weight",
        rows=(
            ("{module}.se.fc.0.{rest}", "{module}.se.fc1.{rest}"),
            ("{module}.se.fc.2.{rest}", "{module}.se.fc2.{rest}"),
        ),
        change=_fully_connected,
        changes="the gates' matrices become 1×1 convolutions; their missing biases are set to 0",
        caffe_pool=False,
        stride_in_1x1=False,
    ),
    Layout(
        "torchvision, Inception-v3",
        mark=r"AuxLogits\.fc\.weight",
        dropped="AuxLogits.",
        changes="the auxiliary classifier `AuxLogits` is dropped",
    ),
    Layout(
        "timm, VGG",
        mark=r"pre_logits\.fc1\.weight",
        rows=(
            ("pre_logits.fc1.{rest}", "classifier.0.{rest}"),
            ("pre_logits.fc2.{rest}", "classifier.3.{rest}"),
            ("head.fc.{rest}", "classifier.6.{rest}"),
        ),
        change=_timm_vgg,
        changes="the hidden layers, which are convolutions in timm, become matrices",
    ),
    Layout(
        "Cadene, BN-Inception",
        mark=r"inception_3a_1x1\.weight",
        rows=(
            *(r for theirs, ours in _CADENE_INCEPTION for r in _unit(theirs, f"{ours}.conv", f"{ours}.bn", "_bn")),
            _CADENE[1],
        ),
        change=lambda state: _rgb(_folded_biases(state)),
        changes="the convolutions' biases are folded into the norms' means; the first convolution goes from BGR to RGB",
    ),
    Layout(
        "the authors' Caffe, SE-BN-Inception",
        mark=r"inception_3a/1x1\.0",
        blobs=CAFFE_BLOBS,
        rows=(
            *(row for theirs, ours in _INCEPTION for row in _unit(theirs, f"{ours}.conv", f"{ours}.bn")),
            ("inception_{m}_1x1_down.{rest}", "inception_{m}.se.fc1.{rest}"),
            ("inception_{m}_1x1_up.{rest}", "inception_{m}.se.fc2.{rest}"),
            ("classifier.{rest}", "fc.{rest}"),
        ),
        change=_caffe,
        changes=_CAFFE_CHANGES,
    ),
    Layout(
        "the authors' Caffe, SE-ResNet, SE-ResNeXt and SENet-154",
        mark=r"conv2_1_1x1_reduce\.0",
        blobs=CAFFE_BLOBS,
        rows=(
            *_unit("conv1/7x7_s2", "conv1", "bn1"),
            *_unit("conv1_1/3x3_s2", "conv1.0", "conv1.1"),
            *_unit("conv1_2/3x3", "conv1.3", "conv1.4"),
            *_unit("conv1_3/3x3", "conv1.6", "bn1"),
            *_unit("conv{s}_{b}_1x1_reduce", "layer{s}.{b}.conv1", "layer{s}.{b}.bn1"),
            *_unit("conv{s}_{b}_3x3", "layer{s}.{b}.conv2", "layer{s}.{b}.bn2"),
            *_unit("conv{s}_{b}_1x1_increase", "layer{s}.{b}.conv3", "layer{s}.{b}.bn3"),
            *_unit("conv{s}_{b}_1x1_proj", "layer{s}.{b}.downsample.0", "layer{s}.{b}.downsample.1"),
            ("conv{s}_{b}_1x1_down.{rest}", "layer{s}.{b}.se.fc1.{rest}"),
            ("conv{s}_{b}_1x1_up.{rest}", "layer{s}.{b}.se.fc2.{rest}"),
            ("classifier.{rest}", "fc.{rest}"),
        ),
        count_from=-1,
        change=_caffe,
        changes=_CAFFE_CHANGES,
        caffe_pool=True,
        stride_in_1x1=True,
    ),
)


def recognize(state: State) -> Layout:
    """The layout of a file, from its keys alone; ``OWN`` if no other layout matches."""
    for layout in LAYOUTS:
        mark = re.compile(layout.mark)
        if any(mark.fullmatch(key) for key in state):
            return layout
    return OWN
