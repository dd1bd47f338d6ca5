"""How images are prepared for a saved network, in evaluation, inspection, and folding."""

from dataclasses import dataclass
from typing import Literal

from senet.data import MAX_PIXELS


@dataclass(frozen=True)
class Viewing:
    """Options for loading and preparing images.

    Attributes:
        size: Side of the crop in pixels. None is the size used in training. The ratio of resize to crop is kept.
        batch_size: Images per batch.
        workers: Number of processes that load images. None chooses a default.
        device: "auto", "cpu", "cuda", or "mps".
        root: Folder of torchvision datasets.
        on_bad_image: "skip" skips and lists unreadable images, up to 1 % of all. "fail" stops at the first.
        max_pixels: Images with more pixels count as unreadable and are not decoded.
    """

    size: int | None = None
    batch_size: int = 64
    device: str = "auto"
    workers: int | None = None
    root: str | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"
    max_pixels: int = MAX_PIXELS


AS_TRAINED = Viewing()
