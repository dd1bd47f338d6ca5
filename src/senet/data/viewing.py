"""How images are shown to a saved network: what evaluating, inspecting and folding have in common."""

from dataclasses import dataclass
from typing import Literal

from senet.data import MAX_PIXELS


@dataclass(frozen=True)
class Viewing:
    """Which view of the images, in what batches, and where.

    Attributes:
        size: side of the crop in pixels; None is the size of training. The ratio of resize to crop is kept.
        batch_size, workers: of loading; ``workers`` None chooses.
        device: "auto", "cpu", "cuda" or "mps".
        root: where torchvision data sets are.
        on_bad_image: "skip" leaves unreadable images out and names them, up to 1 % of them; "fail" stops at the first.
        max_pixels: larger images count as unreadable and are not decoded.
    """

    size: int | None = None
    batch_size: int = 64
    device: str = "auto"
    workers: int | None = None
    root: str | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"
    max_pixels: int = MAX_PIXELS


AS_TRAINED = Viewing()
