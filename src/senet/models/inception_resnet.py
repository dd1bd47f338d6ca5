"""Inception-ResNet-v2 (arXiv 1602.07261), plain and with SE, with timm's parameter names.

This is the network with released weights (TensorFlow-Slim's, 10 + 20 + 10 residual blocks), which is larger than the
one drawn in its paper (5 + 10 + 5). It needs 13.16 GFLOPs. The SE paper reports 11.75, which matches neither of them.

The paper says only "similar schemes" about the placement of the gates. Here, they are on the branches of the 40
residual blocks, after the last convolution and before the constant scaling; ``mixed_5b``, ``mixed_6a``, and
``mixed_7a`` have none. This adds 8.5 M multiply-adds in the FCs, or 20.0 M with the pooling. The published increase
from 11.75 to 11.76 G leaves no room for gates on those three as well.
"""

import torch
from torch import Tensor, nn

from senet.models.base import FlatConvNet, make_gate
from senet.models.inception import ConvNorm, Size
from senet.models.registry import register_model
from senet.nn.squeeze_excite import SEConfig

Conv = tuple[int, Size] | tuple[int, Size, int, bool]  # channels, kernel[, stride, padded]
HALVE: tuple[Size, int, bool] = (3, 2, False)


def _row(in_channels: int, *convs: Conv) -> nn.Module:
    """A branch. A single convolution is not wrapped in ``nn.Sequential``, to match timm's keys."""
    modules = []
    for conv in convs:
        modules.append(ConvNorm(in_channels, *conv))
        in_channels = conv[0]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


class Branches(nn.Module):
    """Parallel branches ``branch0``, ``branch1``, … whose outputs are concatenated."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branch_names = [f"branch{index}" for index in range(len(branches))]
        for name, branch in zip(self.branch_names, branches, strict=True):
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.branch_names], 1)


class ScaledBlock(Branches):
    """A residual block: parallel branches, a 1×1 convolution without norm, SE, a constant factor, and the shortcut.

    Args:
        branches: the parallel branches.
        inside: channels of their concatenated outputs.
        channels: channels of the input and of the output.
        factor: scales the branch, which keeps the sum over many blocks small.
        stage: the stage number, for ``SEConfig.stages``.
        se: None for the plain block.
        activation: whether a ReLU follows the addition.
    """

    def __init__(
        self,
        *branches: nn.Module,
        inside: int,
        channels: int,
        factor: float,
        stage: int,
        se: SEConfig | None,
        activation: bool = True,
    ) -> None:
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(inside, channels, 1)
        self.se = make_gate(channels, se, stage)
        self.factor = factor
        self.act = nn.ReLU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv2d(super().forward(x))
        if self.se is not None:
            u = self.se(u)
        return self.act(torch.add(x, u, alpha=self.factor))


def _block35(se: SEConfig | None) -> ScaledBlock:
    branches = _row(320, (32, 1)), _row(320, (32, 1), (32, 3)), _row(320, (32, 1), (48, 3), (64, 3))
    return ScaledBlock(*branches, inside=128, channels=320, factor=0.17, stage=3, se=se)


def _block17(se: SEConfig | None) -> ScaledBlock:
    branches = _row(1088, (192, 1)), _row(1088, (128, 1), (160, (1, 7)), (192, (7, 1)))
    return ScaledBlock(*branches, inside=384, channels=1088, factor=0.1, stage=4, se=se)


def _block8(se: SEConfig | None, factor: float = 0.2, activation: bool = True) -> ScaledBlock:
    branches = _row(2080, (192, 1)), _row(2080, (192, 1), (224, (1, 3)), (256, (3, 1)))
    return ScaledBlock(*branches, inside=448, channels=2080, factor=factor, stage=5, se=se, activation=activation)


class InceptionResNetV2(FlatConvNet):
    """Inception-ResNet-v2. Stages have strides of about 4, 8, 16, and 32: the stride-2 convolutions are unpadded.

    The 40th block has factor 1 and no ReLU.

    Args:
        drop_rate: dropout before the classifier; 0.2 in the paper of this network.
        se: None for the plain network. In ``SEConfig.stages``, 3, 4, and 5 are the three kinds of blocks.
    """

    head_name = "classif"
    stage_rows = (
        ("conv2d_3b", "conv2d_4a"),
        ("maxpool_5a", "mixed_5b", "repeat"),
        ("mixed_6a", "repeat_1"),
        ("mixed_7a", "repeat_2", "block8", "conv2d_7b"),
    )

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: SEConfig | None = None,
        drop_rate: float = 0.2,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, features_only)
        self.conv2d_1a = ConvNorm(in_chans, 32, *HALVE)
        self.conv2d_2a = ConvNorm(32, 32, 3, padded=False)
        self.conv2d_2b = ConvNorm(32, 64, 3)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = ConvNorm(64, 80)
        self.conv2d_4a = ConvNorm(80, 192, 3, padded=False)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = Branches(
            _row(192, (96, 1)),
            _row(192, (48, 1), (64, 5)),
            _row(192, (64, 1), (96, 3), (96, 3)),
            nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), ConvNorm(192, 64)),
        )
        self.repeat = nn.Sequential(*(_block35(se) for _ in range(10)))
        self.mixed_6a = Branches(
            _row(320, (384, *HALVE)), _row(320, (256, 1), (256, 3), (384, *HALVE)), nn.MaxPool2d(3, 2)
        )
        self.repeat_1 = nn.Sequential(*(_block17(se) for _ in range(20)))
        self.mixed_7a = Branches(
            _row(1088, (256, 1), (384, *HALVE)),
            _row(1088, (256, 1), (288, *HALVE)),
            _row(1088, (256, 1), (288, 3), (320, *HALVE)),
            nn.MaxPool2d(3, 2),
        )
        self.repeat_2 = nn.Sequential(*(_block8(se) for _ in range(9)))
        self.block8 = _block8(se, factor=1.0, activation=False)
        self.conv2d_7b = ConvNorm(2080, 1536)
        self.finish_build((192, 320, 1088, 1536), (4, 8, 16, 32))

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool_3a(self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x))))


register_model(
    "inception_resnet_v2",
    InceptionResNetV2,
    family="inception",
    input_size=299,
    stride="3×3, pool",
    min_size=75,
)
