"""Which form computes a tail, and why not a faster one, by value."""

import pytest
import torch
from torch import nn

import senet
from senet.ops.dispatch import SMALLEST_NATIVE, SMALLEST_NATIVE_BARE
from senet.ops.reference import FullyConnected
from senet.ops.tail import native
from senet.ops.tail.choice import Form, choose
from senet.ops.tail.norms import BatchNorm, GroupNorm, norm_of
from senet.ops.tail.reasons import Reason
from senet.ops.tail.tail import tail

needs_native = pytest.mark.skipif(native.why_not() is not None, reason="no C++ compiler")
C = 16
BIG = torch.zeros(2, C, 32, SMALLEST_NATIVE // C // 32)
NORM = BatchNorm(torch.ones(C), torch.zeros(C), torch.zeros(C), torch.ones(C), True, 0.1, 1e-5)
GATE = FullyConnected(torch.ones(4, C), None, torch.ones(C, 4), None, "sigmoid")


def how(u=BIG, norm=NORM, gate=GATE, shortcut=BIG, relu=True, **more):
    chosen = choose(u, norm, gate, shortcut, relu, **more)
    return chosen.form, chosen.backend, chosen.reason


def test_plain_operations_say_why(monkeypatch):
    monkeypatch.delenv("SENET_BACKEND", raising=False)
    small, bare = torch.zeros(2, C, 4, 4), SMALLEST_NATIVE_BARE[False] // (2 * C)
    operations = {
        Reason.NOTHING: how(norm=None, gate=None),
        Reason.SIZE: how(u=small, shortcut=small),
        Reason.FROZEN: how(norm=NORM._replace(training=False)),
        Reason.DTYPE: how(u=BIG.half(), shortcut=BIG.half()),
        Reason.DEVICE: how(u=BIG.to("meta"), norm=None, gate=torch.sigmoid, shortcut=None),
        Reason.EMPTY: how(u=BIG[:0], shortcut=BIG[:0]),
        Reason.SHAPE: how(shortcut=BIG[:, :, :1, :1]),
        Reason.TENSOR: how(norm=NORM._replace(weight=torch.ones(C + 1))),
        Reason.REQUESTED: how(backend="reference"),
    }
    for reason, found in operations.items():
        assert found == (Form.OPERATIONS, "reference", reason)
    assert how(u=torch.zeros(2, C, 1, bare - 1), gate=None, shortcut=None)[2] == Reason.SIZE
    with torch.autograd.forward_ad.dual_level():
        assert how()[2] == Reason.TRANSFORM
    with senet.use_backend("reference"):
        assert how() == (Form.OPERATIONS, "reference", Reason.REQUESTED)


@needs_native
def test_the_fastest_form_and_why_it_is_not_taken(monkeypatch):
    monkeypatch.delenv("SENET_BACKEND", raising=False)
    assert how() == (Form.ONE_CALL, "native", Reason.FASTEST)
    group = GroupNorm(torch.ones(C), torch.zeros(C), 4, 1e-5)
    sweeps = {
        Reason.NORM: how(norm=group),
        Reason.GATE: how(gate=torch.sigmoid),
        Reason.PARAMETERS: how(norm=NORM._replace(weight=torch.ones(C).double())),
        Reason.FROZEN: how(norm=NORM._replace(training=False), backend="native"),
    }
    for reason, found in sweeps.items():
        assert found == (Form.SWEEPS, "native", reason)
    assert how(backend="traced") == (Form.TRACED, "traced", Reason.COMPILER)
    assert how(norm=NORM._replace(group="ranks"), u=BIG[:0], shortcut=BIG[:0])[::2] == (Form.TRACED, Reason.RANKS)


@needs_native
def test_a_projections_norm_joins_if_the_call_supports_it():
    last = BIG.contiguous(memory_format=torch.channels_last)
    assert choose(BIG, NORM, GATE, BIG, True, "auto", NORM).joins
    assert choose(last, NORM, GATE, last, True, "auto", NORM).joins
    assert not choose(BIG, NORM, GATE, BIG, False, "auto", NORM).joins
    assert not choose(BIG, NORM, GATE, BIG.double(), True, "auto", NORM).joins
    assert not choose(BIG, NORM, GATE, BIG, True, "auto", NORM._replace(training=False)).joins
    few = NORM._replace(**dict.fromkeys(("weight", "bias", "running_mean", "running_var")))
    assert not choose(last[:, :8], few, None, last[:, :8].contiguous(memory_format=torch.channels_last), True,
                      "native", few).joins  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_the_value_of_a_norm_computes_what_the_module_does(options, training):
    module, same = (nn.BatchNorm2d(C, **options).train(training) for _ in range(2))
    for _ in range(3):
        x = torch.randn(4, C, 3, 3)
        torch.testing.assert_close(norm_of(module)(x), same(x), rtol=0, atol=0)
        for mine, right in zip(module.buffers(), same.buffers(), strict=True):
            assert torch.equal(mine, right)


@pytest.mark.parametrize("backend", ["reference", "traced", "definitions", pytest.param("native", marks=needs_native)])
def test_every_form_counts_nothing_and_updates_the_statistics_once(backend):
    x = torch.randn(4, C, 6, 6)
    mean, var = torch.zeros(C), torch.ones(C)
    out = tail(x, NORM._replace(running_mean=mean, running_var=var), GATE, x, True, backend)
    y = nn.functional.batch_norm(x, None, None, NORM.weight, NORM.bias, True)
    torch.testing.assert_close(out, torch.relu(y * GATE(y.mean((2, 3)))[..., None, None] + x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.9 + 0.1 * x.var((0, 2, 3)))
    assert mean._version == var._version == 0  # as of F.batch_norm, whose backward pass compares them
