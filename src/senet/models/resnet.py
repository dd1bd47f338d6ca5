"""ResNet, ResNeXt, and SENet-154, plain and with SE, with the parameter names of timm and torchvision.

SE-ResNet and SE-ResNeXt: Table 1 of the paper. SENet-154: section 5.4 and the appendix.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from senet.errors import InputError
from senet.models.base import FIRST_STAGE, ConvNet, ResidualBlock, make_stage
from senet.models.registry import register_model
from senet.nn.squeeze_excite import SEConfig

# timm rounds the bottleneck to multiples of 8, so its weights need the same. This changes only the 64 channels of
# ResNet-18 and -34 (8 instead of 4), which the paper does not cover.
TIMM_SE = SEConfig(divisor=8)
CEIL_POOL_MIN = 3  # after the stem's stride of 2, Caffe's pooling needs at least 2 pixels


def conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A projection shortcut: convolution and batch norm, without an activation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(ResidualBlock):
    """Two 3×3 convolutions and a shortcut. With placement ``"3x3"``, SE follows the first convolution.

    Args:
        in_channels, planes: channels of the input and of both convolutions.
        stride: stride of the first convolution.
        stage: the stage number in the paper, for ``SEConfig.stages``.
        se: None for the plain block.
        downsample: the module on the shortcut; None for the identity.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self, in_channels: int, planes: int, stride: int, stage: int, se: SEConfig | None, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU()
        self.downsample = downsample
        self.add_gate(se, stage, branch=planes, inside=planes, entry=in_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        h = self.bn1(self.conv1(self.at("pre", x)))
        h = self.act1(self.at("3x3", h))
        h = self.at("standard", self.bn2(self.conv2(h))) + self.at("identity", shortcut)
        return self.at("post", self.act2(h))


class Bottleneck(ResidualBlock):
    """1×1, 3×3 (grouped in ResNeXt), and 1×1 convolutions, and a shortcut.

    Args:
        in_channels: channels of the input; the output has ``4 * planes``.
        planes: base width of the stage.
        stride: stride of the 3×3 convolution, or of the first 1×1 with ``stride_in_1x1``.
        stage, se, downsample: as in ``BasicBlock``.
        width, first_width: channels of the 3×3 convolution and of the first 1×1.
        groups: groups of the 3×3 convolution.
        stride_in_1x1: put the stride in the first 1×1 convolution (v1).
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        stage: int,
        se: SEConfig | None,
        downsample: nn.Module | None,
        *,
        width: int,
        first_width: int,
        groups: int,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, first_width, 1, stride_1x1, bias=False)
        self.bn1 = nn.BatchNorm2d(first_width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(first_width, width, 3, stride_3x3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act3 = nn.ReLU()
        self.downsample = downsample
        self.add_gate(se, stage, branch=out_channels, inside=width, entry=in_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        h = self.act1(self.bn1(self.conv1(self.at("pre", x))))
        h = self.act2(self.at("3x3", self.bn2(self.conv2(h))))
        h = self.at("standard", self.bn3(self.conv3(h))) + self.at("identity", shortcut)
        return self.at("post", self.act3(h))


class ResNet(ConvNet):
    """ResNet and its descendants for ImageNet-sized images. Stages have strides 4, 8, 16, and 32.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        layers: blocks in each of the four stages.
        groups, base_width: ResNeXt's cardinality, and the width of a group at 64 planes.
        stride_in_1x1: the original ResNet ("v1"), for which the paper reports 3.86 GFLOPs; otherwise v1.5.
        deep_stem: three 3×3 convolutions instead of the 7×7 (SENet-154, modification b).
        down_kernel: kernel size of the stride-2 projections; 3 in SENet-154 (modification c).
        first_width_divisor: the first 1×1 has ``width // first_width_divisor`` channels (SENet-154, modification a).
        ceil_pool: Caffe's max pooling (no padding, size rounded up), as in the authors' models; otherwise padding 1.
        drop_rate: dropout before the classifier (SENet-154, modification d).
        se: None for the plain network.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: SEConfig | None = None,
        groups: int = 1,
        base_width: int = 64,
        stride_in_1x1: bool = False,
        deep_stem: bool = False,
        down_kernel: int = 1,
        first_width_divisor: int = 1,
        ceil_pool: bool = False,
        drop_rate: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, features_only)
        if block is BasicBlock and (groups, base_width, first_width_divisor, stride_in_1x1) != (1, 64, 1, False):
            raise InputError(
                "ResNet: groups, base_width, first_width_divisor, and stride_in_1x1 need Bottleneck blocks"
            )
        channels = 128 if deep_stem else 64
        self.conv1: nn.Module = _deep_stem(in_chans) if deep_stem else nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if ceil_pool else 1, ceil_mode=ceil_pool)
        for index, blocks in enumerate(layers):
            planes, stride = 64 * 2**index, 1 if index == 0 else 2
            out_channels = planes * block.expansion
            make = functools.partial(
                _block, block, planes=planes, stage=index + FIRST_STAGE, se=se, down_kernel=down_kernel
            )
            if block is Bottleneck:
                width = planes * base_width // 64 * groups
                first_width = width // first_width_divisor
                make = functools.partial(
                    make, width=width, first_width=first_width, groups=groups, stride_in_1x1=stride_in_1x1
                )
            self.add_module(f"layer{index + 1}", make_stage(make, channels, out_channels, blocks, stride))
            channels = out_channels
        self.finish_build(tuple(64 * 2**i * block.expansion for i in range(4)), (4, 8, 16, 32))

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def stages(self) -> Iterable[nn.Module]:
        return (self.layer1, self.layer2, self.layer3, self.layer4)

    def structure(self) -> dict[str, bool]:
        found = {"ceil_pool": bool(self.maxpool.ceil_mode)}
        block = self.layer2[0]
        if isinstance(block, Bottleneck) and block.conv2.groups == 1:
            found["stride_in_1x1"] = block.conv1.stride[0] > 1
        return found


