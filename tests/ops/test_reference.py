"""The reference maths against autograd-free formulas written out in float64, and against timm's SE module."""

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import senet
from senet.ops import reference


def block_by_hand(x, w1, b1, w2, b2):
    """Equations 2 to 4 with loops over images, on plain numbers: written from the paper, not from the code."""
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        z = torch.stack([x[n, c].sum() / x[n, c].numel() for c in range(x.shape[1])])
        hidden = torch.clamp(w1 @ z + b1, min=0)
        s = 1 / (1 + torch.exp(-(w2 @ hidden + b2)))
        for c in range(x.shape[1]):
            out[n, c] = x[n, c] * s[c]
    return out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 9),
    hidden=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_block_is_the_papers_equations(n, channels, hidden, spatial, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, *spatial, dtype=torch.float64, generator=g)
    w1 = torch.randn(hidden, channels, dtype=torch.float64, generator=g)
    w2 = torch.randn(channels, hidden, dtype=torch.float64, generator=g)
    b1 = torch.randn(hidden, dtype=torch.float64, generator=g)
    b2 = torch.randn(channels, dtype=torch.float64, generator=g)
    gate = reference.excitation(reference.squeeze(x), w1, b1, w2, b2)
    torch.testing.assert_close(reference.scale(x, gate), block_by_hand(x, w1, b1, w2, b2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_block_agrees_with_timm_and_so_do_its_gradients(memory_format):
    theirs = timm.layers.SEModule(32, rd_channels=4).double()
    x = torch.randn(3, 32, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = [p.detach().clone().requires_grad_() for p in theirs.parameters()]
    w1, b1, w2, b2 = weights
    gate = reference.excitation(reference.squeeze(x_ours), w1.flatten(1), b1, w2.flatten(1), b2)
    ours = reference.scale(x_ours, gate)
    expected = theirs(x_theirs)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(x)
    ours.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-11, atol=1e-12)
    for mine, other in zip(weights, theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_squeeze_of_half_types_accumulates_in_float32():
    # 4096 values of 1 + 2⁻⁷: a bfloat16 running sum stops growing at 256.
    x = torch.full((1, 2, 64, 64), 1.0078125, dtype=torch.bfloat16)
    z = reference.squeeze(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, torch.full((1, 2), 1.0078125), rtol=1e-6, atol=0)


def test_max_squeeze_is_the_largest_value_of_each_channel():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert reference.squeeze(x, "max").tolist() == [[3, 7, 11], [15, 19, 23]]


@pytest.mark.parametrize("name", [name for name in reference.GATES if name.startswith("identity_")])
def test_identity_gates_are_exactly_one_at_zero_and_pass_a_gradient(name):
    e = torch.zeros(3, requires_grad=True)
    gate = reference.GATES[name](e)
    assert torch.equal(gate, torch.ones(3))
    gate.sum().backward()
    assert (e.grad > 0.1).all()


@pytest.mark.parametrize("shape", [(2, 8), (2, 7, 3), (2, 8, 1, 1, 1, 1)])
def test_wrong_shapes_say_what_is_wrong(shape):
    with pytest.raises(ValueError, match=r"must be \(N, 8, \*spatial\)"):
        reference.check_map(torch.zeros(shape), 8)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("with_se", [True, False])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
def test_residual_tail_is_the_sum_of_its_parts_and_never_writes_its_inputs(
    activation, with_se, with_norm, with_shortcut
):
    u, shortcut = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    kept = u.clone(), shortcut.clone()
    norm = torch.nn.BatchNorm2d(4).double() if with_norm else None
    se = timm.layers.SEModule(4, rd_channels=2).double() if with_se else None
    out = reference.residual_tail(u, norm, se, shortcut if with_shortcut else None, activation)
    expected = u
    if with_norm:
        expected = (u - u.mean((0, 2, 3), keepdim=True)) / torch.sqrt(
            u.var((0, 2, 3), keepdim=True, unbiased=False) + norm.eps
        )
    if with_se:
        expected = se(expected)
    if with_shortcut:
        expected = expected + shortcut
    if activation:
        expected = expected.clamp(min=0)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(u, kept[0])
    assert torch.equal(shortcut, kept[1])


@pytest.mark.parametrize("hooked", ["norm", "se"])
def test_a_tail_with_backward_hooks_is_not_written_to_in_place(hooked):
    modules = {"norm": torch.nn.BatchNorm2d(4), "se": senet.SqueezeExcite(4, senet.SEConfig(hidden=2))}
    seen = []
    modules[hooked].register_full_backward_hook(lambda module, given, received: seen.append(received[0].shape))
    u = torch.randn(2, 4, 3, 3, requires_grad=True)
    reference.residual_tail(u, modules["norm"], modules["se"], torch.randn(2, 4, 3, 3), True).sum().backward()
    assert seen == [(2, 4, 3, 3)]
    assert u.grad is not None
