"""Fig. 5 of the paper: where SE stands in a residual unit, written out by hand for the tail and for whole blocks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from senet import ResidualTail, SEConfig, SqueezeExcite
from senet.models.resnet import BasicBlock, Bottleneck, conv_norm

PLACEMENTS = ("standard", "pre", "post", "identity", "3x3")


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tail_by_placement(placement, activation):
    tail = ResidualTail(placement, activation)
    norm, se = nn.BatchNorm2d(8).double(), SqueezeExcite(8, SEConfig(reduction=2)).double()
    u, shortcut = torch.randn(2, 2, 8, 5, 5, dtype=torch.float64)
    y, act = norm(u), (torch.relu if activation else lambda x: x)
    expected = {
        "standard": lambda: act(se(y) + shortcut),
        "identity": lambda: act(y + se(shortcut)),
        "post": lambda: se(act(y + shortcut)),
        "pre": lambda: act(y + shortcut),  # the block has used the gate before
        "3x3": lambda: act(y + shortcut),
    }[placement]()
    torch.testing.assert_close(tail(u, norm, se, shortcut), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tail(u, norm, None, shortcut), act(y + shortcut), rtol=1e-12, atol=1e-12)


def test_tail_owns_nothing_and_sees_a_replaced_norm():
    block = BasicBlock(8, 8, 1, 2, SEConfig(reduction=2), None)
    keys = set(block.state_dict())
    assert not any(key.startswith("tail") for key in keys)
    assert list(ResidualTail().parameters()) == []
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)).eval()
    assert isinstance(converted.bn2, nn.SyncBatchNorm)
    assert set(converted.state_dict()) == keys
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(converted(x), block.eval()(x))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bottleneck_by_placement(placement):
    config = SEConfig(reduction=2, placement=placement)
    shapes = {"width": 6, "first_width": 6, "groups": 1, "stride_in_1x1": False}
    block = Bottleneck(8, 4, 2, 2, config, conv_norm(8, 16, 1, 2), **shapes).double().eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    se, shortcut = block.se, block.downsample(x)

    h = se(x) if placement == "pre" else x
    h = F.relu(block.bn1(F.conv2d(h, block.conv1.weight)))
    h = block.bn2(F.conv2d(h, block.conv2.weight, stride=2, padding=1))
    h = F.relu(se(h) if placement == "3x3" else h)
    y = block.bn3(F.conv2d(h, block.conv3.weight))
    if placement == "standard":
        y = se(y)
    if placement == "identity":
        shortcut = se(shortcut)
    expected = F.relu(y + shortcut)
    if placement == "post":
        expected = se(expected)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    assert se.channels == {"pre": 8, "3x3": 6}.get(placement, 16)
