"""The CIFAR networks: ResNet-20…110, pre-activation ResNet-164, and WRN-16-8, plain and with SE (Tables 4 and 5).

The SE paper says only that SE is placed "as in section 3.3", and gives no reduction ratio. Here, SE ends the residual
branch, and r is the paper's default of 16, which leaves 1, 2, and 4 bottleneck channels in ResNet-20…110.
"""

import functools
from collections.abc import Iterable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.base import FIRST_STAGE, ConvNet, ResidualBlock, make_stage
from senet.models.registry import register_model
from senet.models.resnet import BasicBlock
from senet.nn.squeeze_excite import SEConfig


class PadShortcut(nn.Module):
    """The parameter-free shortcut of He et al. for CIFAR (option A): subsample, then append zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return f"extra={self.extra}, stride={self.stride}"


class PreActBasic(ResidualBlock):
    """Pre-activation block with two 3×3 convolutions (arXiv 1603.05027, in the form that wide ResNets use).

    If the shape changes, the first norm and activation also feed the shortcut, which is a 1×1 convolution. SE ends the
    branch, before the addition. With placement ``"pre"``, SE follows the first norm and activation; with ``"3x3"``, it
    follows the first convolution.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, planes: int, stride: int, stage: int, se: SEConfig | None) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU()
        self._add_convolutions(in_channels, planes, stride)
        projects = stride != 1 or in_channels != out_channels
        self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if projects else None
        self.add_gate(se, stage, branch=out_channels, inside=planes, entry=in_channels)

    def _add_convolutions(self, in_channels: int, planes: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)

    def branch(self, h: Tensor) -> Tensor:
        """The layers after the first activation, up to the last convolution."""
        h = self.at("3x3", self.conv1(h))
        return self.conv2(self.act2(self.bn2(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(h)
        h = self.at("standard", self.branch(self.at("pre", h))) + self.at("identity", shortcut)
        return self.at("post", h)


class PreActBottleneck(PreActBasic):
    """Pre-activation block with 1×1, 3×3, and 1×1 convolutions; the 3×3 has the stride."""

    expansion: ClassVar[int] = 4

    def _add_convolutions(self, in_channels: int, planes: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.act3 = nn.ReLU()
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)

    def branch(self, h: Tensor) -> Tensor:
        h = self.act2(self.bn2(self.conv1(h)))
        h = self.at("3x3", self.conv2(h))
        return self.conv3(self.act3(self.bn3(h)))


class CifarResNet(ConvNet):
    """A network for small images: a 3×3 convolution and three stages with strides 1, 2, and 4.

    Args:
        block: ``BasicBlock`` (ResNet-20…110), ``PreActBasic``, or ``PreActBottleneck``.
        blocks: residual blocks per stage.
        width: width factor; the first stage has ``16 * width`` planes.
        se: None for the plain network.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[PreActBasic],
        blocks: int,
        width: int = 1,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: SEConfig | None = None,
        drop_rate: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, features_only)
        self.pre_activation = issubclass(block, PreActBasic)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        if not self.pre_activation:
            self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        outputs = [16 * width * 2**index * block.expansion for index in range(3)]
        for index, out_channels in enumerate(outputs):
            planes = out_channels // block.expansion
            make = functools.partial(_block, block, planes=planes, stage=index + FIRST_STAGE, se=se)
            stride = 1 if index == 0 else 2
            self.add_module(f"layer{index + 1}", make_stage(make, channels, out_channels, blocks, stride))
            channels = out_channels
        if self.pre_activation:
            self.norm = nn.BatchNorm2d(channels)
        self.finish_build(tuple(outputs), (1, 2, 4))

    def stem(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x if self.pre_activation else self.relu(self.bn1(x))

    def stages(self) -> Iterable[nn.Module]:
        return (self.layer1, self.layer2, self.layer3)

    def finish(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(x)) if self.pre_activation else x


def _block(
    block: type[BasicBlock] | type[PreActBasic],
    in_channels: int,
    *,
    planes: int,
    stride: int,
    stage: int,
    se: SEConfig | None,
) -> nn.Module:
    if issubclass(block, PreActBasic):
        return block(in_channels, planes, stride, stage, se)
    shortcut = PadShortcut(in_channels, planes, stride) if stride != 1 or in_channels != planes else None
    return block(in_channels, planes, stride, stage, se, shortcut)


def _register() -> None:
    for depth in (8, 14, 20, 32, 44, 56, 110):
        build = functools.partial(CifarResNet, BasicBlock, (depth - 2) // 6)
        register_model(f"resnet{depth}", build, family="cifar", input_size=32, stride="first 3×3", recipe="cifar")
    build = functools.partial(CifarResNet, PreActBottleneck, (164 - 2) // 9)
    register_model("preresnet164", build, family="cifar", input_size=32, stride="3×3", recipe="cifar")
    build = functools.partial(CifarResNet, PreActBasic, (16 - 4) // 6, 8)
    register_model("wrn16_8", build, family="cifar", input_size=32, stride="first 3×3", recipe="cifar_wrn")


_register()
