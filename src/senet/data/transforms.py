"""Transforms of images for the network: crops, flips, Cutout, and normalization.

A transform is called with an image and, for augmentation, a ``random.Random``, its only source of randomness. It
returns uint8 (C, H, W), or (10, C, H, W) for ten crops. Normalization is applied to whole batches, on any device
(:meth:`TransformSpec.normalize`).

Sources: the scale and aspect-ratio crop of GoogLeNet (Szegedy et al. 2015) as used in the SENet paper (section 5.1);
zero padding by 4 pixels, random crop, and flip on CIFAR; Cutout (DeVries and Taylor, arXiv 1708.04552); ten crops as in
AlexNet (Krizhevsky et al. 2012).
"""

import dataclasses
import math
import random
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from senet.data.decode import ArrayPicture, Picture, Pixels, image_pixels
from senet.errors import InputError

Augment = Literal["imagenet", "cifar", "shift", "none"]
Interpolation = Literal["bilinear", "bicubic"]
Box = tuple[int, int, int, int]  # top, left, height, width in pixels

MAX_SIDE = 8192  # of the network's input, in pixels; a batch of larger images would not fit in memory
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Transform(Protocol):
    """Converts an image to uint8 (C, H, W) or (10, C, H, W). All randomness comes from ``rng``."""

    def __call__(self, image: Any, rng: random.Random | None = None) -> Tensor:
        """Transform one image."""
        ...


