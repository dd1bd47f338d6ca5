"""BN-Inception and Inception-v3, plain and with SE on each module's concatenated output (section 3.3 and Fig. 2).

BN-Inception is the SE authors' version of arXiv 1502.03167, with ten modules, Caffe's pooling, no convolution biases,
and no dropout. The pool projections of modules 4c and 4d have 128 channels, not 96 as in the table of that paper.
Inception-v3 has torchvision's parameter names, without the auxiliary classifier: torchvision's weights load once the
keys under ``AuxLogits`` are dropped. They expect images normalized with mean 0.5 and standard deviation 0.5.

As in all networks here, ``SEConfig.stages`` refers to the output resolution: stages 3, 4, and 5 are at 1/8, 1/16, and
1/32 of the input.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.base import FlatConvNet, make_gate
from senet.models.registry import register_model
from senet.nn.squeeze_excite import SEConfig

Size = int | tuple[int, int]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and ReLU.

    Args:
        in_channels, channels: channels of the input and of the output.
        kernel: kernel size, one number or (height, width).
        stride: stride of the convolution.
        padded: "same" padding, which keeps the size at stride 1; otherwise no padding ("valid").
        eps: epsilon of the norm.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: Size = 1, stride: int = 1, padded: bool = True, eps: float = 1e-3
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(in_channels, channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class HalvingMaxPool(nn.Module):
    """Caffe's 3×3 max pooling with stride 2 (windows start at the first pixel), from size n to ⌈n/2⌉.

    For an odd n, Caffe itself gives ⌊n/2⌋, one less than the convolutions of the parallel paths, and cannot build the
    network. For an even n, which is the only case with 224 × 224 images, both formulas agree.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2, ceil_mode=True)


@dataclass(frozen=True)
class Unit:
    """The name and the arguments of a ``ConvNorm`` in a path of a module."""

    name: str
    channels: int
    kernel: Size = 1
    stride: int = 1
    padded: bool = True


Step = Unit | tuple[Unit, Unit] | nn.Module


class InceptionModule(nn.Module):
    """Parallel paths whose outputs are concatenated, with SE on the result.

    Args:
        in_channels: channels of the input.
        paths: a sequence of steps each: a unit, a pooling, or two parallel units whose outputs are concatenated.
        stage: the stage number, for ``SEConfig.stages``.
        se: None for the plain module.
        eps: epsilon of the norms.
    """

    def __init__(
        self, in_channels: int, paths: Iterable[Sequence[Step]], stage: int, se: SEConfig | None, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.out_channels = 0
        self.paths: list[list[tuple[str, ...]]] = []  # path → step → attribute names
        for path in paths:
            channels = in_channels
            names: list[tuple[str, ...]] = []
            for step in path:
                step_names, channels = self._add_step(step, channels)
                names.append(step_names)
            self.paths.append(names)
            self.out_channels += channels
        self.se = make_gate(self.out_channels, se, stage)

    def _add_step(self, step: Step, in_channels: int) -> tuple[tuple[str, ...], int]:
        if isinstance(step, nn.Module):
            self.add_module("pool", step)
            return ("pool",), in_channels
        units = (step,) if isinstance(step, Unit) else step
        for unit in units:
            conv = ConvNorm(in_channels, unit.channels, unit.kernel, unit.stride, unit.padded, self.eps)
            self.add_module(unit.name, conv)
        return tuple(unit.name for unit in units), sum(unit.channels for unit in units)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([self._follow(path, x) for path in self.paths], 1)
        return out if self.se is None else self.se(out)

    def _follow(self, path: list[tuple[str, ...]], x: Tensor) -> Tensor:
        for names in path:
            maps = [getattr(self, name)(x) for name in names]
            x = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
        return x


# Channels of the 1×1 (0: no 1×1, and the module has stride 2), the 3×3 path, the double 3×3 path, the pool projection.
BN_MODULES: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "3a": (64, (64, 64), (64, 96), 32),
    "3b": (64, (64, 96), (64, 96), 64),
    "3c": (0, (128, 160), (64, 96), 0),
    "4a": (224, (64, 96), (96, 128), 128),
    "4b": (192, (96, 128), (96, 128), 128),
    "4c": (160, (128, 160), (128, 160), 128),
    "4d": (96, (128, 192), (160, 192), 128),
    "4e": (0, (128, 192), (192, 256), 0),
    "5a": (352, (192, 320), (160, 224), 128),
    "5b": (352, (192, 320), (192, 224), 128),
}
BN_STAGES = {3: ("3a", "3b"), 4: ("3c", "4a", "4b", "4c", "4d"), 5: ("4e", "5a", "5b")}


def _bn_paths(name: str) -> list[list[Step]]:
    one, (reduce, three), (double_reduce, double), projection = BN_MODULES[name]
    stride = 1 if one else 2
    paths: list[list[Step]] = [
        [Unit("branch3x3_1", reduce), Unit("branch3x3_2", three, 3, stride)],
        [
            Unit("branch3x3dbl_1", double_reduce),
            Unit("branch3x3dbl_2", double, 3),
            Unit("branch3x3dbl_3", double, 3, stride),
        ],
    ]
    if not one:
        return [*paths, [HalvingMaxPool()]]
    pool = nn.MaxPool2d(3, 1, 1) if name == "5b" else nn.AvgPool2d(3, 1, 1)
    return [[Unit("branch1x1", one)], *paths, [pool, Unit("branch_pool", projection)]]


