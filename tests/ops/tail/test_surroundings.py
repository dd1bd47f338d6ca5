"""What surrounds a tail works with the fast form: PyTorch's own machinery."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import senet
from helpers.tails import tail
from senet import SEConfig, SqueezeExcite
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

    def forward(self, u, shortcut=None):
        return tail(u, self.norm, self.se, shortcut)


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
def test_function_transforms_and_forward_mode_see_plain_operations():
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


class Small(nn.Module):
    """Two residual blocks that end in tails, for small images."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in self.convs)
        self.gates = nn.ModuleList(SqueezeExcite(channels, SEConfig(reduction=4)) for _ in self.convs)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x):
        x = self.stem(x)
        for conv, norm, gate in zip(self.convs, self.norms, self.gates, strict=True):
            x = tail(conv(x), norm, gate, x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
def test_two_hundred_steps_on_digits_have_the_references_loss_curve():
    """In float64: over so many steps, float32's rounding moves the curve, because ReLUs flip."""
    digits = load_digits()
    x = torch.as_tensor(digits.images).double()[:, None]
    x, y = (x - x.mean()) / x.std(), torch.as_tensor(digits.target).long()
    curves = []
    for backend in ("reference", "native"):
        torch.manual_seed(0)
        model, losses = Small().double(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with senet.use_backend(backend):
            for index in range(200):
                batch = torch.arange(128 * index, 128 * (index + 1)) % len(x)
                loss = F.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-20:].mean() < 0.3 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=1e-6)
