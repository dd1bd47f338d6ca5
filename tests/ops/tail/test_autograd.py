"""Every option of the two-sweep tail against plain PyTorch under autograd in float64, for each implementation.

"definitions" are the sweeps as an outer torch.compile traces them, "reference" the same behind the hand-written
gradients; "native" is C++; "compiled" takes seconds for each combination of options, hence slow.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from senet.ops import reference
from senet.ops.tail import native
from senet.ops.tail.tail import norm_tail

NO_COMPILER = native.why_not() is not None
NATIVE = pytest.param("native", marks=pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler"))
COMPILED = pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")])
IMPLEMENTATIONS = ["definitions", "reference", NATIVE, COMPILED]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])

OPTIONS = {
    "plain": {"gate": None},
    "se": {},
    "no shortcut": {"shortcut": False},
    "no relu": {"relu": False},
    "norm and se alone": {"shortcut": False, "relu": False},
    "plain, no relu": {"gate": None, "relu": False},
    "batch of one": {"shape": (1, 6, 4, 4)},
    "one pixel": {"shape": (4, 6, 1, 1)},
    "one channel": {"shape": (2, 1, 5, 3)},
    "odd everything": {"shape": (3, 7, 5, 3)},
    "several blocks of rows": {"shape": (2, 3, 31, 29)},
    "a channel longer than a chunk": {"shape": (1, 2, 71, 73)},
    "wide": {"shape": (2, 130, 3, 3)},
    "sixteen channels": {"shape": (2, 16, 5, 3)},
    "a multiple of sixteen": {"shape": (3, 48, 17, 13)},
    "sixteen channels, plain": {"shape": (2, 16, 5, 3), "gate": None},
    "1-D": {"shape": (3, 6, 11)},
    "3-D": {"shape": (2, 6, 3, 4, 2)},
    **{gate: {"gate": gate} for gate in reference.GATES if gate != "sigmoid"},
    "norm without weights": {"affine": False},
    "cumulative average": {"momentum": None},
    "other momentum and eps": {"momentum": 0.3, "eps": 0.1},
    "no running statistics": {"track_running_stats": False},
    "one group": {"norm": "1"},
    "some groups": {"norm": "4"},
    "a group a channel": {"norm": "8"},
    "one group without weights": {"norm": "1", "affine": False},
    "plain, some groups": {"norm": "4", "gate": None},
    "some groups, batch of one": {"norm": "2", "shape": (1, 6, 4, 4)},
    "pre-activation": {"norm": None, "relu": False},
    "no norm": {"norm": None},
    "no norm, no se": {"norm": None, "gate": None},
}


@pytest.fixture(autouse=True)
def _exact_hard_sigmoid(monkeypatch):
    """The derivative of PyTorch's hardsigmoid has 1/6 in float32 for float64 too, off by 3e-8; C++ here has not."""
    exact = {
        "hard_sigmoid": lambda e: (e + 3).clamp(0, 6) / 6,
        "identity_hard_sigmoid": lambda e: (e + 3).clamp(0, 6) / 3,
    }
    for name, gate in exact.items():
        monkeypatch.setitem(reference.GATES, name, gate)


@every_implementation
@both_layouts
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(case, agree, implementation, layout, options):
    one = case(**options, layout=layout)
    agree(one.run(implementation), one.run("autograd"), 1e-10)


@every_implementation
@both_layouts
@pytest.mark.parametrize("gate", [None, "sigmoid"])
def test_frozen_statistics_with_weights_that_train(case, agree, implementation, layout, gate):
    one = case(gate=gate, layout=layout)
    one.norm.eval()
    agree(one.run(implementation), one.run("autograd"), 1e-10)
    one.norm.requires_grad_(False)
    agree(one.run(implementation), one.run("autograd"), 1e-10)


