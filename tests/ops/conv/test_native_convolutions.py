"""The convolutions of inference in C++, against PyTorch's in float64."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from senet.ops.conv.native import OwnConv2d, PackedConv2d, PackedLinear
from senet.ops.csrc import build, calls
from senet.ops.reference import FullyConnected

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
# (Asked only where there is a library to ask.)
USED = build.compiler() is not None and calls.constant("panel") >= 16
is_used = pytest.mark.skipif(not USED, reason="narrow vectors: all convolutions are oneDNN's")
UNBOUNDED = (-math.inf, math.inf)
# 3×3 of stride 1 without dilation is Winograd's.
GEOMETRIES = [(1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 1), (3, 1, 0, 1), (3, 1, 2, 1), (3, 2, 1, 1), (3, 1, 2, 2)]


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(seed, *shape):
    return draw(seed, *shape).contiguous(memory_format=torch.channels_last)


def made(c, out, kernel, stride, padding, dilation, bounds=UNBOUNDED):
    weight, bias = draw(1, out, c, kernel, kernel) / (c * kernel**2) ** 0.5, draw(2, out)
    return OwnConv2d(weight, bias, stride, padding, dilation, *bounds), weight, bias


def excited(c, out, biased=True):
    """An excitation from the mean of c channels to the gate of others, as ``early_gate.move_before`` makes them."""
    hidden = 5
    b1, b2 = (draw(7, hidden), draw(8, out)) if biased else (None, None)
    return FullyConnected(draw(6, hidden, c), b1, draw(9, out, hidden), b2, "sigmoid")


def gate_from(x, e):
    wide = (None if t is None else t.double() for t in (e.w1, e.b1, e.w2, e.b2))
    return FullyConnected(*wide, e.gate, e.activation)(x.double().mean((2, 3)))


def right(x, weight, bias, stride, padding, dilation, bounds, gate=None, shortcut=None, relu=False):
    u = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation)
    u = u if gate is None else u * gate.double()[:, :, None, None]
    u = u if shortcut is None else u + shortcut.double()
    return u.clamp(0 if relu else bounds[0], bounds[1])


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    # A direct float32 convolution of PyTorch's is as far off: rounding alone.
    assert (got - expected).abs().max() <= 4e-6 * max(1, expected.abs().max())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("c", "out"), [(16, 32), (48, 16), (32, 80), (64, 112)])
@pytest.mark.parametrize("what", ["bare", "relu", "relu6", "gate", "gate + shortcut + relu", "in place"])
def test_each_geometry_with_what_follows(geometry, c, out, what):
    bounds = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}.get(what, UNBOUNDED)
    conv, weight, bias = made(c, out, *geometry, bounds)
    x = maps(3, 2, c, 9, 12)
    size = F.conv2d(x, weight, None, *geometry[1:]).shape
    gate = None
    if what.startswith("gate") and geometry == (1, 1, 0, 1):
        conv.take_gate(excited(c, out, biased=what == "gate"))
        gate = gate_from(x, conv.excitation)
    shortcut = maps(5, *size) if what in ("gate + shortcut + relu", "in place") else None
    relu = shortcut is not None
    expected = right(x, weight, bias, *geometry[1:], bounds, gate, shortcut, relu)
    into = shortcut if what == "in place" else None
    before = None if shortcut is None or into is not None else shortcut.clone()
    got = conv(x, shortcut, relu, into=into, gated=gate is not None)
    assert_close(got, expected)
    assert (got is into) == (into is not None)
    assert before is None or torch.equal(shortcut, before)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(GEOMETRIES), st.integers(1, 3), st.integers(1, 19), st.integers(1, 19), st.integers(1, 5),
    st.integers(1, 70), st.integers(1, 5),
)  # fmt: skip
def test_any_shape_with_any_number_of_threads(geometry, n, h, w, chunks, out, threads):
    if geometry[0] == 3 and geometry[3] == 1 and geometry[1] == 1:
        out = 16 * (out // 16 + 1)
    conv, weight, bias = made(16 * chunks, out, *geometry)
    x = maps(3, n, 16 * chunks, h, w)
    if not conv.takes(x, alone=False):
        with pytest.raises(RuntimeError):  # a window that finds no place: PyTorch refuses as well
            F.conv2d(x, weight, bias, *geometry[1:])
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = conv(x)
        torch.set_num_threads(threads)
        several = conv(x)
    finally:
        torch.set_num_threads(before)
    assert_close(one, right(x, weight, bias, *geometry[1:], UNBOUNDED))
    assert torch.equal(one, several)


def test_winograd_rounds_no_worse_than_the_direct_form():
    x, weight = maps(1, 2, 128, 28, 28).relu(), draw(2, 128, 128, 3, 3) / 34
    want = F.conv2d(x.double(), weight.double(), padding=1)
    got = OwnConv2d(weight, torch.zeros(128), 1, 1, 1, *UNBOUNDED)(x)
    error = (got - want).norm() / want.norm()
    assert error <= 1.2 * (F.conv2d(x, weight, padding=1) - want).norm() / want.norm()
    assert 0 < error < 1e-6


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nan_comes_through_and_stays_where_the_kernel_reaches(geometry):
    conv, weight, bias = made(16, 32, *geometry, (0.0, 6.0))
    x = maps(3, 2, 16, 9, 9)
    x[0, 3, 4, 4] = torch.nan
    expected = F.conv2d(x, weight, bias, *geometry[1:]).clamp(0, 6)
    got = conv(x)
    assert got.isnan()[expected.isnan()].all()
    assert not got[1].isnan().any()
    outside = got.isnan() & ~expected.isnan()
    if not conv.winograd:
        assert not outside.any()
    where = outside.nonzero()[:, 2:] + conv.geometry[0] // 2 - conv.geometry[2]  # in positions of the input
    assert (where - 4).abs().max() <= 2 if len(where) else True  # a tile of Winograd's reads one position more


def test_no_images():
    for geometry in ((1, 1, 0, 1), (3, 1, 1, 1)):
        conv, *_ = made(16, 32, *geometry)
        assert conv(maps(1, 0, 16, 5, 5)).shape == (0, 32, 5, 5)


@pytest.mark.parametrize("geometry", [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1)])
def test_weights_larger_than_the_map_are_shared_out(geometry):
    """A large network's last stage at batch 1: all threads work on the same few positions."""
    conv, weight, bias = made(64, 512, *geometry)
    x = maps(3, 1, 64, 7, 7)
    shortcut = maps(4, 1, 512, *F.conv2d(x, weight, None, *geometry[1:]).shape[2:])
    gate, gated = None, geometry == (1, 1, 0, 1)
    if gated:
        conv.take_gate(excited(64, 512))
        gate = gate_from(x, conv.excitation)
    got = conv(x, shortcut, True, into=shortcut.clone(memory_format=torch.channels_last), gated=gated)
    assert_close(got, right(x, weight, bias, *geometry[1:], UNBOUNDED, gate, shortcut, True))