@dataclasses.dataclass(frozen=True)
class TransformSpec:
    """The complete input pipeline of a network, saved with its weights.

    Attributes:
        size: Height and width of the network's input, in pixels.
        mean: Subtracted per channel, on the 0..1 scale. Its length is the number of channels, 1 or 3.
        std: Divisor per channel, on the 0..1 scale. The paper only subtracts the mean: ``(1, 1, 1)`` does that for
            0..1 pixels, and ``(1/255, 1/255, 1/255)`` for 0..255 pixels, as the authors' Caffe models expect.
        resize: Short side before the center crop in evaluation. None: size * 256 / 224 for "imagenet", otherwise size.
        interpolation: "bilinear" or "bicubic", both antialiased.
        augment: "imagenet" (random scale and aspect crop, flip), "cifar" (pad 4, random crop, flip), "shift" (pad 1,
            random crop, no flip: for digits), or "none".
        scale: Range of the crop's area, as a fraction of the image's area, for "imagenet".
        ratio: Range of the crop's width / height, for "imagenet".
        flip: Mirror half of the training images ("imagenet" and "cifar" only).
        cutout: Side, in pixels, of the square that is erased in each training image; 0 erases nothing.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: int | None = None
    interpolation: Interpolation = "bilinear"
    augment: Augment = "imagenet"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        """Check the values, so that an error in a recipe is found before training."""
        for name in ("mean", "std", "scale", "ratio"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not 1 <= self.size <= MAX_SIDE:
            raise InputError(f"transform size is {self.size}: give 1 to {MAX_SIDE} pixels")
        if self.resize is not None and self.resize < self.size:
            raise InputError(f"transform resize {self.resize} is below size {self.size}: the center crop would not fit")
        if self.resize is not None and self.resize > 2 * MAX_SIDE:
            raise InputError(f"transform resize is {self.resize}: give at most {2 * MAX_SIDE} pixels")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(f"mean {self.mean} and std {self.std}: give 1 or 3 values each")
        if not all(abs(mean) <= 1e6 for mean in self.mean) or not all(1e-6 <= std <= 1e6 for std in self.std):
            raise InputError(f"mean {self.mean} and std {self.std}: give means of at most 1e6, and std of 1e-6 to 1e6")
        if self.augment not in ("imagenet", "cifar", "shift", "none"):
            raise InputError(f"unknown augment {self.augment!r}: choose imagenet, cifar, shift, or none")
        if self.size <= 4 and self.augment == "cifar":
            raise InputError(f"transform size is {self.size}: cifar pads by 4 pixels and needs more than that")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise InputError(f"unknown interpolation {self.interpolation!r}: choose bilinear or bicubic")
        if not 0 <= self.cutout <= self.size:
            raise InputError(f"transform cutout is {self.cutout}: give 0 to {self.size} pixels, the size of the images")
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 1e-6 <= low <= high <= 1e6:
                raise InputError(f"transform {name} is {low} to {high}: give two values of 1e-6 to 1e6, in order")

    @property
    def channels(self) -> int:
        """Channels of the images: 1 or 3."""
        return len(self.mean)

    @property
    def eval_resize(self) -> int:
        """Short side, in pixels, before the center crop in evaluation."""
        if self.resize is not None:
            return self.resize
        return round(self.size * 256 / 224) if self.augment == "imagenet" else self.size

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransformSpec":
        """Rebuild from :meth:`to_dict`. Raises InputError for unknown names."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown or "size" not in values:
            raise InputError(f"not a transform: {'unknown ' + ', '.join(unknown) if unknown else 'size is missing'}")
        return cls(**values)

    def with_size(self, size: int) -> "TransformSpec":
        """Return the same transform for another input size. Resize and cutout keep their ratios to it."""
        resize = None if self.resize is None else round(self.resize * size / self.size)
        return dataclasses.replace(self, size=size, resize=resize, cutout=round(self.cutout * size / self.size))

    def train_transform(self) -> Transform:
        """Return the training transform. It needs ``rng`` at every call if it is random."""
        crop: Transform
        if self.augment == "imagenet":
            crop = RandomAreaCrop(self)
        elif self.augment == "none":
            crop = CenterCrop(self)
        else:
            crop = PadCrop(self, 4, self.flip) if self.augment == "cifar" else PadCrop(self, 1, False)
        return Cutout(self, crop) if self.cutout else crop

    def eval_transform(self, crops: Literal["center", "ten"] = "center") -> Transform:
        """Return the evaluation transform: a center crop (C, H, W), or (10, C, H, W) with crops="ten"."""
        if crops not in ("center", "ten"):
            raise InputError(f"unknown crops {crops!r}: choose center or ten")
        return CenterCrop(self) if crops == "center" else TenCrop(self)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize uint8 or float pixels in 0..255, (..., C, H, W), to float32: (x/255 - mean) / std."""
        # Python computes the constants in float64, which not every device supports.
        scales = [1 / (255 * std) for std in self.std]
        shifts = [mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        scale, shift = (
            torch.tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (scales, shifts)
        )
        if images.is_floating_point():
            return images.float() * scale - shift
        # In place, as allocating another float batch takes longer than computing it.
        return images.float().mul_(scale).sub_(shift)


class RandomAreaCrop:
    """A random box of 8 to 100 % of the area, resized to a square, flipped half of the time (training, ImageNet)."""

    def __init__(self, spec: TransformSpec) -> None:
        self.spec = spec

    def __call__(self, image: Any, rng: random.Random | None = None) -> Tensor:
        """Return uint8 (C, size, size)."""
        rng, spec, picture = _required(rng), self.spec, as_picture(image)
        box = random_area_box(picture.height, picture.width, spec.scale, spec.ratio, rng)
        flip = spec.flip and rng.random() < 0.5
        pixels, reduce = picture.pixels(spec.channels, reduction(box[2], box[3], spec.size, spec.size))
        box = snapped(box, picture.height // reduce, picture.width // reduce, reduce)
        crop = _resize(pixels, box, spec.size, spec.size, spec.interpolation)
        return crop.flip(2) if flip else crop


class PadCrop:
    """Zero padding by a few pixels, a random crop of the original size, and optionally a flip (CIFAR, digits)."""

    def __init__(self, spec: TransformSpec, padding: int, flip: bool) -> None:
        self.spec, self.padding, self.flip = spec, padding, flip

    def __call__(self, image: Any, rng: random.Random | None = None) -> Tensor:
        """Return uint8 (C, size, size). Images of another size are first resized and center-cropped."""
        rng, size, pad = _required(rng), self.spec.size, self.padding
        picture = as_picture(image)
        if (picture.height, picture.width) == (size, size):
            pixels = picture.pixels(self.spec.channels)[0]
        else:
            pixels = _center(picture, self.spec).permute(1, 2, 0).numpy()
        down, right = rng.randint(-pad, pad), rng.randint(-pad, pad)
        # Copy only the visible part: with 32×32 images, every microsecond is one percent.
        moved = np.zeros_like(pixels)
        source = pixels[max(down, 0) : size + min(down, 0), max(right, 0) : size + min(right, 0)]
        moved[max(-down, 0) : size - max(down, 0), max(-right, 0) : size - max(right, 0)] = source
        if self.flip and rng.random() < 0.5:
            moved = np.ascontiguousarray(moved[:, ::-1])
        return torch.from_numpy(moved).permute(2, 0, 1)


class Cutout:
    """Erase a square around a random pixel of the cropped image. At a border, the square is clipped (training).

    The authors set normalized pixels to zero, so here, the square gets the mean color, rounded to 8 bits.
    """

    def __init__(self, spec: TransformSpec, crop: Transform) -> None:
        self.spec, self.crop = spec, crop
        color = [min(max(round(255 * mean), 0), 255) for mean in spec.mean]
        self.color = torch.tensor(color, dtype=torch.uint8).view(-1, 1, 1)

    def __call__(self, image: Any, rng: random.Random | None = None) -> Tensor:
        """Return uint8 (C, size, size)."""
        rng, size, side = _required(rng), self.spec.size, self.spec.cutout
        pixels = self.crop(image, rng)
        top, left = rng.randrange(size) - side // 2, rng.randrange(size) - side // 2
        pixels[:, max(top, 0) : top + side, max(left, 0) : left + side] = self.color
        return pixels


class CenterCrop:
    """Resize the short side and crop the center (evaluation)."""

    def __init__(self, spec: TransformSpec) -> None:
        self.spec = spec

    def __call__(self, image: Any, rng: random.Random | None = None) -> Tensor:
        """Return uint8 (C, size, size)."""
        return _center(as_picture(image), self.spec)


class TenCrop:
    """Resize the short side and crop the four corners and the center, also mirrored (evaluation)."""

    def __init__(self, spec: TransformSpec) -> None:
        self.spec = spec

    def __call__(self, image: Any, rng: random.Random | None = None) -> Tensor:
        """Return uint8 (10, C, size, size): top left, top right, bottom left, bottom right, center; then mirrored."""
        size = self.spec.size
        whole = _short_side(as_picture(image), self.spec)
        down, right = whole.shape[1] - size, whole.shape[2] - size
        corners = [(0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))]
        five = torch.stack([whole[:, top : top + size, left : left + size] for top, left in corners])
        # torchvision mirrors the image before it crops, which swaps left and right corners. So do we.
        return torch.cat([five, five[[1, 0, 3, 2]].flip(3), _center_of(whole.flip(2), size)[None]])


def as_picture(image: Any) -> Picture:
    """Convert a Pillow image, a uint8 array (H, W[, C]), or a uint8 tensor (C, H, W) to a Picture; keep a Picture."""
    if isinstance(image, Image.Image):
        return ArrayPicture(image_pixels(image))
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise InputError(f"an image array must be uint8 (H, W) or (H, W, C), not {image.dtype} {image.shape}")
        return ArrayPicture(np.array(image))
    picture: Picture = image
    return picture


def random_area_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Box:
    """Draw a box with a uniform area and a log-uniform width / height, as in torchvision's RandomResizedCrop.

    If ten draws do not fit, use the largest centered box with an allowed ratio.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
            return top, left, box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = min(width, max(round(height * aspect), 1)), min(height, max(round(width / aspect), 1))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def reduction(height: int, width: int, target_height: int, target_width: int) -> int:
    """Return the largest of 8, 4, 2, 1 by which (height, width) can be reduced without going below the target."""
    return next((k for k in (8, 4, 2) if height >= k * target_height and width >= k * target_width), 1)


