"""Fig. 5 of the paper: where SE stands in a residual unit, written out by hand."""

import pytest
import torch
from torch.nn import functional as F

from senet import SEConfig
from senet.models.cifar import PreActBottleneck
from senet.models.resnet import BasicBlock, Bottleneck, conv_norm

PLACEMENTS = ("standard", "pre", "post", "identity", "3x3")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_basic_block_by_placement(placement):
    block = BasicBlock(8, 16, 2, 2, SEConfig(reduction=2, placement=placement), conv_norm(8, 16, 1, 2)).double().eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    at = places(block.se, placement)
    h = at["3x3"](block.bn1(F.conv2d(at["pre"](x), block.conv1.weight, stride=2, padding=1)))
    y = at["standard"](block.bn2(F.conv2d(F.relu(h), block.conv2.weight, padding=1)))
    expected = at["post"](F.relu(y + at["identity"](block.downsample(x))))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_pre_activation_bottleneck_by_placement(placement, stride):
    block = PreActBottleneck(16, 4, stride, 2, SEConfig(reduction=2, placement=placement)).double().eval()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    at = places(block.se, placement)
    first = F.relu(block.bn1(x))
    h = F.relu(block.bn2(F.conv2d(at["pre"](first), block.conv1.weight)))
    h = F.relu(block.bn3(at["3x3"](F.conv2d(h, block.conv2.weight, stride=stride, padding=1))))
    shortcut = x if stride == 1 else F.conv2d(first, block.downsample.weight, stride=2)
    expected = at["post"](at["standard"](F.conv2d(h, block.conv3.weight)) + at["identity"](shortcut))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def places(se, placement):
    """For each place of Fig. 5: the gate or nothing."""
    return {place: se if place == placement else (lambda x: x) for place in PLACEMENTS}


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
