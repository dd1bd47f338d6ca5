"""Weights that are known to fit a network of the zoo: ``create_model(name, pretrained="default")``.

Everything here is as published: sources, preparation and licences by timm's configurations and torchvision's
``Weights``, accuracies by torchvision's ``Weights`` and timm's ``results/results-imagenet.csv`` (validation images of
ImageNet-1k, one centre crop). The eight digits in the file names of timm's releases begin their SHA-256, by PyTorch's
convention.
"""

from dataclasses import asdict, dataclass
from typing import Any

from senet.errors import InputError
from senet.models.registry import NetworkConfig, model_spec

Colour = tuple[float, float, float]

_IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download"


@dataclass(frozen=True)
class KnownWeights:
    """Where a network's weights are, and how images are prepared for them.

    Attributes:
        source: for ``create_model(..., pretrained=source)``.
        input_size: side of the square that the network sees, in pixels.
        crop: that side as a part of the resized image's shorter one.
        interpolation: of the resizing.
        top1, top5: published accuracy on the validation images of ImageNet-1k, in percent.
        licence: of the weights, as their publisher states it (SPDX).
        mean, std: of the channels RGB of images in 0…1.
    """

    source: str
    input_size: int
    crop: float
    interpolation: str
    top1: float
    top5: float
    licence: str
    mean: Colour = _IMAGENET[0]
    std: Colour = _IMAGENET[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _torchvision(
    name: str, top1: float, top5: float, resized: int = 256, size: int = 224, colours: tuple[Colour, Colour] = _IMAGENET
) -> KnownWeights:
    return KnownWeights(
        f"torchvision:{name}", size, round(size / resized, 4), "bilinear", top1, top5, "BSD-3-Clause", *colours
    )


def _timm(
    name: str,
    top1: float,
    top5: float,
    crop: float = 0.875,
    size: int = 224,
    colours: tuple[Colour, Colour] = _IMAGENET,
) -> KnownWeights:
    return KnownWeights(f"timm:{name}", size, crop, "bicubic", top1, top5, "Apache-2.0", *colours)


def _release(path: str, digits: str, top1: float, top5: float) -> KnownWeights:
    """The authors' networks as Cadene converted them, kept among timm's releases."""
    source = f"{_RELEASES}/{path}-{digits}.pth#sha256={digits}"
    return KnownWeights(source, 224, 0.875, "bilinear", top1, top5, "Apache-2.0")


KNOWN_WEIGHTS: dict[str, KnownWeights] = {
    "resnet18": _torchvision("ResNet18_Weights.IMAGENET1K_V1", 69.758, 89.078),
    "resnet34": _torchvision("ResNet34_Weights.IMAGENET1K_V1", 73.314, 91.42),
    "resnet50": _torchvision("ResNet50_Weights.IMAGENET1K_V2", 80.858, 95.434, resized=232),
    "se_resnet50": _timm("seresnet50.ra2_in1k", 80.260, 95.068),
    "se_resnet50_v1": _release("v0.1-cadene/se_resnet50", "ce0d4300", 77.650, 93.732),
    "resnet101": _torchvision("ResNet101_Weights.IMAGENET1K_V2", 81.886, 95.78, resized=232),
    "se_resnet101_v1": _release("v0.1-cadene/se_resnet101", "7e38fcc6", 78.370, 94.264),
    "resnet152": _torchvision("ResNet152_Weights.IMAGENET1K_V2", 82.284, 96.002, resized=232),
    "se_resnet152_v1": _release("v0.1-cadene/se_resnet152", "d17c99b7", 78.662, 94.370),
    "resnext50_32x4d": _torchvision("ResNeXt50_32X4D_Weights.IMAGENET1K_V2", 81.198, 95.34, resized=232),
    "se_resnext50_32x4d": _timm("seresnext50_32x4d.racm_in1k", 81.268, 95.624),
    "resnext101_32x4d": _timm("resnext101_32x4d.gluon_in1k", 80.336, 94.908),
    "se_resnext101_32x4d": _timm("seresnext101_32x4d.gluon_in1k", 80.886, 95.268),
    "senet154": _release("v0.1-weights/legacy_senet154", "e9eb9fe6", 81.320, 95.502),
    "vgg16_bn": _torchvision("VGG16_BN_Weights.IMAGENET1K_V1", 73.36, 91.516),
    # torchvision's network turns ImageNet's mean and deviation into 0.5 by itself; ours is given 0.5
    "inception_v3": _torchvision(
        "Inception_V3_Weights.IMAGENET1K_V1", 77.294, 93.45, resized=342, size=299, colours=_HALF
    ),
    "inception_resnet_v2": _timm("inception_resnet_v2.tf_in1k", 80.434, 95.312, crop=0.8975, size=299, colours=_HALF),
    "mobilenet_v1": _timm("mobilenetv1_100.ra4_e3600_r224_in1k", 75.388, 92.310, colours=_HALF),
}


def known_weights(config: NetworkConfig) -> KnownWeights:
    """The weights behind ``"default"`` for a network.

    An SE network whose gates are identity-initialised starts as its plain twin, and so gets the plain twin's.

    Raises:
        InputError: none are known.
    """
    spec = model_spec(config.model)
    plain, se = (spec.name, spec.twin) if spec.se is None else (spec.twin, spec.name)
    name = plain if config.se is None or config.se.identity_init else se
    if name in KNOWN_WEIGHTS:
        return KNOWN_WEIGHTS[name]
    way = "give a file or another source"
    if name == se and plain in KNOWN_WEIGHTS:
        way += f", or start at {plain!r} with se=SEConfig(identity_init=True)"
    raise InputError(f"no weights are known for {name!r}; {way} (`senet list --weights` shows the known ones)")


def find_known(source: str | None, config: NetworkConfig) -> KnownWeights | None:
    """What is known of the weights that ``pretrained=source`` loads into a network; None if they are not in the table.

    Raises:
        InputError: ``"default"`` is asked for, and none are known.
    """
    if source == "default" and ":" not in config.model:
        return known_weights(config)
    return next((row for row in KNOWN_WEIGHTS.values() if row.source == source), None)
