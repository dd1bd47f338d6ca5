"""Shake-Shake networks for CIFAR (arXiv 1705.07485), plain and with SE: 26 2×96d and 29 2×4×64d (Tables 4 and 5).

Two residual branches are mixed with random weights, drawn for each block and each image. The blocks follow the
Shake-Shake authors' Torch code: the 26-layer network has pre-activation blocks and a two-path shortcut, and the
29-layer network is a ResNeXt with projection shortcuts.

The SE paper does not say where SE goes in such a block. In its section 3.3, SE transforms the non-identity branch and
acts before the summation. Here, each of the two branches has its own SE block, before they are mixed.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.base import FIRST_STAGE, ConvNet, ResidualBlock, make_stage
from senet.models.registry import register_model
from senet.models.resnet import conv_norm
from senet.nn.squeeze_excite import SEConfig

ON_THE_BRANCHES = ("standard", "pre", "3x3")  # placements that give each branch its own gate


class Mix(torch.autograd.Function):
    """α·a + (1 − α)·b, with β instead of α in the gradient: a and b are (N, C, H, W), α and β are (N, 1, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return torch.lerp(b, a, alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,), (beta,) = grads, ctx.saved_tensors
        return grad * beta, grad * (1 - beta), None, None


def shake(a: Tensor, b: Tensor, random_backward: bool) -> Tensor:
    """Mix two branches for training, with random weights per image, uniform in 0…1.

    The gradient uses separate random weights ("Shake-Shake-Image"), or 1/2 if ``random_backward`` is false
    ("Shake-Even-Image"). All weights are drawn in the forward pass, from the global generator of the inputs' device.

    Args:
        a, b: (N, C, H, W), of the same dtype.
        random_backward: whether to draw random weights for the gradient as well.
    """
    one_per_image = a.detach()[:, :1, :1, :1]
    # Drawn in float32 for every dtype, so that a seed gives the same weights for all of them.
    alpha = torch.rand_like(one_per_image, dtype=torch.float32)
    beta = torch.rand_like(alpha) if random_backward else torch.full_like(alpha, 0.5)
    return Mix.apply(a, b, alpha.to(a.dtype), beta.to(a.dtype))


torch.fx.wrap("shake")  # a leaf for torch.fx, which cannot trace an autograd function


class TwoPathShortcut(nn.Module):
    """The Shake-Shake authors' shortcut for a change of shape: two parallel 1×1 convolutions and one norm.

    The second path sees the feature map shifted by one pixel in both directions, so with stride 2 it reads different
    pixels.

    Args:
        in_channels, out_channels: channels of the input and of the output; each path computes half of the output.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, 1, stride, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels // 2, 1, stride, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.pad(x, (1, -1, 1, -1))
        return self.bn(torch.cat((self.conv1(x), self.conv2(shifted)), dim=1))


class BasicBranch(ResidualBlock):
    """Two 3×3 convolutions with norms, after an activation that both branches share. SE ends the branch.

    Args:
        in_channels, planes: channels of the input and of the output.
        stride: stride of the first convolution.
        stage: the stage number in the paper, for ``SEConfig.stages``.
        se: None if this branch has no gate.
    """

    expansion: ClassVar[int] = 1
    pre_activation: ClassVar[bool] = True

    def __init__(self, in_channels: int, planes: int, stride: int, stage: int, se: SEConfig | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.add_gate(se, stage, branch=planes, inside=planes, entry=in_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(self.at("pre", x)))
        h = self.act1(self.at("3x3", h))
        return self.at("standard", self.bn2(self.conv2(h)))

    @staticmethod
    def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return TwoPathShortcut(in_channels, out_channels, stride)


class NextBranch(ResidualBlock):
    """ResNeXt's 1×1, grouped 3×3, and 1×1 convolutions with norms; 4 groups of ``planes`` channels. SE ends the branch.

    The arguments are those of ``BasicBranch``; the output has ``4 * planes`` channels.
    """

    expansion: ClassVar[int] = 4
    pre_activation: ClassVar[bool] = False
    groups: ClassVar[int] = 4

    def __init__(self, in_channels: int, planes: int, stride: int, stage: int, se: SEConfig | None) -> None:
        super().__init__()
        width, out_channels = planes * self.groups, planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=self.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.add_gate(se, stage, branch=out_channels, inside=width, entry=in_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(self.at("pre", x))))
        h = self.act2(self.at("3x3", self.bn2(self.conv2(h))))
        return self.at("standard", self.bn3(self.conv3(h)))

    @staticmethod
    def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return conv_norm(in_channels, out_channels, 1, stride)


class ShakeBlock(ResidualBlock):
    """Two branches, mixed at random in training and evenly otherwise, and a shortcut.

    With placements ``"post"`` and ``"identity"``, the block has one gate, on the sum or the shortcut. With the others,
    each branch has its own gate.

    Args:
        in_channels, planes, stride, stage: as in the branches.
        branch: the class of the two branches.
        random_backward: whether to draw random weights for the gradient as well, see ``shake``.
        se: None for the plain block.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        stage: int,
        branch: type[BasicBranch] | type[NextBranch],
        random_backward: bool,
        se: SEConfig | None,
    ) -> None:
        super().__init__()
        out_channels = planes * branch.expansion
        branch_se, own_se = (se, None) if se is None or se.placement in ON_THE_BRANCHES else (None, se)
        self.branch1 = branch(in_channels, planes, stride, stage, branch_se)
        self.branch2 = branch(in_channels, planes, stride, stage, branch_se)
        reshapes = stride != 1 or in_channels != out_channels
        self.downsample = branch.shortcut(in_channels, out_channels, stride) if reshapes else None
        self.act1 = nn.ReLU() if branch.pre_activation else nn.Identity()
        self.act2 = nn.Identity() if branch.pre_activation else nn.ReLU()
        self.random_backward = random_backward
        self.add_gate(own_se, stage, branch=out_channels, inside=planes, entry=in_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(x)
        shortcut = x if self.downsample is None else self.downsample(h)
        a, b = self.branch1(h), self.branch2(h)
        mixed = shake(a, b, self.random_backward) if self.training else (a + b) / 2
        return self.at("post", self.act2(mixed + self.at("identity", shortcut)))


class ShakeNet(ConvNet):
    """A network of ``ShakeBlock``s for small images: three stages with strides 1, 2, and 4.

    Args:
        branch: ``BasicBranch`` (26 2×96d) or ``NextBranch`` (29 2×4×64d).
        stem_channels: channels of the 3×3 convolution before the first stage.
        planes: planes of the first stage; each stage doubles them.
        blocks: blocks per stage.
        random_backward: whether to draw random weights for the gradient as well, see ``shake``.
        se: None for the plain network.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        branch: type[BasicBranch] | type[NextBranch],
        stem_channels: int,
        planes: int,
        blocks: int,
        random_backward: bool,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: SEConfig | None = None,
        drop_rate: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, features_only)
        self.pre_activation = branch.pre_activation
        self.conv1 = nn.Conv2d(in_chans, stem_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.relu = nn.ReLU()
        channels, outputs = stem_channels, [planes * 2**index * branch.expansion for index in range(3)]
        for index, out_channels in enumerate(outputs):
            block = functools.partial(
                ShakeBlock,
                planes=planes * 2**index,
                stage=index + FIRST_STAGE,
                branch=branch,
                random_backward=random_backward,
                se=se,
            )
            self.add_module(
                f"layer{index + 1}", make_stage(block, channels, out_channels, blocks, 1 if index == 0 else 2)
            )
            channels = out_channels
        self.finish_build(tuple(outputs), (1, 2, 4))

    def stem(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        # pre-activation blocks start with a ReLU
        return self.bn1(x) if self.pre_activation else self.relu(self.bn1(x))

    def stages(self) -> Iterable[nn.Module]:
        return (self.layer1, self.layer2, self.layer3)

    def finish(self, x: Tensor) -> Tensor:
        return self.relu(x) if self.pre_activation else x


def _register() -> None:
    build = functools.partial(ShakeNet, BasicBranch, 16, 96, (26 - 2) // 6, True)
    register_model("shake26_2x96d", build, family="shake", input_size=32, stride="first 3×3", recipe="cifar_shake")
    build = functools.partial(ShakeNet, NextBranch, 64, 64, (29 - 2) // 9, False)
    register_model("shake29_2x4x64d", build, family="shake", input_size=32, stride="3×3", recipe="cifar100_shake")


_register()