class InceptionNet(FlatConvNet):
    """Base class of both networks."""

    def add_inception_modules(
        self,
        prefix: str,
        in_channels: int,
        stages: dict[int, dict[str, list[list[Step]]]],
        se: SEConfig | None,
        eps: float,
    ) -> list[tuple[str, ...]]:
        """Add the modules of each stage, named ``prefix + name``. Returns the attribute names of each stage."""
        rows = []
        for stage, modules in stages.items():
            for name, paths in modules.items():
                module = InceptionModule(in_channels, paths, stage, se, eps)
                self.add_module(prefix + name, module)
                in_channels = module.out_channels
            rows.append(tuple(prefix + name for name in modules))
        return rows


class BNInception(InceptionNet):
    """BN-Inception. Stages have strides 4, 8, 16, and 32, and end before the module that halves the resolution.

    Args:
        se: None for the plain network.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: SEConfig | None = None,
        drop_rate: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, features_only)
        eps = 1e-5
        self.conv1 = ConvNorm(in_chans, 64, 7, 2, eps=eps)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2_reduce = ConvNorm(64, 64, eps=eps)
        self.conv2 = ConvNorm(64, 192, 3, eps=eps)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        modules = {stage: {name: _bn_paths(name) for name in names} for stage, names in BN_STAGES.items()}
        stage_3, *rows = self.add_inception_modules("inception_", 192, modules, se, eps)
        self.stage_rows = (("conv2_reduce", "conv2"), ("pool2", *stage_3), *rows)
        self.finish_build((192, 320, 608, 1024), (4, 8, 16, 32))

    def stem(self, x: Tensor) -> Tensor:
        return self.pool1(self.conv1(x))


def _pool_path(channels: int) -> list[Step]:
    return [nn.AvgPool2d(3, 1, 1), Unit("branch_pool", channels)]


def _v3_a(pool_channels: int) -> list[list[Step]]:
    """A path with two 3×3 convolutions, and one with a 5×5 (torchvision's InceptionA)."""
    return [
        [Unit("branch1x1", 64)],
        [Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, 5)],
        [Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, 3), Unit("branch3x3dbl_3", 96, 3)],
        _pool_path(pool_channels),
    ]


def _v3_b() -> list[list[Step]]:
    """Halves the resolution (torchvision's InceptionB)."""
    return [
        [Unit("branch3x3", 384, 3, 2, padded=False)],
        [Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, 3), Unit("branch3x3dbl_3", 96, 3, 2, padded=False)],
        [nn.MaxPool2d(3, 2)],
    ]


def _v3_c(width: int) -> list[list[Step]]:
    """7×7 convolutions, factored into 1×7 and 7×1 (torchvision's InceptionC)."""
    double = [
        Unit(f"branch7x7dbl_{index}", 192 if index == 5 else width, (7, 1) if index % 2 == 0 else (1, 7))
        for index in (2, 3, 4, 5)
    ]
    return [
        [Unit("branch1x1", 192)],
        [Unit("branch7x7_1", width), Unit("branch7x7_2", width, (1, 7)), Unit("branch7x7_3", 192, (7, 1))],
        [Unit("branch7x7dbl_1", width), *double],
        _pool_path(192),
    ]


def _v3_d() -> list[list[Step]]:
    """Halves the resolution again (torchvision's InceptionD)."""
    return [
        [Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, 3, 2, padded=False)],
        [
            Unit("branch7x7x3_1", 192),
            Unit("branch7x7x3_2", 192, (1, 7)),
            Unit("branch7x7x3_3", 192, (7, 1)),
            Unit("branch7x7x3_4", 192, 3, 2, padded=False),
        ],
        [nn.MaxPool2d(3, 2)],
    ]


def _v3_e() -> list[list[Step]]:
    """3×3 convolutions, split into a parallel 1×3 and 3×1 (torchvision's InceptionE)."""

    def fork(name: str) -> tuple[Unit, Unit]:
        return Unit(f"{name}a", 384, (1, 3)), Unit(f"{name}b", 384, (3, 1))

    return [
        [Unit("branch1x1", 320)],
        [Unit("branch3x3_1", 384), fork("branch3x3_2")],
        [Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        _pool_path(192),
    ]


class InceptionV3(InceptionNet):
    """Inception-v3 (arXiv 1512.00567). Stages have strides of about 4, 8, 16, and 32, because of unpadded convolutions.

    Args:
        se: None for the plain network.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: SEConfig | None = None,
        drop_rate: float = 0.5,
        features_only: bool = False,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, features_only)
        self.Conv2d_1a_3x3 = ConvNorm(in_chans, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        stage_3, *rows = self.add_inception_modules("Mixed_", 192, _v3_modules(), se, eps=1e-3)
        self.stage_rows = (("Conv2d_3b_1x1", "Conv2d_4a_3x3"), ("maxpool2", *stage_3), *rows)
        self.finish_build((192, 288, 768, 2048), (4, 8, 16, 32))

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))


def _v3_modules() -> dict[int, dict[str, list[list[Step]]]]:
    return {
        3: {"5b": _v3_a(32), "5c": _v3_a(64), "5d": _v3_a(64)},
        4: {"6a": _v3_b(), "6b": _v3_c(128), "6c": _v3_c(160), "6d": _v3_c(160), "6e": _v3_c(192)},
        5: {"7a": _v3_d(), "7b": _v3_e(), "7c": _v3_e()},
    }


register_model("bn_inception", BNInception, family="inception", stride="3×3, pool", min_size=7)
register_model("inception_v3", InceptionV3, family="inception", input_size=299, stride="3×3, pool", min_size=75)
