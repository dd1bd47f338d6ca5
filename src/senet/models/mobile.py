"""MobileNet-v1 (arXiv 1704.04861) and ShuffleNet-v1 (arXiv 1707.01083), plain and with SE (Table 3).

The SE paper says only that they are "constructed by following similar schemes". The gates are placed such that the
parameters and multiply-adds match the paper, whose counts include the gates' pooling. See ``SeparableConv`` and
``ShuffleUnit``.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from senet.models.base import FIRST_STAGE, ConvNet, ResidualBlock, make_gate, make_stage
from senet.models.registry import register_model
from senet.nn.squeeze_excite import SEConfig


class SeparableConv(nn.Module):
    """A depthwise 3×3 and a pointwise convolution, each with norm and ReLU6, with timm's keys.

    SE follows the activation of the pointwise convolution, as in VGG-16, the paper's other network without shortcuts.
    With r = 16, this adds 0.48 M weights (4.23 M → 4.71 M; published: 4.2 M → 4.7 M) and, including the pooling,
    3.2 M multiply-adds (569 M → 572 M, as published).

    Args:
        in_channels, out_channels: channels of the input and of the output.
        stride: stride of the depthwise convolution.
        stage: the stage number, for ``SEConfig.stages``; the first is 2.
        se: None for the plain unit.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, stage: int, se: SEConfig | None) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU6()
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU6()
        self.se = make_gate(out_channels, se, stage)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv_dw(x)))
        h = self.act2(self.bn2(self.conv_pw(h)))
        return h if self.se is None else self.se(h)


class MobileNetV1(ConvNet):
    """MobileNet-v1 at width 1: 13 separable convolutions in five stages with strides 2, 4, 8, 16, and 32.

    The activation is ReLU6, as in the authors' TensorFlow code and in timm; their paper says ReLU. Keys are those of
    timm's ``mobilenetv1_100``, whose weights load unchanged.

    Args:
        channels: channels of the five stages.
        units: separable convolutions per stage.
        se: None for the plain network.
    """

    head_name = "classifier"

    def __init__(
        self,
        channels: tuple[int, ...],
        units: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: SEConfig | None = None,
        drop_rate: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, features_only)
        self.conv_stem = nn.Conv2d(in_chans, 32, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.act = nn.ReLU6()
        width, stages = 32, []
        for index, (out_channels, count) in enumerate(zip(channels, units, strict=True)):
            unit = functools.partial(SeparableConv, out_channels=out_channels, stage=index + FIRST_STAGE, se=se)
            stages.append(make_stage(unit, width, out_channels, count, 1 if index == 0 else 2))
            width = out_channels
        self.blocks = nn.Sequential(*stages)
        self.finish_build(channels, (2, 4, 8, 16, 32))

    def stem(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv_stem(x)))

    def stages(self) -> Iterable[nn.Module]:
        return self.blocks


class ShuffleUnit(ResidualBlock):
    """Grouped 1×1, channel shuffle, depthwise 3×3, and grouped 1×1, with a shortcut (Fig. 2 of the ShuffleNet paper).

    With stride 2, the shortcut is a 3×3 average pooling, and the outputs are concatenated instead of added.

    SE is on the branch, after its last norm. With r = 16, this adds 0.61 M weights and, including the pooling, 2.2 M
    multiply-adds. The published weights, 1.8 M → 2.4 M, match 1.866 M → 2.477 M truncated; with SE after the
    concatenation or addition, it would be 2.586 M. The published multiply-adds are 140 M → 142 M; 140 M is a round
    figure for all networks of width 1 in the ShuffleNet paper, and this one has 137.5 M. The other placements are the
    same as in a residual block; with stride 2, ``"post"`` follows the concatenation and ``"identity"`` the pooling.

    Args:
        in_channels, out_channels: channels of the unit. With stride 2, the branch computes the difference.
        stride: stride of the depthwise convolution; 1 requires ``in_channels == out_channels``.
        stage: the stage number in the paper, for ``SEConfig.stages``.
        se: None for the plain unit.
        groups: groups of both 1×1 convolutions and of the shuffle.
        first_groups: groups of the first 1×1; 1 in the first unit of the network, whose input is narrow.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        stage: int,
        se: SEConfig | None,
        groups: int,
        first_groups: int,
    ) -> None:
        super().__init__()
        self.adds = stride == 1
        inside = out_channels // 4
        branch = out_channels if self.adds else out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, inside, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.act1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, padding=1, groups=inside, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.act2 = nn.ReLU()
        self.pool = nn.Identity() if self.adds else nn.AvgPool2d(3, stride, padding=1)
        placement = "standard" if se is None else se.placement
        end = {"post": out_channels, "identity": in_channels}.get(placement, branch)
        self.add_gate(se, stage, branch=end, inside=inside, entry=in_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.at("identity", self.pool(x))
        h = self.shuffle(self.act1(self.bn1(self.conv1(self.at("pre", x)))))
        h = self.at("3x3", self.bn2(self.conv2(h)))
        h = self.at("standard", self.bn3(self.conv3(h)))
        # The pooled half needs no ReLU: it is never negative.
        out = self.act2(h + shortcut) if self.adds else torch.cat((shortcut, self.act2(h)), dim=1)
        return self.at("post", out)


class ShuffleNetV1(ConvNet):
    """ShuffleNet-v1 at width 1 with three groups. Stages 2, 3, and 4 have strides 8, 16, and 32.

    Args:
        groups: groups of the 1×1 convolutions.
        channels: channels of the three stages, which depend on ``groups`` (Table 1 of the ShuffleNet paper).
        se: None for the plain network.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        groups: int,
        channels: tuple[int, int, int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: SEConfig | None = None,
        drop_rate: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, features_only)
        width = 24
        self.conv1 = nn.Conv2d(in_chans, width, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        for index, (out_channels, units) in enumerate(zip(channels, (4, 8, 4), strict=True)):
            unit = functools.partial(_unit, out_channels=out_channels, stage=index + FIRST_STAGE, se=se, groups=groups)
            self.add_module(f"layer{index + 1}", make_stage(unit, width, out_channels, units, 2))
            width = out_channels
        self.finish_build(channels, (8, 16, 32))

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def stages(self) -> Iterable[nn.Module]:
        return (self.layer1, self.layer2, self.layer3)


def _unit(
    in_channels: int, *, out_channels: int, stride: int, stage: int, se: SEConfig | None, groups: int
) -> ShuffleUnit:
    first_groups = 1 if stage == FIRST_STAGE and stride == 2 else groups
    return ShuffleUnit(in_channels, out_channels, stride, stage, se, groups, first_groups)


def _register() -> None:
    mobile = functools.partial(MobileNetV1, (64, 128, 256, 512, 1024), (1, 2, 2, 6, 2))
    register_model("mobilenet_v1", mobile, family="mobilenet", stride="depthwise 3×3")
    shuffle = functools.partial(ShuffleNetV1, 3, (240, 480, 960))
    register_model("shufflenet_v1_g3", shuffle, family="shufflenet", stride="depthwise 3×3")


_register()