def _deep_stem(in_chans: int) -> nn.Sequential:
    """Three 3×3 convolutions with 64, 64, and 128 channels, the first with stride 2. ``bn1`` follows the last one."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 64, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, bias=False),
    )


def _block(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    *,
    planes: int,
    stride: int,
    down_kernel: int,
    **kwargs: Any,
) -> nn.Module:
    """A block, with a projection shortcut (convolution and norm) if the shape changes."""
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        kernel = 1 if stride == 1 else down_kernel
        downsample = conv_norm(in_channels, out_channels, kernel, stride)
    return block(in_channels, planes, stride, downsample=downsample, **kwargs)


def _register() -> None:
    depths = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }
    for depth, (block, layers) in depths.items():
        build = functools.partial(ResNet, block, layers)
        register_model(f"resnet{depth}", build, se=TIMM_SE, family="resnet", stride="3×3", recipe="imagenet")
        if block is Bottleneck:
            build = functools.partial(ResNet, block, layers, stride_in_1x1=True, ceil_pool=True)
            register_model(
                f"resnet{depth}_v1",
                build,
                se=TIMM_SE,
                family="resnet",
                stride="1×1 (v1)",
                recipe="imagenet",
                min_size=CEIL_POOL_MIN,
            )
    for depth in (50, 101):
        build = functools.partial(ResNet, Bottleneck, depths[depth][1], groups=32, base_width=4)
        register_model(f"resnext{depth}_32x4d", build, se=TIMM_SE, family="resnext", stride="3×3", recipe="imagenet")
    senet154 = functools.partial(
        ResNet,
        Bottleneck,
        (3, 8, 36, 3),
        groups=64,
        base_width=4,
        deep_stem=True,
        down_kernel=3,
        first_width_divisor=2,
        ceil_pool=True,
        drop_rate=0.2,
    )
    register_model(
        "senet154_plain",
        senet154,
        se=TIMM_SE,
        se_name="senet154",
        family="senet154",
        stride="3×3",
        recipe="senet154",
        min_size=CEIL_POOL_MIN,
    )


_register()
