"""The border to C++: both sides agree on the arguments, its errors become Python's, and it stays inside its tensors.

Maps of odd sizes end with their memory, so that `make sanitize` sees a kernel that goes further.
"""

import ctypes
import re

import pytest
import torch
from torch import nn

from senet.ops.conv import early_gate
from senet.ops.conv.native import OwnConv2d
from senet.ops.conv.native_gate import gate_of, gated_sum_
from senet.ops.csrc import arguments, build, calls
from senet.ops.reference import FullyConnected, scale, squeeze, table_dtype
from senet.ops.tail import definitions as sweeps
from senet.ops.tail import native
from senet.ops.tail.tail import norm_tail

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
SIZES = {"q": "int64_t", "d": "double", "f": "float", "P": "Pointer"}
# One value, one pixel, no multiples of a vector, several blocks of rows, several chunks of channels; nothing.
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 1), (2, 16, 1, 2), (3, 7, 5, 9), (1, 33, 9, 7), (2, 32, 17, 5), (2, 260, 3, 3)]
SHAPES += [(0, 16, 4, 4), (2, 16, 0, 4)]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 3e-2}


def in_cpp(name, source, of=""):
    """The fields of a structure in the header, (name, type), those of structures inside it in their place."""
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", source, re.M | re.S)[1]
    for line in re.findall(r"^    ([^/\n(]+);", body, re.M):
        kind, names = re.fullmatch(r"(?:const )?(\w+) (?:\*const )?(.+)", line).groups()
        for field in names.split(", "):
            if kind in ("Map", "Excitation", "Norm") and "*" not in field:
                yield from in_cpp(kind, source, f"{field}_" if kind == "Norm" else "")
            else:
                yield of + field.lstrip("*"), "Pointer" if "*" in line else kind


@pytest.mark.parametrize("structure", arguments.STRUCTURES, ids=lambda structure: structure.__name__)
def test_structures_have_the_fields_of_the_header(structure):
    source = (build.HERE / "arguments.hpp").read_text()
    mine = [(name, SIZES[arguments.CODES[kind]]) for name, kind in structure._fields_]
    assert mine == list(in_cpp(structure.__name__, source))
    assert calls.constant(f"sizeof {structure.__name__}") == 8 * len(mine) - (4 if "low" in structure.names else 0) * 2


def test_arguments_are_given_by_their_names_in_order():
    u, m = torch.ones(1, 2, 3), torch.zeros(1, 2)
    for wrong in ({"u": u}, {"u": u, "means": m}, {"mean": m, "u": u}, {"u": u, "mean": m, "variance": m}):
        with pytest.raises(TypeError, match="mean takes u, mean"):
            calls.call("mean", u, **wrong)


def of_size(n, c, s, dtype=0, last=1):
    return n, c, s, 2, last, dtype


HUGE = 2**57  # channels: more memory than there are addresses, also once multiplied


@pytest.mark.parametrize(
    ("name", "given", "error", "match"),
    [
        ("mean", (*of_size(1, 3, 1, dtype=77), 0, 0), RuntimeError, "unknown map type 77"),
        ("gated_sum", (*of_size(1, 3, 1, dtype=-1), 0, 0, 0, 0), RuntimeError, "unknown map type -1"),
        ("mean", (*of_size(1, HUGE, 1), 0, 0), MemoryError, "memory"),
        ("gate", (*of_size(1, HUGE, 1), 0, 4, 1, 0, 0, 0, 0, 0, 0, 0), MemoryError, "memory"),
    ],
)
def test_failures_in_cpp_are_exceptions_in_python(name, given, error, match):
    pack = arguments.OPERATIONS[name].pack
    with pytest.raises(error, match=f"C\\+\\+.*{match}"):
        calls.fail(calls.operation(name)(pack(*given)))
    torch.testing.assert_close(native.mean(torch.ones(1, 3, 5)), torch.ones(1, 3))  # it goes on


@pytest.mark.parametrize("winograd", [0, 1])
def test_a_failure_in_a_parallel_region_is_an_exception_too(winograd):
    kernel = 3 if winograd else 1
    sides = (1, HUGE // 16, 8, 8, 16, 8, 8, kernel, 1, kernel // 2, 1, 2)
    convolution = arguments.Convolution(*sides, winograd, 0, 0, 0.0, 1.0)
    given = arguments.Convolve.pack(ctypes.addressof(convolution), 0, 0, 0, 0, 0)
    with pytest.raises(MemoryError, match=r"C\+\+"):
        calls.fail(calls.operation("convolve")(given))


def ending(x, last):
    """The same map in a layout, at the end of a piece of memory that begins at no multiple of a vector."""
    axes = list(range(x.ndim))
    order = [0, *axes[2:], 1] if last else axes
    inside = x.permute(order).contiguous()
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    room[1:] = inside.flatten()
    return room[1:].view(inside.shape).permute([order.index(axis) for axis in axes])


def close(got, want, dtype):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=TOLERANCE[dtype] * size)


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["contiguous", "channels_last"])
def last(request):
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def draw(request, dtype, last):
    """Random maps of a shape, and tables for them."""
    generator = torch.Generator().manual_seed(0)
    shape = request.param

    def made(table=False):
        size = shape[:2] if table else shape
        x = torch.randn(size, generator=generator, dtype=torch.float64) + 1
        return ending(x.to(table_dtype(dtype)), False) if table else ending(x.to(dtype), last)

    made.shape = shape
    return made


