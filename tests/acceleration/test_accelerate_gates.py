"""``senet.accelerate``: gates as many write them, what only looks like one, and maps that others read."""

import pytest
import torch
from torch import nn

import senet
from helpers.accelerated import in_sweeps, step
from helpers.acceleration import report_of
from helpers.images import images
from helpers.networks import relative
from senet.acceleration.fold import ALONE, LATE, PROJECTED
from senet.ops import reference
from senet.ops.conv import early_gate


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_what_stands_between_the_fully_connected_layers(activation):
    generator = torch.Generator().manual_seed(0)
    w1, b1, w2 = (torch.randn(*size, generator=generator) for size in ((5, 12), (5,), (12, 5)))
    x = torch.randn(3, 12, 5, 7, generator=generator)
    gate = early_gate.gate_of(x, reference.FullyConnected(w1, b1, w2, None, "hard_sigmoid", activation), "native")
    delta = {"relu": nn.ReLU(), "silu": nn.SiLU(), "hardswish": nn.Hardswish()}[activation]
    expected = nn.functional.hardsigmoid(delta(x.mean((2, 3)) @ w1.t() + b1) @ w2.t())
    torch.testing.assert_close(gate, expected, rtol=1e-5, atol=1e-6)


class Block(nn.Module):
    """SE as many write it: linear layers, a flattened average."""

    def __init__(self, scaled=1.0, last=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.se = Gate(scaled, last)

    def forward(self, x):
        return self.se(self.norm(self.conv(x))).mean((2, 3))


class Gate(nn.Module):
    def __init__(self, scaled, last):
        super().__init__()
        self.pool, self.squeeze, self.act = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2), nn.ReLU(inplace=True)
        self.expand, self.gate, self.scaled = nn.Linear(2, 8, bias=False), last or nn.Sigmoid(), scaled

    def forward(self, x):
        z = self.expand(self.act(self.squeeze(self.pool(x).flatten(1))))
        y = x if self.scaled == 1 else x * self.scaled
        return y * self.gate(z).view(x.shape[0], -1, 1, 1)


def test_a_gate_of_ones_own_is_known_by_what_it_computes():
    torch.manual_seed(0)
    model, x = Block().double().eval(), images()
    nn.init.zeros_(model.se.expand.weight)  # agrees with any activation, as long as it is not probed with other weights
    fast = senet.accelerate(model, "reference")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
    assert fast.acceleration.inference == {"se": LATE}
    fast.train()
    model.train()
    with in_sweeps():
        _, got, _ = step(fast, x)
    for key, gradient in step(model, x)[1].items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
    assert "se" in fast.acceleration.training


@pytest.mark.parametrize("model", [Block(scaled=3.0), Block(last=nn.Softplus())])
def test_what_only_looks_like_a_gate_is_left_and_listed(model):
    model = model.double().eval()
    fast = senet.accelerate(model, "reference")
    with torch.no_grad():
        torch.testing.assert_close(fast(images()), model(images()), rtol=1e-12, atol=1e-12)
    assert fast.acceleration.inference == {}
    assert set(fast.acceleration.left) == {"se"}


def test_a_gate_that_somebody_else_reads_before_is_not_applied_in_place():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.se = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), senet.SqueezeExcite(8)

        def forward(self, x):
            u = torch.relu(self.a(x))
            return self.b(self.se(u)) + u

    torch.manual_seed(0)
    model, x = Twice().eval(), images(dtype=torch.float32)
    fast = senet.accelerate(model)
    with torch.no_grad():
        assert relative(fast(x), model(x)) < 1e-5
    assert fast.acceleration.inference["se"] in (PROJECTED, ALONE)
    alone = senet.accelerate(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), senet.SqueezeExcite(8)).eval())
    assert report_of(alone, x).inference == {"2": ALONE}


@pytest.mark.parametrize("se", [True, False])
def test_a_map_of_which_a_view_is_kept_is_not_overwritten(se):
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.se = senet.SqueezeExcite(8) if se else nn.Identity()

        def forward(self, x):
            u = torch.relu(self.a(x))
            half = u[:, :4]
            return (self.b(self.se(u)) if se else self.b(u) + u).sum((2, 3))[:, :4] + half.sum((2, 3))

    torch.manual_seed(0)
    model, x = View().eval(), images(dtype=torch.float32)
    with torch.no_grad():
        assert relative(senet.accelerate(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("se", [True, False])
def test_a_sum_that_broadcasts(se):
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, stride=2)
            self.se = senet.SqueezeExcite(8) if se else nn.Identity()

        def forward(self, x):
            pooled = self.a(x).amax((2, 3), keepdim=True) if se else self.a(x[:, :, :1, :1])
            return torch.relu(self.se(self.b(x)) + pooled)

    torch.manual_seed(0)
    model, x = Broadcast().eval(), images(dtype=torch.float32)
    with torch.no_grad():
        assert relative(senet.accelerate(model)(x), model(x)) < 1e-5
        assert relative(senet.accelerate(model)(x[:, :, :3, :3]), model(x[:, :, :3, :3])) < 1e-5