def _required(rng: random.Random | None) -> random.Random:
    if rng is None:
        raise InputError("a random transform needs a random.Random: pass rng")
    return rng


def snapped(box: Box, height: int, width: int, reduce: int) -> Box:
    """Round a random box to whole pixels of a picture of (height, width) that was decoded at 1/reduce.

    The box moves by at most half a decoded pixel. As it is random, the result is just another random box, not an error.
    """
    if reduce == 1:
        return box
    box_height, box_width = min(round(box[2] / reduce), height), min(round(box[3] / reduce), width)
    top, left = min(round(box[0] / reduce), height - box_height), min(round(box[1] / reduce), width - box_width)
    return top, left, box_height, box_width


def _resize(
    pixels: Pixels, box: tuple[float, float, float, float], height: int, width: int, interpolation: Interpolation
) -> Tensor:
    """Resize a box of (H, W, C) pixels to a (C, height, width) tensor, antialiased.

    PyTorch's uint8 kernel uses SIMD and is three times as fast as Pillow, but only Pillow supports fractional boxes.
    """
    top, left, box_height, box_width = box
    if not all(float(edge).is_integer() for edge in box):
        edges = (left, top, left + box_width, top + box_height)
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        resized = np.array(image.resize((width, height), filters[interpolation], edges))
        return torch.from_numpy(resized.reshape(height, width, -1)).permute(2, 0, 1)
    cut = pixels[int(top) : int(top + box_height), int(left) : int(left + box_width)]
    if cut.shape[:2] == (height, width):
        return torch.from_numpy(cut.copy()).permute(2, 0, 1)  # not a view of the pixel store
    return interpolate(
        torch.from_numpy(cut).permute(2, 0, 1)[None], (height, width), mode=interpolation, antialias=True
    )[0]


def _short_side(picture: Picture, spec: TransformSpec) -> Tensor:
    """Resize the whole image so that its short side is ``spec.eval_resize``. The long side is rounded down."""
    short = spec.eval_resize
    if picture.height <= picture.width:
        height, width = short, int(short * picture.width / picture.height)
    else:
        height, width = int(short * picture.height / picture.width), short
    pixels, reduce = picture.pixels(spec.channels, reduction(picture.height, picture.width, height, width))
    whole = (0.0, 0.0, picture.height / reduce, picture.width / reduce)  # the last pixels may be incomplete
    return _resize(pixels, whole, height, width, spec.interpolation)


def _center(picture: Picture, spec: TransformSpec) -> Tensor:
    return _center_of(_short_side(picture, spec), spec.size)


def _center_of(image: Tensor, size: int) -> Tensor:
    top, left = round((image.shape[1] - size) / 2), round((image.shape[2] - size) / 2)
    return image[:, top : top + size, left : left + size]
