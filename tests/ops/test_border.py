"""What C++ is handed: tensors of other devices, kinds and sizes get PyTorch's own operations, and their errors."""

import ctypes

import pytest
import torch
from torch import nn

import senet
from helpers.tails import tail
from senet import SEConfig, SqueezeExcite
from senet.ops import reference
from senet.ops.border import UnsuitedMapError, addresses
from senet.ops.conv import early_gate
from senet.ops.conv.native import PackedConv2d
from senet.ops.conv.native_gate import gate_of
from senet.ops.tail import inductor as compiler
from senet.ops.tail import native
from senet.ops.tail.tail import norm_tail

C = 16
needs_native = pytest.mark.skipif(early_gate.why_not("native", torch.zeros(1)) is not None, reason="no C++ compiler")
needs_compiler = pytest.mark.skipif(compiler.why_not() is not None, reason="torch.compile cannot run here")


class Kind(torch.Tensor):
    """A tensor of another kind, whose memory is not what a kernel expects."""


@pytest.fixture
def x():
    return torch.randn(4, C, 32, 32, generator=torch.Generator().manual_seed(0))


class Parts:
    def __init__(self, training):
        self.norm, self.other, self.se = nn.BatchNorm2d(C), nn.BatchNorm2d(C), SqueezeExcite(C, SEConfig(reduction=2))
        for each in (self.norm, self.other):
            each.train(training)

    def run(self, x, shortcut, norms=(True, False)):
        return tail(x, self.norm, self.se, shortcut, self.other if norms[1] else None)


def _move(module, name, to):
    held = module._parameters if name in module._parameters else module._buffers
    moved = held[name].detach().to(to)
    held[name] = nn.Parameter(moved) if held is module._parameters else moved


MOVES = {
    "norm": lambda parts: parts.norm.to("meta"),
    "norm's weight": lambda parts: _move(parts.norm, "weight", "meta"),
    "norm's bias": lambda parts: _move(parts.norm, "bias", "meta"),
    "running mean": lambda parts: _move(parts.norm, "running_mean", "meta"),
    "running variance": lambda parts: _move(parts.norm, "running_var", "meta"),
    "gate": lambda parts: parts.se.to("meta"),
    "first FC": lambda parts: parts.se.fc1.to("meta"),
    "second FC's bias": lambda parts: _move(parts.se.fc2, "bias", "meta"),
    "shortcut's norm": lambda parts: parts.other.to("meta"),
}


def backends():
    return [
        pytest.param("reference"),
        pytest.param("native", marks=needs_native),
        pytest.param(
            "compiled", marks=[pytest.mark.slow, pytest.mark.skipif(compiler.why_not() is not None, reason="")]
        ),
    ]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("what", [*MOVES, "shortcut"])
def test_a_tail_on_two_devices_gets_an_error(what, training, backend, x):
    parts, shortcut = Parts(training), x.clone()
    if what == "shortcut":
        shortcut = shortcut.to("meta")
    else:
        MOVES[what](parts)
    with senet.use_backend(backend):
        for layout in (torch.contiguous_format, torch.channels_last):
            u = x.contiguous(memory_format=layout)
            with pytest.raises(RuntimeError, match="device"):
                parts.run(u, shortcut, (True, what == "shortcut's norm"))


@needs_native
@pytest.mark.parametrize("part", ["norm", "gate"])
def test_tensors_of_another_kind_are_left_to_the_ordinary_operations(part, x):
    parts = Parts(True)
    expected = parts.run(x, x)
    if part == "norm":
        parts.norm.weight = nn.Parameter(parts.norm.weight.detach().as_subclass(Kind))
    else:
        parts.se.fc1.weight = nn.Parameter(parts.se.fc1.weight.detach().as_subclass(Kind))
    with senet.use_backend("native"):
        torch.testing.assert_close(parts.run(x, x).as_subclass(torch.Tensor), expected)


@needs_native
@pytest.mark.parametrize("channels", [1, 8, 32])
def test_a_norm_of_other_channels_is_not_read_past_its_end(channels, x):
    for training in (True, False):
        norm = nn.BatchNorm2d(channels).train(training)
        with pytest.raises(RuntimeError) as ordinary:
            norm(x)
        with senet.use_backend("native"), pytest.raises(RuntimeError) as ours:
            tail(x, norm, None, x)
        assert str(ours.value) == str(ordinary.value)


@needs_native
def test_a_map_without_a_batch_is_no_batch_of_rows():
    x, norm = torch.randn(C, C, C), nn.BatchNorm2d(C)  # as many rows as channels
    with senet.use_backend("native"), pytest.raises(ValueError, match="4D"):
        tail(x, norm, SqueezeExcite(C), x)


@needs_native
def test_a_shortcut_of_one_channel_is_broadcast(x):
    narrow = torch.randn(4, 1, 32, 32)
    got = norm_tail(x, nn.BatchNorm2d(C), None, narrow, True, "native")
    torch.testing.assert_close(got, torch.relu(nn.BatchNorm2d(C)(x) + narrow))


@needs_native
def test_tables_of_another_type_or_size_are_broadcast(x):
    m, a = torch.zeros(4, C), torch.rand(4, C)
    expected = torch.relu(x * a[:, :, None, None] + 1)
    one = torch.ones(4, C)
    for b in (one.double(), one[:, :1], one[:1]):
        torch.testing.assert_close(native.affine(x, m, a, b, None, True), expected)
    with pytest.raises(RuntimeError, match="device"):
        native.affine(x, m, a, one.to("meta"), None, True)


@needs_native
def test_pointers_are_those_of_the_cpu(x):
    null, here, number = addresses((None, x, 3))
    assert (null, number) == (0, 3)
    assert ctypes.c_float.from_address(here).value == float(x.flatten()[0])
    with pytest.raises(RuntimeError, match="device"):
        addresses((x, x.to("meta")))


@needs_native
@pytest.mark.parametrize("width", [16, 24], ids=["our own", "oneDNN's"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, 1:],
        lambda x: x[0],
        lambda x: x[:, :, :2],
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x.to("meta"),
        lambda x: x[..., None],
    ],
    ids=["channels", "one image", "smaller than the kernel", "half", "double", "meta", "clip"],
)
def test_a_convolution_refuses_what_it_was_not_made_for(change, width):
    conv = nn.Conv2d(width, 32, 3)
    packed = PackedConv2d(conv.weight.detach(), conv.bias.detach(), [1, 1], [0, 0], [1, 1], 1, "none", [])
    x = torch.randn(2, width, 9, 9).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(packed(x), conv(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsuitedMapError):
        packed(change(x))


@needs_native
def test_an_early_gate_refuses_what_it_was_not_made_for(x):
    excitation = early_gate.as_tables(SqueezeExcite(C).fully_connected(), torch.float32)
    torch.testing.assert_close(gate_of(x, excitation), excitation(reference.squeeze(x)))
    for other in (x[:, 1:], x.to("meta"), x[0, 0]):
        with pytest.raises(UnsuitedMapError):
            gate_of(other, excitation)
