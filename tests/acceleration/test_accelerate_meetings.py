"""Networks whose parts meet in unusual ways: other types, shared norms, images that are joined."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import senet
from helpers.accelerated import assert_same as assert_same_in_both_modes
from helpers.acceleration import batch_sizes
from helpers.images import maps
from senet.acceleration.fold import ALONE


def assert_same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_autocast_with_a_convolution_that_is_not_folded():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 8, 1), senet.SqueezeExcite(8)
    ).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = senet.accelerate(model)(maps()), model(maps())
    assert got.dtype == expected.dtype == torch.bfloat16
    assert_same(got, expected, 2**-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_gate_of_maps_of_another_type(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(senet.SqueezeExcite(16)).eval()
    fast, x = senet.accelerate(model), maps(2, 16, 5, 4).to(dtype)
    with torch.no_grad():
        fast(x)
        assert fast.acceleration.inference == {"0": ALONE}
        assert_same(fast(x), model(x), 1e-3 if dtype == torch.float16 else 1e-6)  # its layers are in float32
        for network in (model, fast):
            with pytest.raises(ValueError, match="16"):  # as the gate says itself
                network(maps(2, 15, 5, 4))


@pytest.mark.parametrize("gated", [True, False])
def test_a_sum_of_two_types(gated):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.conv = nn.MaxPool2d(1), nn.Conv2d(3, 3, 1)
            self.se = senet.SqueezeExcite(3) if gated else nn.Identity()

        def forward(self, x):
            return self.se(self.conv(x)) + self.pool(x.float())

    torch.manual_seed(0)
    model, x = Mixed().eval().bfloat16(), maps().bfloat16()
    with torch.no_grad():
        got, expected = senet.accelerate(model)(x), model(x)
    assert got.dtype == expected.dtype == torch.float32
    assert_same(got, expected, 2**-6)


def test_a_norm_that_stands_in_two_places():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn, self.se = (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(8, 8, 1),
                nn.BatchNorm2d(8),
                senet.SqueezeExcite(8),
            )

        def forward(self, x):
            u = self.a(x)
            return self.se(self.bn(self.b(F.relu(self.se(self.bn(u)) + u))))

    torch.manual_seed(0)
    model = Shared().train()
    fast = senet.accelerate(model)
    with senet.use_backend("native"):
        assert_same(fast(maps()), model(maps()))


class Frames(nn.Module):
    """Frames of a video stand in the batch, four to a clip."""

    def __init__(self):
        super().__init__()
        self.conv, self.se = nn.Conv2d(3, 32, 3, padding=1), senet.SqueezeExcite(32)

    def forward(self, x):
        y = F.relu(self.conv(x))
        n, c, h, w = y.size()
        return self.se(y.view(n // 4, 4, c, h, w).roll(1, 1).view(n, c, h, w))


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.se = nn.Conv2d(3, 32, 3, padding=1), senet.SqueezeExcite(32)
        self.bn = nn.BatchNorm2d(32, track_running_stats=False)

    def forward(self, x):
        return self.se(F.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("network", [Frames, Centred])
def test_networks_that_join_images_are_not_run_in_parts(network, monkeypatch):
    torch.manual_seed(0)
    model = network().eval()
    fast = senet.accelerate(model)
    x = maps(4, 3, 72, 72).repeat(4, 1, 1, 1) * torch.arange(1, 17).view(-1, 1, 1, 1)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert_same(fast(x), model(x), 1e-4)
        assert torch.equal(state, torch.get_rng_state())
        sizes = batch_sizes(monkeypatch)
        fast(x)
    assert all(size == 16 for size in sizes)


class Fused(nn.Module):
    """Sums of more than two branches, as multi-resolution networks have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(5))

    def branch(self, index, x):
        return self.norms[index](self.convs[index](x))

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.branch(0, 0.5 * x) + x + self.branch(1, 0.25 * x)
        z = self.branch(2, 0.5 * x) + self.branch(3, x) + 0.25 * x + y
        return F.relu(y), F.relu(z), self.branch(4, x) + x + 0.5 * x


def test_sums_of_more_than_two_branches():
    assert_same_in_both_modes(Fused, maps())
