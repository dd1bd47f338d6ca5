"""Small networks with gates of their own, and an accelerated copy compared with the ordinary network."""

import contextlib
import copy
import random

import numpy as np
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

import senet
from helpers.images import maps
from senet.ops.csrc import build

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2**-5}


class Gate(nn.Module):
    """A gate as other libraries write it; its values are far from constant."""

    def __init__(self, channels=16, hidden=4):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.delta, self.sigma = nn.ReLU(), nn.Sigmoid()
        for layer in (self.reduce, self.expand):
            nn.init.normal_(layer.weight)

    def excitation(self, z):
        """(N, C, 1, 1) → the logits of the gate."""
        return self.expand(self.delta(self.reduce(z)))

    def forward(self, x):
        return x * self.sigma(self.excitation(x.mean((2, 3), keepdim=True)))


class Block(nn.Module):
    """relu(SE(BN(convolution(x))) + x), with statistics that are not those of a fresh norm."""

    def __init__(self, channels=16, kernel=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.norm, self.se = nn.BatchNorm2d(channels), Gate(channels)
        nn.init.uniform_(self.norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x):
        return F.relu(self.se(self.norm(self.conv(x))) + x)


class Body(nn.Module):
    """A stem, a block and the average; tests write another ``forward`` around them."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 3, padding=1), Block()

    def body(self, x):
        return self.block(self.stem(x)).mean((2, 3))

    def forward(self, x):
        return self.body(x)


def in_sweeps():
    """Ask for the training sweeps also on maps so small that ordinary operations are as fast."""
    return contextlib.nullcontext() if build.compiler() is None else senet.use_backend("native")


def tensors(value):
    """The tensors in a value, and everything about it but their numbers: types of containers, keys, shapes, dtypes."""
    leaves, structure = tree_flatten(value)
    kinds = [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], (structure, kinds)


def assert_close(mine, expected, tolerance=None):
    """The same containers, shapes, and dtypes; tensors agree relative to the largest expected number."""
    (mine, form), (expected, wanted) = tensors(mine), tensors(expected)
    assert form == wanted
    for a, b in zip(mine, expected, strict=True):
        bound = tolerance or TOLERANCES.get(b.dtype, 0)
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= bound * b.abs().max() if b.numel() else a.numel() == 0


def seeded():
    """All random numbers from the start again."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


def outputs(net, *inputs, calls=1):
    """What several calls without gradients return."""
    seeded()
    with torch.no_grad():
        return [net(*inputs) for _ in range(calls)]


def step(net, *inputs, calls=1):
    """What several calls return, and the gradients and buffers after them."""
    seeded()
    net.zero_grad()
    results = [net(*inputs) for _ in range(calls)]
    loss = sum(t.square().sum() for t in tensors(results)[0] if t.requires_grad)
    if isinstance(loss, torch.Tensor):
        loss.backward()
    results = [result.detach() for result in tensors(results)[0]]
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return results, gradients, dict(net.named_buffers())


def assert_same_gradients(mine, expected, tolerance):
    """The same parameters have gradients; they agree relative to the largest one: some are zero but for rounding."""
    assert {name for name, g in mine.items() if g is None} == {name for name, g in expected.items() if g is None}
    largest = max((g.abs().max() for g in expected.values() if g is not None), default=0)
    for name, gradient in expected.items():
        if gradient is not None:
            assert (mine[name] - gradient).abs().max() <= tolerance * largest, name


def assert_same_in_eval(model, *inputs, calls=1, dtype=torch.float32):
    """The accelerated copy of a network returns what the network returns; the copy."""
    model = model.to(dtype).eval()
    fast = senet.accelerate(model)
    fresh = copy.deepcopy(model)
    assert_close(outputs(fast, *inputs, calls=calls), outputs(fresh, *inputs, calls=calls))
    return fast


def assert_same_in_training(model, *inputs, calls=1, dtype=torch.float64):
    """The accelerated copy of a network trains as the network does: outputs, gradients, and buffers; the copy."""
    model = model.to(dtype).train()
    fast = senet.accelerate(model)
    fresh = copy.deepcopy(model)
    with in_sweeps():
        (mine, gradients, buffers) = step(fast, *inputs, calls=calls)
    (expected, wanted, kept) = step(fresh, *inputs, calls=calls)
    assert_close(mine, expected)
    assert_same_gradients(gradients, wanted, TOLERANCES[dtype])
    assert_close(buffers, kept)
    return fast


def assert_same(make, *inputs, calls=1):
    """Both: ``make`` gives the network, ``inputs`` are in float32."""
    torch.manual_seed(0)
    assert_same_in_eval(make(), *inputs, calls=calls)
    torch.manual_seed(0)
    as_double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    assert_same_in_training(make(), *as_double, calls=calls)


def image(*shape, seed=0):
    """A small batch of images."""
    return maps(*(shape or (2, 3, 9, 9)), seed=seed)


def captures():
    """How many graphs have been captured in this process so far."""
    return counters["stats"]["unique_graphs"]
