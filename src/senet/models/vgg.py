"""VGG-16 with batch norm (arXiv 1409.1556, configuration D), plain and with SE, with torchvision's parameter names.

SE follows the ReLU of each of the 13 convolutions, as in the SE paper (Table 2: 15.47 → 15.48 GFLOPs, including the
gates' pooling). A gate is a child of its ReLU module, as in ``features.2.se``, so no index shifts.
"""

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from senet.models.base import FlatConvNet, make_gate
from senet.models.registry import register_model
from senet.nn.squeeze_excite import SEConfig

# Channels and number of convolutions of conv1_x … conv5_x; each ends in a pooling.
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
POOLED_SIDE = 7
HIDDEN = 4096


class GatedReLU(nn.Module):
    """ReLU, then SE.

    Args:
        channels: channels of the feature map.
        stage: the stage number, for ``SEConfig.stages``.
        se: None for the plain network.
    """

    def __init__(self, channels: int, stage: int, se: SEConfig | None) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.se = make_gate(channels, se, stage)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return x if self.se is None else self.se(x)


class VGG(FlatConvNet):
    """VGG-16 with batch norm. Stages have strides 2, 4, 8, 16 (conv2_x … conv5_x), and 32 (the last pooling).

    The classifier has two hidden layers of 4096 units and takes a 7 × 7 feature map. As in torchvision, adaptive
    average pooling maps other sizes to 7 × 7. ``num_classes=0`` returns the last 512 channels, globally pooled.

    Args:
        drop_rate: dropout after both hidden layers.
        se: None for the plain network. In ``SEConfig.stages``, 1 … 5 are conv1_x … conv5_x.
    """

    head_name = "classifier"

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
        layers: list[nn.Module] = []
        starts = []  # index where each stage starts: at the pooling that ends the previous block
        for stage, (channels, convs) in enumerate(BLOCKS, 1):
            for _ in range(convs):
                layers += [nn.Conv2d(in_chans, channels, 3, padding=1), nn.BatchNorm2d(channels)]
                layers += [GatedReLU(channels, stage, se)]
                in_chans = channels
            starts.append(len(layers))
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        rows = zip(starts, [*starts[1:], len(layers)], strict=True)
        self.stem_end = starts[0]
        self.stage_rows = tuple(tuple(f"features.{index}" for index in range(*row)) for row in rows)
        self.finish_build((*(channels for channels, _ in BLOCKS[1:]), BLOCKS[-1][0]), (2, 4, 8, 16, 32))

    def stem(self, x: Tensor) -> Tensor:
        for layer in list(self.features)[: self.stem_end]:
            x = layer(x)
        return x

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer, or create all three if there are none. With 0 classes, return pooled features."""
        old = getattr(self, self.head_name, None)
        self.num_classes = num_classes
        like = next(self.parameters())
        linear = functools.partial(nn.Linear, device=like.device, dtype=like.dtype)
        if not num_classes:
            self.classifier: nn.Module = nn.Identity()
        elif isinstance(old, nn.Sequential):
            old[-1] = linear(HIDDEN, num_classes)
        else:
            self.classifier = nn.Sequential(
                linear(self.num_features * POOLED_SIDE**2, HIDDEN),
                nn.ReLU(),
                self.dropout,
                linear(HIDDEN, HIDDEN),
                nn.ReLU(),
                self.dropout,
                linear(HIDDEN, num_classes),
            )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The classifier on the feature map pooled to 7 × 7, or global average pooling if there is no classifier."""
        if not self.num_classes:
            return super().forward_head(x, pre_logits)
        classifier: Any = self.classifier
        return (classifier[:-1] if pre_logits else classifier)(F.adaptive_avg_pool2d(x, POOLED_SIDE).flatten(1))


register_model("vgg16_bn", VGG, family="vgg", stride="pool", min_size=32)