@every_implementation
def test_evaluation_without_running_statistics_uses_the_batchs(case, agree, implementation):
    one = case(track_running_stats=False)
    one.norm.eval()
    agree(one.run(implementation), one.run("autograd"), 1e-10)


@every_implementation
def test_statistics_that_stopped_being_tracked_stay_as_they_are(case, agree, implementation):
    one = case()
    one.norm.track_running_stats = False
    agree(one.run(implementation), one.run("autograd"), 1e-10)


@every_implementation
@pytest.mark.parametrize("layout", ["transposed", "sliced", "batch_inside"])
@pytest.mark.parametrize("options", [{}, {"gate": None, "relu": False}], ids=["se", "plain, no relu"])
def test_other_layouts(case, agree, implementation, layout, options):
    one = case(**options, layout=layout)
    agree(one.run(implementation), one.run("autograd"), 1e-10)
    for name in ("shortcut", "dout"):  # or one map of another layout than the others
        mixed = case(**options, layout="channels_last")
        other = getattr(one, name)
        setattr(mixed, name, other.detach().requires_grad_(other.requires_grad))
        agree(mixed.run(implementation), mixed.run("autograd"), 1e-10)


@every_implementation
@pytest.mark.parametrize("relu", [True, False])
def test_a_gradient_that_is_expanded(case, agree, implementation, relu):
    one = case(relu=relu)
    one.dout = torch.tensor(0.7, dtype=torch.float64).expand(one.u.shape)
    agree(one.run(implementation), one.run("autograd"), 1e-10)
    one.dout = torch.randn(3, 8, 1, 1, dtype=torch.float64).expand(one.u.shape)  # global pooling's
    agree(one.run(implementation), one.run("autograd"), 1e-10)


