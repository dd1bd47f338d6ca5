"""The weights that ``create_model(name, pretrained="default")`` loads for a network of the zoo.

All values are as published: sources, preprocessing, and licenses from timm's configurations and torchvision's
``Weights``; accuracies from torchvision's ``Weights`` and timm's ``results/results-imagenet.csv`` (ImageNet-1k
validation images, one center crop). By PyTorch's convention, the eight digits in the file names of timm's releases are
the first digits of their SHA-256.
"""

from dataclasses import asdict, dataclass
from typing import Any

from senet.errors import InputError
from senet.models.registry import NetworkConfig, model_spec

RGB = tuple[float, float, float]

_IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std
_HALF: tuple[RGB, RGB] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download"


@dataclass(frozen=True)
class KnownWeights:
    """The source of a network's weights, and the preprocessing that they expect.

    Attributes:
        source: for ``create_model(..., pretrained=source)``.
        input_size: side of the square input, in pixels.
        crop: that side as a fraction of the shorter side of the resized image.
        interpolation: interpolation mode for resizing.
        top1, top5: published accuracy on the ImageNet-1k validation images, in percent.
        licence: license of the weights, as stated by their publisher (SPDX).
        mean, std: per-channel (RGB) statistics of images in 0…1.
    """

    source: str
    input_size: int
    crop: float
    interpolation: str
    top1: float
    top5: float
    licence: str
    mean: RGB = _IMAGENET[0]
    std: RGB = _IMAGENET[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _torchvision(
    name: str, top1: float, top5: float, resized: int = 256, size: int = 224, mean_std: tuple[RGB, RGB] = _IMAGENET
) -> KnownWeights:
    return KnownWeights(
        f"torchvision:{name}", size, round(size / resized, 4), "bilinear", top1, top5, "BSD-3-Clause", *mean_std
    )


def _timm(
    name: str,
    top1: float,
    top5: float,
    crop: float = 0.875,
    size: int = 224,
    mean_std: tuple[RGB, RGB] = _IMAGENET,
) -> KnownWeights:
    return KnownWeights(f"timm:{name}", size, crop, "bicubic", top1, top5, "Apache-2.0", *mean_std)


def _release(path: str, digits: str, top1: float, top5: float) -> KnownWeights:
    """The authors' networks, converted by Cadene and hosted with timm's releases."""
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
    # torchvision's network converts ImageNet's mean and std to 0.5 internally; ours expects 0.5
    "inception_v3": _torchvision(
        "Inception_V3_Weights.IMAGENET1K_V1", 77.294, 93.45, resized=342, size=299, mean_std=_HALF
    ),
    "inception_resnet_v2": _timm("inception_resnet_v2.tf_in1k", 80.434, 95.312, crop=0.8975, size=299, mean_std=_HALF),
    "mobilenet_v1": _timm("mobilenetv1_100.ra4_e3600_r224_in1k", 75.388, 92.310, mean_std=_HALF),
}


def known_weights(config: NetworkConfig) -> KnownWeights:
    """The weights that ``"default"`` stands for.

    An SE network with identity-initialized gates starts as its plain twin, so it gets the weights of the plain twin.

    Raises:
        InputError: no weights are known.
    """
    spec = model_spec(config.model)
    plain, se = (spec.name, spec.twin) if spec.se is None else (spec.twin, spec.name)
    name = plain if config.se is None or config.se.identity_init else se
    if name in KNOWN_WEIGHTS:
        return KNOWN_WEIGHTS[name]
    hint = "use a file or another source"
    if name == se and plain in KNOWN_WEIGHTS:
        hint += f", or start from {plain!r} with se=SEConfig(identity_init=True)"
    raise InputError(f"no weights are known for {name!r}; {hint} (`senet list --weights` shows the known ones)")


def find_known(source: str | None, config: NetworkConfig) -> KnownWeights | None:
    """The table entry of the weights that ``pretrained=source`` loads into a network; None if there is none.

    Raises:
        InputError: the source is ``"default"``, and no weights are known.
    """
    if source == "default" and ":" not in config.model:
        return known_weights(config)
    return next((row for row in KNOWN_WEIGHTS.values() if row.source == source), None)