def test_each_sweep_computes_what_its_definition_does(draw, dtype):
    u, shortcut, dout, (m, a, b, dv) = draw(), draw(), draw(), (draw(table=True) for _ in range(4))
    if all(draw.shape[2:]):
        close(native.moments(u), sweeps.moments(u), dtype)
        close([native.moments_backward(dout, u, m, a, b, dv)], [sweeps.moments_backward(dout, u, m, a, b, dv)], dtype)
        close([native.mean(u)], [sweeps.mean(u)], dtype)
    for other in (None, shortcut):
        for relu in (False, True):
            got, want = (form.affine(u, m, a, b, other, relu) for form in (native, sweeps))
            close([got], [want], dtype)
    for out in (None, shortcut):
        close(native.affine_backward(dout, out, u, m), sweeps.affine_backward(dout, out, u, m), dtype)


def test_gates_and_gated_sums(draw, dtype):
    h, shortcut, gate = draw(), draw(), draw(table=True)
    c, table = h.shape[1], table_dtype(dtype)
    w1, b1, w2 = torch.randn(5, c).to(table), torch.randn(5).to(table), torch.randn(9, 5).to(table)
    for name, activation in (("sigmoid", "relu"), ("identity_hard_sigmoid", "silu"), ("identity_tanh", "hardswish")):
        e = FullyConnected(w1, b1, w2, None, name, activation)
        if all(draw.shape[2:]):
            close([gate_of(h, e)], [e(squeeze(h))], dtype)
    for other in (None, shortcut):
        for relu in (False, True):
            u = ending(h, not h.is_contiguous())
            want = scale(u.to(table), gate) + (0 if other is None else other)
            got = gated_sum_(u, gate, other, relu)
            close([got], [torch.relu(want) if relu else want], dtype)
            assert got is u


@pytest.mark.parametrize("projects", [False, True], ids=["shortcut", "projection"])
@pytest.mark.parametrize("gate", [None, "sigmoid"])
def test_whole_tails_inside_their_tensors(draw, dtype, projects, gate):
    if draw.shape[0] * draw.shape[2] * draw.shape[3] < 2:
        return
    c, table, runs = draw.shape[1], table_dtype(dtype), []
    u, shortcut, dout = draw(), draw(), draw()
    w1, w2 = torch.randn(3, c).to(table), torch.randn(c, 3).to(table)
    for backend in ("definitions", "native"):
        norms = [nn.BatchNorm2d(c, dtype=table) for _ in range(2)]
        for norm in norms:
            norm.bias.data += torch.arange(1, c + 1) / c  # else one image's squeeze is 0, the ReLU's corner
        e = None if gate is None else FullyConnected(w1.requires_grad_(), None, w2.requires_grad_(), None, gate)
        x, other = (ending(t.detach(), not t.is_contiguous()).requires_grad_() for t in (u, shortcut))
        out = norm_tail(x, norms[0], e, other, True, backend, norms[1] if projects else None)
        if not runs:  # where rounding decides which gradients pass, there are none
            dout = ending(dout.masked_fill(out.detach().abs() < 10 * TOLERANCE[dtype], 0), not u.is_contiguous())
        wanted = [x, other, norms[0].weight, norms[0].bias, *((w1, w2) if gate else ())]
        out.backward(dout, inputs=wanted)
        runs.append([out.detach(), *(t.grad for t in wanted), norms[0].running_mean, norms[0].running_var])
        w1.grad = w2.grad = None
    close(runs[1], runs[0], dtype)


def test_tables_in_another_order_of_memory_are_read_by_their_indices():
    u, g = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    m, a, dm, dv = (torch.randn(6, 4).t() for _ in range(4))
    want = sweeps.moments_backward(g, u, m, a, dm, dv)
    torch.testing.assert_close(native.moments_backward(g, u, m, a, dm, dv), want)
    torch.testing.assert_close(native.affine(u, m, a, dm, None, True), sweeps.affine(u, m, a, dm, None, True))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_moments_of_no_positions_are_the_error_of_the_definition(last):
    u = torch.empty(2, 16, 0, 4)
    u = u.contiguous(memory_format=torch.channels_last) if last else u
    for form in (native, sweeps):
        with pytest.raises(RuntimeError):
            form.moments(u)


@pytest.mark.parametrize(("kernel", "stride", "out"), [(1, 1, 33), (1, 2, 16), (3, 1, 48), (3, 2, 40)])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 3), (1, 7, 7)])
def test_convolutions_inside_their_tensors(kernel, stride, out, size):
    n, h, w = size
    generator = torch.Generator().manual_seed(1)
    weight = ending(torch.randn(out, 16, kernel, kernel, generator=generator), False)
    bias = ending(torch.randn(out, generator=generator)[None], False)[0]
    x = ending(torch.randn(n, 16, h, w, generator=generator), True)
    conv = OwnConv2d(weight, bias, stride, kernel // 2, 1, -1e30, 1e30)
    want = nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2)
    shortcut = ending(torch.randn(want.shape, generator=generator), True)
    close([conv(x)], [want], torch.float32)
    close([conv(x, shortcut, True)], [torch.relu(want + shortcut)], torch.float32)
    if (kernel, stride) == (1, 1):
        excitation = early_gate.as_tables(
            FullyConnected(torch.randn(3, 16), None, torch.randn(out, 3), torch.randn(out), "sigmoid"), torch.float32
        )
        conv.take_gate(excitation)
        gated = scale(want, excitation(squeeze(x)).double())
        close([conv(x, shortcut, True, gated=True)], [torch.relu(gated + shortcut)], torch.float32)