FROZEN = [["u"], ["shortcut"], ["weight"], ["bias"], ["fc1.weight", "fc1.bias"], ["fc2.weight"], ["u", "shortcut"]]
FROZEN += [["u", "shortcut", "weight", "bias"], ["weight", "bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]]


@every_implementation
@pytest.mark.parametrize("frozen", FROZEN, ids=",".join)
@pytest.mark.parametrize("norm", ["batch", "2"])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_right(case, agree, implementation, frozen, norm):
    one = case(norm=norm)
    named = {
        "u": one.u,
        "shortcut": one.shortcut,
        **dict(one.norm.named_parameters()),
        **dict(one.se.named_parameters()),
    }
    for name in frozen:
        named[name].requires_grad_(False)
    mine = one.run(implementation)
    assert not {f"d{name}" for name in frozen} & mine.keys()
    agree(mine, one.run("autograd"), 1e-10)


@every_implementation
@both_layouts
@pytest.mark.parametrize("gate", [None, "sigmoid"])
@pytest.mark.parametrize("relu", [True, False])
def test_float32(case, agree, implementation, layout, gate, relu):
    one = case((4, 12, 9, 7), gate=gate, relu=relu, layout=layout, dtype=torch.float32)
    agree(one.run(implementation), one.run("autograd", wide=True), 2e-4)


@every_implementation
@both_layouts
@pytest.mark.parametrize("gate", [None, "sigmoid"])
@pytest.mark.parametrize("relu", [True, False])
def test_bfloat16(case, agree, implementation, layout, gate, relu):
    # A map is rounded once, by at most half a unit of its eight bits, 2⁻⁸; the tables stay float32 throughout. Autograd
    # through the definitions adds u's gradient in bfloat16, in pieces.
    maps = 2**-7 if implementation == "definitions" else 2**-8 * 1.01
    one = case((4, 12, 9, 7), gate=gate, relu=relu, layout=layout, dtype=torch.bfloat16)
    agree(one.run(implementation), one.run("autograd", wide=True), 2e-4, maps=maps)


@every_implementation
@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_shortcut_of_another_type(case, agree, implementation, types):
    one = case(dtype=types[0])
    one.shortcut = one.shortcut.detach().to(types[1]).requires_grad_()
    mine = one.run(implementation)
    assert mine["out"].dtype == types[0]
    assert mine["dshortcut"].dtype == types[1]
    # bfloat16: native rounds the shortcut to the map's type first, 2⁻⁸ more.
    agree(mine, one.run("autograd", wide=True), 2e-4, maps=2**-7 if types[0] == torch.bfloat16 else 2e-4)


class Odd(nn.Module):
    """An excitation of the user's own: not the paper's, with a parameter, not local to the channel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, z):
        return torch.sigmoid(nn.functional.conv1d(z[:, None], self.weight[None, None], padding=1)[:, 0]) + z.softmax(1)


@every_implementation
@pytest.mark.parametrize("norm", ["batch", "2", None])
def test_any_excitation_trains_by_itself(case, implementation, norm):
    one = case(gate=None, norm=norm)
    odd, grads = Odd(), []
    for fast in (True, False):
        own, gate = copy.deepcopy(one), copy.deepcopy(odd)
        if fast:
            backend = {"definitions": "traced", "reference": "definitions"}.get(implementation, implementation)
            out = norm_tail(own.u, own.norm, gate, own.shortcut, True, backend)
        else:
            y = own.u if own.norm is None else own.norm(own.u)
            out = torch.relu(y * gate(y.mean((2, 3)))[..., None, None] + own.shortcut)
        out.backward(one.dout)
        grads.append([out, own.u.grad, own.shortcut.grad, gate.weight.grad])
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40) | st.sampled_from([16, 32, 48])).flatmap(
        lambda nc: st.lists(st.integers(1, 12), min_size=1, max_size=3).map(lambda s: (*nc, *s))
    ),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "channels_last", "transposed", "sliced", "batch_inside"])] * 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    norm=st.sampled_from(["batch", "1", None]),
    gate=st.sampled_from([None, "sigmoid", "tanh"]),
    shortcut=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_native_on_any_shape_stride_and_type(request, shape, layouts, dtype, norm, gate, shortcut, relu, seed):
    case, agree = request.getfixturevalue("case"), request.getfixturevalue("agree")
    torch.manual_seed(seed)
    if shape[0] * torch.Size(shape[2:]).numel() < 8:  # statistics of a few values divide by almost nothing
        shape = (8, *shape[1:])
    parts = [case(shape, norm, gate, shortcut, relu, layout, dtype) for layout in layouts]
    one = parts[0]
    one.shortcut, one.dout = parts[1].shortcut, parts[2].dout
    if norm == "1":
        one.norm.eps = 0.1
    exact = dtype == torch.float64
    agree(one.run("native"), one.run("autograd", wide=True), 1e-9 if exact else 1e-3, maps=0 if exact else 4e-3)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@both_layouts
def test_the_operations_keep_what_they_promise_to_pytorch(case, backend, layout):
    one = case((3, 6, 5, 4), layout=layout)
    ops, u, shortcut = torch.ops.senet, one.u, one.shortcut
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.moments.default, (u, True, backend), test_utils=tests)
    torch.library.opcheck(ops.moments.default, (u, False, backend), test_utils=tests)
    m, _, v, *handles = ops.moments(u.detach(), True, backend)
    table = torch.rand_like(m).requires_grad_()
    torch.library.opcheck(ops.affine.default, (u, m, table, table, shortcut, True, *handles, backend), test_utils=tests)
    torch.library.opcheck(ops.affine.default, (u, m, table, table, None, False, None, None, backend), test_utils=tests)
    maps = [x.detach() for x in (one.dout, u, u)]
    torch.library.opcheck(ops.affine_backward.default, (*maps, m, backend), test_utils=tests)
    torch.library.opcheck(ops.product_sums.default, (*maps[1:], m, backend), test_utils=tests)
    torch.library.opcheck(ops.moments_backward.default, (*maps[1:], m, v, m, v, backend), test_utils=tests)
