"""Which form the tail takes, and that what surrounds a network works with the fast one: PyTorch's own machinery."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import senet
from senet import ResidualTail, SEConfig, SqueezeExcite
from senet.nn import residual_tail
from senet.nn.residual_tail import norm_act
from senet.ops import reference
from senet.ops.tail import native

NO_COMPILER = native.why_not() is not None
NATIVE = pytest.param("native", marks=pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler"))
COMPILED = pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")])
each_backend = pytest.mark.parametrize("backend", [NATIVE, COMPILED])


class Block(nn.Module):
    """A tail with its own modules; gates of 8 channels."""

    def __init__(self, norm=None, **config):
        super().__init__()
        self.norm = nn.BatchNorm2d(8) if norm is None else norm
        self.se = SqueezeExcite(8, SEConfig(reduction=2, **config))
        self.tail = ResidualTail()

    def forward(self, u, shortcut=None):
        return self.tail(u, self.norm, self.se, shortcut)


@pytest.fixture
def taken(monkeypatch):
    """The names of the forms that were taken, in order."""
    names = []

    def spy(name, function, *args):
        names.append(name)
        return function(*args)

    monkeypatch.setattr(residual_tail, "norm_tail", partial(spy, "fast", residual_tail.norm_tail))
    monkeypatch.setattr(reference, "residual_tail", partial(spy, "reference", reference.residual_tail))
    return names


def both(block, u, use, backend="native"):
    """What ``use(block, u)`` gives with a backend and with plain PyTorch, from the same start."""
    results = []
    for name in (backend, "reference"):
        own = copy.deepcopy(block)
        with senet.use_backend(name):
            results.append(use(own, u.detach().clone().requires_grad_()))
    return results


def close(pair, tolerance=1e-10):
    for mine, right in zip(*pair, strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)


def data(*shape):
    return torch.randn(shape or (3, 8, 6, 5), dtype=torch.float64)


@each_backend
def test_a_known_tail_takes_the_fast_form(taken, backend):
    with senet.use_backend(backend):
        for norm in (nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.BatchNorm2d(8).eval()):
            Block(norm)(torch.randn(2, 8, 4, 4))
        norm_act(torch.randn(2, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), SqueezeExcite(8))
        ResidualTail()(torch.randn(2, 8, 4, 4), None, SqueezeExcite(8), None)
    assert taken == ["fast"] * 5


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnGate(SqueezeExcite):
    def forward(self, x):
        return 3 * super().forward(x)


class Subclass(torch.Tensor):
    pass


def listened(part, how):
    block = Block()
    getattr(getattr(block, part), how)(lambda *args: None)
    return block


UNKNOWN = {
    "a norm of the user's": lambda: Block(OwnNorm(8)),
    "an instance norm": lambda: Block(nn.InstanceNorm2d(8)),
    "squeeze none": lambda: Block(squeeze="none"),
    "squeeze max": lambda: Block(squeeze="max"),
    "hook on the norm": lambda: listened("norm", "register_forward_hook"),
    "early hook on the gate": lambda: listened("se", "register_forward_pre_hook"),
}


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_left_to_pytorch(taken, make):
    block = make().double()

    def use(block, u):
        block(u, 2 * u).sin().sum().backward()
        return [u.grad, *(p.grad for p in block.parameters())]

    close(both(block, data(), use))
    assert taken == ["reference"] * 2


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
def test_modules_that_are_replaced_or_listened_to_are_called(taken):
    u = data()
    block, calls = Block().double(), []
    block.se = OwnGate(8, SEConfig(reduction=2)).double()
    handles = [block.norm.register_forward_hook(lambda *args: calls.append("norm"))]
    with senet.use_backend("native"):
        expected = torch.relu(block.se(nn.functional.batch_norm(u, None, None, training=True)) + u)
        torch.testing.assert_close(block(u, u), expected)
        assert calls == ["norm"]
        handles[0].remove()
        block(u, u)
        plain = Block().double()
        everywhere = register_module_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
        try:
            plain(u, u)
        finally:
            everywhere.remove()
        plain(u, u)
        plain(u.as_subclass(Subclass), u)
        plain(u[:0], u[:0])
        plain(u, u[:, :, :1, :1])  # a shortcut that is broadcast
    assert calls == ["norm", "BatchNorm2d", "Conv2d", "Conv2d", "SqueezeExcite", "ResidualTail", "Block"]
    assert taken == ["reference"] * 3 + ["fast"] + ["reference"] * 3


@each_backend
def test_gradients_add_up_over_two_backward_passes(backend):
    def use(block, u):
        for scale in (1, 2):
            block(scale * u, u).sin().sum().backward()
        return [u.grad, *(p.grad for p in block.parameters())]

    close(both(Block().double(), data(), use, backend))


@each_backend
def test_a_graph_that_is_kept_can_be_run_again(backend):
    def use(block, u):
        out = block(u, u).sin().sum()
        out.backward(retain_graph=True)
        first = [u.grad.clone(), *(p.grad.clone() for p in block.parameters())]
        out.backward(retain_graph=True)
        out.backward()
        for once, thrice in zip(first, [u.grad, *(p.grad for p in block.parameters())], strict=True):
            torch.testing.assert_close(thrice, 3 * once)
        return first

    close(both(Block().double(), data(), use, backend))


@each_backend
def test_activation_checkpointing(backend):
    def use(block, u):
        h = checkpoint(block, u.sin(), u, use_reentrant=False)
        checkpoint(block, h, h, use_reentrant=False).sin().sum().backward()
        return [u.grad, *(p.grad for p in block.parameters()), *block.buffers()]

    close(both(Block().double(), data(), use, backend))


@each_backend
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8)], ids=["batch", "group"])
def test_a_double_backward_says_that_there_is_none(backend, norm):
    block, u = Block(norm).double(), data().requires_grad_()
    with senet.use_backend(backend):
        out = block(u, u).sin().sum()
    with pytest.raises(RuntimeError, match=r"no second derivative; .*use_backend\('reference'\)"):
        torch.autograd.grad(out, u, create_graph=True)
    with senet.use_backend("reference"):
        (grad,) = torch.autograd.grad(block(u, u).sin().sum(), u, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own forward-mode rules use it
@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
def test_function_transforms_and_forward_mode_see_plain_operations(taken):
    block, u = Block(nn.GroupNorm(2, 8)).double(), data()

    def loss(u):
        return block(u, u).sin().sum()

    with senet.use_backend("native"):
        gradient = torch.func.grad(loss)(u)
        each = torch.func.vmap(torch.func.grad(loss))(u[:, None])
        _, tangent = torch.func.jvp(loss, (u,), (torch.ones_like(u),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(u, torch.ones_like(u))
            again = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    assert set(taken) == {"reference"}
    torch.testing.assert_close(each[:, 0], gradient)
    torch.testing.assert_close(tangent, gradient.sum())
    torch.testing.assert_close(again, gradient.sum())


@each_backend
def test_autocast_gives_half_maps_and_keeps_tables_in_float32(backend):
    torch.manual_seed(0)
    conv, block, x = nn.Conv2d(4, 8, 3, padding=1), Block(), torch.randn(4, 4, 9, 9)
    results = []
    for name in (backend, "reference"):
        own = copy.deepcopy(nn.ModuleList([conv, block]))
        leaf = x.clone().requires_grad_()
        with senet.use_backend(name), torch.autocast("cpu", torch.bfloat16):
            u = own[0](leaf)
            out = own[1](u, u)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        results.append([out.float(), leaf.grad, *(p.grad for p in own.parameters())])
    for mine, right in zip(*results, strict=True):
        # Each form rounds to bfloat16 (2⁻⁸) at its own places, plain PyTorch after every operation.
        assert (mine - right).abs().max() <= 2**-5 * right.abs().max().clamp_min(1e-3)


@each_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(backend, mode, training):
    def use(block, u):
        with mode():
            return [block.train(training)(u, u), *block.buffers()]

    close(both(Block().double(), data(), use, backend))
