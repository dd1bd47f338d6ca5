"""The Triton kernels against the formulas in float64: in Triton's interpreter on a CPU, and on a device with `-m gpu`.

The interpreter has to be chosen before Triton is imported, and torch.compile (other tests) imports it; so one test
here runs this file again in a process of its own with TRITON_INTERPRET=1. The rest of the checks exist only there, and,
marked `gpu`, on a device.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from senet.ops.tail.definitions import pivot

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=[pytest.mark.gpu, NO_DEVICE])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (N, C, *S): odd everything; a tile of channels not filled; S in several parts; one pixel; one image; 1-D and 3-D.
SHAPES = [(2, 5, 7, 7), (1, 72, 9, 9), (3, 3, 1, 1), (1, 4, 33, 32), (2, 3, 70), (1, 7, 2, 3, 5)]
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test would start")
def test_all_of_this_file_passes_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "--maxfail=9"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stdout:
        pytest.skip("the interpreter of this Triton has no loops with this NumPy (3.6 with 2.4: int() of an array)")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def kernels():
    from senet.ops.tail import triton as triton_kernels

    return triton_kernels


@pytest.fixture
def gemm():
    from senet.ops.conv import triton as triton_gemm

    return triton_gemm


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """New memory is NaN, and stays so on both sides of every tensor: nothing unwritten, nothing outside."""
    empty, empty_like, margins = torch.empty, torch.empty_like, []

    def guarded(like):
        if not like.is_floating_point() or not like.numel():
            return like
        whole = empty(like.numel() + 128, dtype=like.dtype, device=like.device).fill_(torch.nan)
        margins.extend((whole[:64], whole[-64:]))
        return whole.as_strided(like.shape, like.stride(), 64)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: guarded(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: guarded(empty_like(*args, **kwargs)))
    yield
    assert all(margin.isnan().all() for margin in margins)


def a_map(shape, last=False, dtype=torch.float32, device="cpu", mean=1.0, std=2.0):
    x = (torch.randn(shape, device=device) * std + mean).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def a_table(x):
    return torch.randn(x.shape[:2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def wide(table, x):
    return table.double().reshape(*table.shape, *(1,) * (x.ndim - 2))


def over(x):
    return tuple(range(2, x.ndim))


def assert_table(got, want, terms):
    """To a few units in the last place of the largest number that was summed up (or averaged) to make an entry."""
    assert got.dtype == (torch.float64 if terms.dtype == torch.float64 else torch.float32)
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= 4 * torch.finfo(got.dtype).eps * terms.abs().max()


def assert_map(got, want, like):
    """In the type and layout of ``like``, computed in the type of tables and rounded once."""
    assert got.dtype == like.dtype
    assert got.shape == want.shape
    assert got.stride() == like.stride()
    # To nearest; the interpreter only cuts bfloat16 off.
    once = torch.finfo(got.dtype).eps / (1 if INTERPRETED and got.dtype == torch.bfloat16 else 2)
    unit = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    tiny = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    allowed = once * want.abs() * (1 + once) + 4 * unit * want.abs().max().clamp(min=1) + tiny
    assert ((got.double() - want).abs() <= allowed).all()


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_the_mean_and_the_biased_variance(kernels, device, shape, dtype, last):
    u = a_map(shape, last, dtype, device)
    mean, from_pivot, variance = kernels.moments(u)
    assert_table(mean, u.double().mean(over(u)), u)
    assert_table(from_pivot, (u.double() - wide(pivot(u).expand(mean.shape), u)).mean(over(u)), u)
    assert_table(variance, u.double().var(over(u), correction=0), (u - u.mean()).square())
    assert torch.equal(mean, kernels.mean(u))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("with_shortcut", "relu"), [(True, True), (False, False)])
def test_affine_is_its_formula(kernels, device, shape, dtype, last, with_shortcut, relu):
    u, shortcut = a_map(shape, last, dtype, device), a_map(shape, last, dtype, device)
    m, a, b = a_table(u), a_table(u), a_table(u)
    want = wide(a, u) * (u.double() - wide(m, u)) + wide(b, u) + with_shortcut * shortcut.double()
    got = kernels.affine(u, m, a, b, shortcut if with_shortcut else None, relu)
    assert_map(got, want.relu() if relu else want, u)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [True, False])
def test_affine_backward_is_its_formula(kernels, device, shape, dtype, last, relu):
    u, dout = a_map(shape, last, dtype, device), a_map(shape, last, dtype, device)
    out = a_map(shape, last, dtype, device).relu()
    m = a_table(u)
    g, da, db = kernels.affine_backward(dout, out if relu else None, u, m)
    want = dout.double() * (out > 0) if relu else dout.double()
    assert_map(g, want, u)
    terms = want * (u.double() - wide(m, u))
    sums = want[0, 0].numel() ** 0.5  # rounding errors of a sum add up like a random walk
    assert_table(da, terms.sum(over(u)), sums * terms.to(da.dtype))
    assert_table(db, want.sum(over(u)), sums * want.to(db.dtype))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_backward_is_the_gradient_of_the_moments_and_of_affine(kernels, device, shape, dtype, last):
    u, g = a_map(shape, last, dtype, device), a_map(shape, last, dtype, device)
    m, a, dm, dv = u.double().mean(over(u)).to(a_table(u).dtype), a_table(u), a_table(u), a_table(u)
    exact = u.double().requires_grad_()
    mean, variance = exact.mean(over(u)), exact.var(over(u), correction=0)
    loss = (wide(a, u) * exact * g.double()).sum() + (mean * dm.double()).sum() + (variance * dv.double()).sum()
    assert_map(kernels.moments_backward(g, u, m, a, dm, dv), torch.autograd.grad(loss, exact)[0], u)


@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 3, 49, 49), (1, 5, 7, 7)])
def test_data_far_from_zero_keep_five_digits_of_variance(kernels, device, shape, last):
    u = a_map(shape, last, device=device, mean=1e4, std=1.0)
    variance, mean = torch.var_mean(u.double(), over(u), correction=0)
    _, from_pivot, found = kernels.moments(u)
    torch.testing.assert_close(found.double(), variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(from_pivot.double(), mean - pivot(u).double(), rtol=1e-5, atol=1e-6)


@LAYOUTS
def test_a_first_pixel_unlike_the_others_costs_no_digits(kernels, device, last):
    u = a_map((1, 3, 40, 40), last, device=device, mean=1e4, std=1.0)
    u[:, :, 0, 0] = 0
    variance = u.double().var(over(u), correction=0)
    torch.testing.assert_close(kernels.moments(u)[2].double(), variance, rtol=1e-5, atol=0)


@LAYOUTS
def test_a_constant_map_has_no_variance(kernels, device, last):
    u = (
        a_map((1, 3, 40, 40), last, device=device, mean=1e4, std=0.0)
        * torch.tensor([1, 0.1, 3], device=device)[:, None, None]
    )
    mean, _, variance = kernels.moments(u)
    assert torch.equal(mean, u[:, :, 0, 0])
    assert not variance.any()


@LAYOUTS
def test_a_long_reduction_is_split_and_gives_the_same_bits_every_time(kernels, device, last):
    from senet.ops import triton_tiles as tiles

    u = a_map((1, 4, 33, 32), last, device=device)
    assert tiles._plan(*u.shape[:2], 33 * 32, last).split[2] > 1
    first, again = kernels.moments(u), kernels.moments(u)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[2], again[2])


def test_maps_that_are_few_are_split_and_maps_that_are_many_are_not(kernels):
    from senet.ops import triton_tiles as tiles

    assert tiles._plan(1, 64, 12544, True).split[2] > 100
    assert tiles._plan(1, 64, 12544, False).split[2] > 20
    assert tiles._plan(256, 2048, 49, True).split[2] == 1
    assert tiles._plan(256, 256, 3136, False).split[2] == 1


@LAYOUTS
def test_gradients_and_shortcuts_of_any_layout_are_taken(kernels, device, last):
    u = a_map((2, 5, 6, 7), last, device=device)
    m, ones = a_table(u), torch.ones(2, 5, device=device)
    expanded = torch.randn(2, 5, 1, 1, device=device).expand(u.shape)
    other = a_map(u.shape, not last, device=device)
    for dout in (expanded, other, torch.randn(4, 5, 6, 14, device=device)[::2, :, :, ::2]):
        g, _, db = kernels.affine_backward(dout, other, u, m)
        assert_map(g, dout.double() * (other > 0), u)
        assert_table(db, (dout.double() * (other > 0)).sum((2, 3)), 42 * dout)  # equal terms round alike
        assert_map(kernels.affine_backward(dout, None, u, m)[0], dout.double(), u)
        assert_map(kernels.affine(u, m, ones, m, dout, True), (u.double() + dout).relu(), u)
        assert_map(kernels.moments_backward(dout, u, m, ones, 0 * m, 0 * m), dout.double(), u)


def test_a_map_of_any_layout_is_taken(kernels, device):
    u = torch.randn(4, 5, 6, 14, device=device)[::2, :, :, ::2]
    one = torch.ones(2, 5, device=device)
    assert_table(kernels.moments(u)[0], u.double().mean((2, 3)), u)
    assert_map(kernels.affine(u, one, one, one, None, False), u.double(), u.contiguous())


@LAYOUTS
def test_no_images_give_empty_maps_and_tables(kernels, device, last):
    u = a_map((0, 5, 6, 7), last, device=device)
    table = torch.zeros(0, 5, device=device)
    assert [t.shape for t in kernels.moments(u)] == [(0, 5)] * 3
    assert kernels.affine(u, table, table, table, u, True).shape == u.shape
    assert [t.shape for t in kernels.affine_backward(u, u, u, table)] == [u.shape, (0, 5), (0, 5)]
    assert kernels.moments_backward(u, u, table, table, table, table).shape == u.shape


def test_relu_keeps_nan(kernels, device):
    u = torch.tensor([[[1.0, torch.nan, -1.0]]], device=device)
    one = torch.ones(1, 1, device=device)
    assert kernels.affine(u, 0 * one, one, 0 * one, None, True).isnan().tolist() == [[[False, True, False]]]


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_shortcut", [True, False])
def test_scale_add_relu_is_its_formula(kernels, device, dtype, last, with_shortcut):
    u, shortcut = (a_map((2, 5, 7, 3), last, dtype, device) for _ in range(2))
    gate = torch.rand(2, 5, device=device)
    want = (u.double() * wide(gate, u) + with_shortcut * shortcut.double()).relu()
    assert_map(kernels.scale_add_relu(u, gate, shortcut if with_shortcut else None, True), want, u)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter's product is wrong for bfloat16
@pytest.mark.parametrize("shape", [(3, 20, 5, 3), (1, 33, 7, 7), (5, 16, 1, 1), (2, 7, 9), (1, 5, 2, 3, 4)])
@pytest.mark.parametrize(("with_shortcut", "relu"), [(True, True), (False, False)])
def test_gated_pointwise_is_a_convolution_a_gate_a_sum_and_a_relu(
    gemm, device, shape, dtype, last, with_shortcut, relu
):
    h = a_map(shape, last, dtype, device)
    weight, bias = torch.randn(19, shape[1], device=device).to(dtype), torch.randn(19, device=device)
    gate, shortcut = torch.rand(shape[0], 19, device=device), a_map((shape[0], 19, *shape[2:]), last, dtype, device)
    product = torch.einsum("oc,nc...->no...", weight.double(), h.double())
    want = (
        wide(gate, h) * (product + bias.double().reshape(-1, *(1,) * (h.ndim - 2))) + with_shortcut * shortcut.double()
    )
    got = gemm.gated_pointwise(h, weight, bias, gate, shortcut if with_shortcut else None, relu)
    assert_map(got, want.relu() if relu else want, got)
    assert got.movedim(1, -1).is_contiguous()


def test_gated_pointwise_takes_no_images_and_refuses_float64(gemm, device):
    def run(n, dtype):
        h = torch.randn(n, 4, 3, 3, device=device, dtype=dtype)
        weight, bias, gate = (
            torch.ones(6, 4, device=device),
            torch.ones(6, device=device),
            torch.ones(n, 6, device=device),
        )
        return gemm.gated_pointwise(h, weight, bias, gate, None, True)

    assert run(0, torch.float32).shape == (0, 6, 3, 3)
    with pytest.raises(ValueError, match="float64"):
        run(1, torch.float64)


@pytest.mark.gpu
@NO_DEVICE
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(64, 256, 56, 56), (32, 1024, 14, 14), (256, 2048, 7, 7), (1, 64, 112, 112), (8, 72, 28, 28)]
)
def test_sweeps_of_a_network_on_a_device(kernels, shape, dtype, last):
    u, shortcut, dout = (a_map(shape, last, dtype, "cuda") for _ in range(3))
    mean, _, variance = kernels.moments(u)
    assert_table(mean, u.double().mean((2, 3)), u)
    assert_table(variance, u.double().var((2, 3), correction=0), (u - u.mean()).square())
    a, b, dm, dv = (a_table(u) for _ in range(4))
    out = kernels.affine(u, mean, a, b, shortcut, True)
    assert_map(out, (wide(a, u) * (u.double() - wide(mean, u)) + wide(b, u) + shortcut.double()).relu(), u)
    g, da, db = kernels.affine_backward(dout, out, u, mean)
    want = dout.double() * (out > 0)
    assert_map(g, want, u)
    terms = want * (u.double() - wide(mean, u))
    assert_table(da, terms.sum((2, 3)), shape[2] * terms.float())
    assert_table(db, want.sum((2, 3)), shape[2] * want.float())
    positions = shape[2] * shape[3]
    want = wide(a, u) * want + wide(dm, u) / positions + 2 * wide(dv, u) / positions * (u.double() - wide(mean, u))
    assert_map(kernels.moments_backward(g, u, mean, a, dm, dv), want, u)


@pytest.mark.gpu
@pytest.mark.slow
@NO_DEVICE
@LAYOUTS
def test_a_map_of_more_than_2_to_the_31_elements_on_a_device(kernels, last):
    shape = (44, 1024, 224, 224)
    u = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    u = u.to(memory_format=torch.channels_last) if last else u
    u[-1] = a_map((1, *shape[1:]), last, torch.bfloat16, "cuda")[0]
    tail = u[-1:]
    mean, _, variance = kernels.moments(u)
    assert_table(mean[-1:], tail.double().mean((2, 3)), tail)
    assert_table(variance[-1:], tail.double().var((2, 3), correction=0), (tail - tail.mean()).square())
    a, b = a_table(u), a_table(u)
    out = kernels.affine(u, mean, a, b, None, False)[-1:]
    assert_map(out, wide(a[-1:], tail) * (tail.double() - wide(mean[-1:], tail)) + wide(b[-1:], tail), tail)


@pytest.mark.gpu
@NO_DEVICE
@pytest.mark.parametrize("n", [1, 32])
@pytest.mark.parametrize(("c", "o", "side"), [(64, 256, 56), (256, 1024, 14), (512, 2048, 7), (72, 200, 5)])
def test_gated_pointwise_of_a_network_on_a_device(gemm, n, c, o, side):
    h = a_map((n, c, side, side), True, torch.bfloat16, "cuda")
    weight, bias = torch.randn(o, c, device="cuda").bfloat16() / c**0.5, torch.randn(o, device="cuda")
    gate, shortcut = torch.rand(n, o, device="cuda"), a_map((n, o, side, side), True, torch.bfloat16, "cuda")
    product = torch.einsum("oc,nchw->nohw", weight.double(), h.double()) + bias.double().reshape(-1, 1, 1)
    want = (wide(gate, h) * product + shortcut.double()).relu()
    got = gemm.gated_pointwise(h, weight, bias, gate, shortcut, True)
    assert got.stride() == shortcut.stride()
    # Rounded once to bfloat16; the matrix units cut off a little below float32.
    torch.testing.assert_close(got.double(), want, rtol=1.01 * 2**-8, atol=1e-4)