def packed(out, c, kernel, stride, padding, activation="none", bounds=(), groups=1, dilation=1, dtype=torch.float32):
    weight = draw(1, out, c // groups, kernel, kernel) / (c * kernel**2) ** 0.5
    pairs = [[stride] * 2, [padding] * 2, [dilation] * 2]
    return PackedConv2d(weight.to(dtype), draw(2, out).to(dtype), *pairs, groups, activation, list(bounds))


@is_used
def test_who_computes_which_convolution():
    ours = [packed(64, 64, 1, 1, 0), packed(64, 64, 1, 2, 0), packed(64, 64, 3, 1, 1, "relu"), packed(64, 64, 3, 2, 1)]
    ours += [packed(48, 64, 3, 1, 1, "hardtanh", (0.0, 6.0)), packed(1000, 512, 1, 1, 0)]
    theirs = [packed(64, 3, 7, 2, 3), packed(64, 40, 1, 1, 0), packed(64, 64, 3, 1, 1, groups=2)]
    theirs += [packed(64, 64, 1, 1, 0, "swish"), packed(64, 64, 5, 1, 2), packed(8, 64, 1, 1, 0)]
    theirs += [packed(64, 64, 3, 1, 1, dtype=torch.bfloat16)]
    assert all(conv.own is not None for conv in ours)
    assert all(conv.own is None for conv in theirs)


@is_used
def test_large_maps_and_other_layouts_are_left_to_onednn():
    conv = packed(64, 32, 1, 1, 0)
    assert conv.own.takes(maps(1, 2, 32, 64, 64), alone=True)
    assert not conv.own.takes(maps(1, 3, 32, 64, 64), alone=True)
    assert conv.own.takes(maps(1, 3, 32, 64, 64), alone=False)
    assert packed(64, 32, 3, 1, 1).own.takes(maps(1, 3, 32, 64, 64), alone=True)
    assert packed(64, 32, 3, 2, 1).own.takes(maps(1, 3, 32, 32, 32), alone=True)
    assert not packed(64, 32, 3, 2, 1).own.takes(maps(1, 4, 32, 32, 32), alone=True)
    assert not conv.own.takes(draw(1, 1, 32, 8, 8), alone=False)
    assert not conv.own.takes(maps(1, 1, 16, 8, 8), alone=False)
    assert not conv.own.takes(maps(1, 1, 32, 8, 8).double(), alone=False)
    for x in (draw(1, 1, 32, 8, 8), maps(1, 3, 32, 64, 64)):
        want = F.conv2d(x.double(), conv.weight.double(), conv.bias.double())
        assert (conv(x) - want).abs().max() < 1e-5


@pytest.mark.parametrize("size", [8, 96])  # the larger maps are oneDNN's where nothing is taken in
def test_sums_and_gates_whoever_computes_them(size):
    conv = packed(64, 32, 1, 1, 0)
    x, shortcut = maps(1, 1, 32, size, size), maps(2, 1, 64, size, size)
    conv.take_gate(excited(32, 64))
    gate = gate_from(x, conv.excitation)
    sides = ([1, 1], [0, 0], [1, 1])
    expected = right(x, conv.weight, conv.bias, *sides, UNBOUNDED, None, shortcut, True)
    own = shortcut.clone(memory_format=torch.channels_last)
    assert conv.add_to(own, x, True) is own
    assert_close(own, expected)
    expected = right(x, conv.weight, conv.bias, *sides, UNBOUNDED, gate, shortcut, True)
    assert_close(conv.gated(x, shortcut, True, overwrites=False), expected)
    assert_close(conv.gated(x, shortcut.contiguous(), True, overwrites=True), expected)
    own = shortcut.clone(memory_format=torch.channels_last)
    got = conv.gated(x, own, True, overwrites=True)
    assert_close(got, expected)


@pytest.mark.parametrize("rows", [0, 1, 8, 64, 65])
@pytest.mark.parametrize(("c", "out"), [(512, 1000), (64, 10), (30, 64)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fcs(rows, c, out, with_bias):
    weight, bias = draw(1, out, c) / c**0.5, draw(2, out) if with_bias else None
    fc, x = PackedLinear(weight, bias), draw(3, rows, c)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = fc(x)
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert rows == 0 or (got - expected).abs().max() < 1e-5
    three = fc(x[None])
    assert three.shape == (1, *expected.shape)


@pytest.mark.parametrize("options", [("-mavx2", "-mfma"), ("-msse2", "-mno-avx")])
def test_narrower_vectors_compute_the_same(options, tmp_path):
    """What a processor without AVX-512 runs, in a process of its own."""
    if not (Path("/proc/cpuinfo").exists() and " avx2 " in Path("/proc/cpuinfo").read_text()):
        pytest.skip("no AVX2")
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from senet.ops.csrc import build
build._TARGETS = ({options!r},)
import test_native_convolutions as t
assert t.calls.constant("panel") == {16 if "-mavx2" in options else 8}
for geometry in t.GEOMETRIES:
    for c, out in ((16, 32), (32, 80), (64, 512)):
        for what in ("relu6", "gate + shortcut + relu", "in place"):
            t.test_each_geometry_with_what_follows(geometry, c, out, what)
"""
    environment = {**os.environ, "SENET_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
