"""Further arguments of a gate or of a norm are other operations: they count, or the gate is left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import senet
from helpers.accelerated import Gate, assert_close, assert_same, image, outputs


class Masked(Gate):
    """The squeeze is the average over valid positions, as in speech and board games."""

    def forward(self, x, mask=None):
        if mask is None:
            return super().forward(x)
        mean = (x * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)
        return x * self.sigma(self.excitation(mean))


class Scaled(Gate):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Tempered(Gate):
    """The gate function is softened: sigmoid(z / temperature)."""

    def forward(self, x, temperature=1.0):
        return x * self.sigma(self.excitation(x.mean((2, 3), keepdim=True)) / temperature)


class Guided(Gate):
    """The gate is computed from another map than the one it multiplies."""

    def forward(self, x, guide=None):
        guide = x if guide is None else guide
        return x * self.sigma(self.excitation(guide.mean((2, 3), keepdim=True)))


class Around(nn.Module):
    """convolution → norm → gate with whatever else the gate is given."""

    def __init__(self, gate, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm, self.se = nn.Conv2d(3, 16, 3, padding=1), norm(16), gate(16)

    def forward(self, x, *more):
        return F.relu(self.se(self.norm(self.conv(x)), *more))


def half_a_mask(x):
    """The right half of each image is padding, with large numbers in it."""
    x[:, :, 4:] += 9
    mask = torch.zeros(2, 1, 9, 9)
    mask[:, :, :4] = 1
    return mask


def test_a_masked_squeeze():
    x = image()
    mask = half_a_mask(x)
    model = Around(Masked).eval()
    with torch.no_grad():
        assert not torch.allclose(model(x, mask), model(x), rtol=1e-2)  # else the mask would prove nothing
    assert_same(lambda: Around(Masked), x, mask)


def test_one_gate_with_and_without_its_mask():
    x = image()
    mask = half_a_mask(x)
    torch.manual_seed(0)
    model = Around(Masked).eval()
    fast = senet.accelerate(model)
    for more in ((), (mask,), (), (1 - mask,)):
        assert_close(outputs(fast, x, *more), outputs(model, x, *more))


@pytest.mark.parametrize("gate", [Scaled, Tempered], ids=lambda gate: gate.__name__)
def test_a_number_that_changes_the_gate(gate):
    assert_same(lambda: Around(gate), image(), 0.5)
    torch.manual_seed(0)
    model = Around(gate).eval()
    fast = senet.accelerate(model)
    for number in (2.0, 0.25, 1.0, 3.0):
        assert_close(outputs(fast, image(), number), outputs(model, image(), number))


def test_a_gate_of_another_map():
    assert_same(lambda: Around(Guided), image(), image(2, 16, 5, 5, seed=1))


def test_a_gate_with_an_argument_behind_a_convolution_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.se = nn.Conv2d(3, 16, 3), Scaled()

        def forward(self, x):
            return self.se(F.silu(self.conv(x)), 0.5)

    assert_same(Net, image())
    assert_same(Net, image(1, 3, 9, 9))


class Shifted(nn.BatchNorm2d):
    """A norm with an argument, as conditional and domain-specific norms have."""

    def forward(self, x, shift=0.0):
        return super().forward(x) + shift


def test_an_argument_of_a_norm():
    class Net(Around):
        def forward(self, x, shift):
            return F.relu(self.se(self.norm(self.conv(x), shift)))

    assert_same(lambda: Net(Gate, Shifted), image(), image(2, 16, 1, 1, seed=1))


def test_a_gate_that_is_recognized_is_still_listed_beside_one_that_is_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.masked = Around(Gate), Around(Masked)

        def forward(self, x, mask):
            return self.plain(x) + self.masked(x, mask)

    x = image()
    mask = half_a_mask(x)
    model = Net().eval()
    fast = senet.accelerate(model)
    assert_close(outputs(fast, x, mask), outputs(model, x, mask))
    assert "plain.se" in fast.acceleration.inference
