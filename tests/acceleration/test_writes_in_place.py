"""Writes in place, onto maps that others read, keep, or return, and onto the caller's own image."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import senet
from helpers.accelerated import Block, Body, assert_close, assert_same, assert_same_in_eval, image, outputs


class AddedToAKeptMap(Body):
    def forward(self, x):
        x = self.stem(x)
        kept = [x]
        x += self.block.se(self.block.norm(self.block.conv(x + 0)))
        return torch.cat([*kept, x], 1)


class AddedToWhatTheConvolutionRead(Body):
    """Only without gradients: the convolution keeps its input for the backward pass."""

    def forward(self, x):
        x = self.stem(x)
        kept = [x]
        x += self.block.se(self.block.norm(self.block.conv(x)))
        return torch.cat([*kept, x], 1)


class ReluOverAKeptMap(Body):
    def forward(self, x):
        x = self.stem(x)
        y = F.relu_(x)
        return self.block(y) + x


class ReluModuleOverAShortcut(Body):
    """The shortcut is read after its ReLU wrote over it."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.stem(x)
        return self.block(self.relu(x)) - 2 * x


class WrittenThroughAView(Body):
    def forward(self, x):
        x = self.stem(x) + 0
        half = x[:, :8]
        y = self.block(x + 0)
        half.mul_(3)
        return y + x


class WrittenUnderAView(Body):
    """A view of the gated map, read after the map was written."""

    def forward(self, x):
        x = self.stem(x)
        y = self.block.se(self.block.norm(self.block.conv(x)))
        first = y[:, 0]
        y = y.add_(x) if not y.requires_grad else y + 0 * x
        return y, first.clone()


class WrittenByIndex(Body):
    def forward(self, x):
        x = self.stem(x) + 0
        y = self.block(x + 0) + 0
        y[:, 1] = x[:, 0]
        x[:, :, 0] = 0
        return y + x


class WrittenBetweenSqueezeAndProduct(Body):
    """The gate is that of the map as it was; the product that of the map as it is."""

    def forward(self, x):
        u = self.block.norm(self.block.conv(self.stem(x)))
        se = self.block.se
        gate = se.sigma(se.excitation(u.mean((2, 3), keepdim=True)))
        u = u.clone()
        u.clamp_(-0.5, 0.5)
        return u * gate


class GatedInPlace(Body):
    def forward(self, x):
        u = self.block.norm(self.block.conv(self.stem(x)))
        se = self.block.se
        before = u + 0
        u = u + 0
        u *= se.sigma(se.excitation(u.mean((2, 3), keepdim=True)))
        return F.relu(u) + before


class WithOut(Body):
    """A result that is written into a buffer of the caller's choice; without gradients only."""

    def forward(self, x):
        y = self.block(self.stem(x))
        place = torch.empty_like(y)
        if torch.is_grad_enabled():
            return y * 2
        torch.mul(y, 2, out=place)
        return place


NETWORKS = [
    *(AddedToAKeptMap, ReluOverAKeptMap, ReluModuleOverAShortcut, WrittenThroughAView, WrittenUnderAView),
    *(WrittenByIndex, WrittenBetweenSqueezeAndProduct, GatedInPlace, WithOut),
]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_maps_are_as_the_ordinary_network_has_them(network):
    assert_same(network, image())


def test_a_sum_over_the_input_of_its_own_convolution():
    assert_same_in_eval(AddedToWhatTheConvolutionRead(), image())


class OntoTheImage(Body):
    def forward(self, x):
        x.sub_(0.5)
        return self.body(x)


class ReluFirst(nn.Module):
    """A block that starts with a ReLU in place, as blocks with pre-activation may."""

    def __init__(self):
        super().__init__()
        self.relu, self.block = nn.ReLU(inplace=True), Block(16, kernel=1)

    def forward(self, x):
        return self.block(self.relu(x))


class LastBlock(nn.Module):
    """The shortcut is the caller's map, which must stay as it is."""

    def __init__(self):
        super().__init__()
        self.block = Block(16, kernel=1)

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", [OntoTheImage, ReluFirst, LastBlock, Body], ids=lambda network: network.__name__)
def test_the_callers_image_is_written_where_the_network_writes_it(network, channels_last):
    torch.manual_seed(0)
    model = network().eval()
    fast = senet.accelerate(model)
    x = image() if isinstance(model, Body) else image(2, 16, 9, 9)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for _ in range(2):
        mine, theirs = x.clone(), x.clone()
        assert_close(outputs(fast, mine), outputs(model, theirs))
        assert torch.equal(mine, theirs)


class Several(Body):
    def forward(self, x):
        x = self.stem(x)
        y = self.block(x)
        return [x, y, F.relu(y - x)]


def test_what_a_call_returned_stays_as_it_was():
    torch.manual_seed(0)
    fast = senet.accelerate(Several().eval())
    (first,) = outputs(fast, image())
    kept = copy.deepcopy(first)
    for seed in (1, 2):
        outputs(fast, image(seed=seed))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    for tensor in first:
        tensor.zero_()  # the caller's to write
    assert_close(outputs(fast, image()), [kept], 1e-6)


class Aliased(Body):
    """A map and a view of it are returned: who writes the one changes the other."""

    def forward(self, x):
        y = self.block(self.stem(x))
        return y, y[:, :4]


def test_outputs_that_share_memory_still_do():
    torch.manual_seed(0)
    for net in (model := Aliased().eval(), senet.accelerate(model)):
        ((whole, part),) = outputs(net, image())
        whole.fill_(7)
        assert (part == 7).all()
