"""The image set: pixels by index, with augmentation that depends only on (seed, epoch, index)."""

import dataclasses
import math
import mmap
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from senet.data import MAX_PIXELS
from senet.data.decode import ArrayPicture, BadImageError, Picture, Pixels, read_picture
from senet.data.transforms import Transform
from senet.errors import InputError

TINY_SIDE = 96  # images up to this side count as tiny ...
CACHE_BYTES = 512 * 2**20  # ... and are kept decoded in memory if their total size is at most this
_SIZE_SAMPLE = 64


class Sample(NamedTuple):
    """One image, uint8 (C, H, W) (ten crops: (10, C, H, W)), with its class (-1: unknown) and its index in the set.

    ``damage`` describes the damage of a file that could still be decoded.
    """

    image: Tensor
    target: int
    number: int
    damage: str | None = None


class Store(Protocol):
    """A source of pictures. Both methods work in any process."""

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Picture:
        """Return a picture or raise :class:`BadImageError`."""
        ...


class ArrayStore:
    """Images in memory: uint8 (N, H, W) or (N, H, W, C)."""

    def __init__(self, arrays: Pixels) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def picture(self, index: int) -> Picture:
        """Return image ``index``."""
        return ArrayPicture(self.arrays[index])


class FileStore:
    """Image files. Tiny images of equal size are decoded once and cached. Images above ``max_pixels`` are bad."""

    def __init__(self, paths: Sequence[str | Path], max_pixels: int = MAX_PIXELS) -> None:
        self.paths = [str(path) for path in paths]
        self.max_pixels = max_pixels
        self.tiny_size = self._uniform_tiny_size()
        self.cache: PixelCache | None = None
        if self.tiny_size and len(self) * math.prod(self.tiny_size) * 3 <= CACHE_BYTES:
            self.cache = PixelCache(len(self), *self.tiny_size)

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, index: int) -> Picture:
        """Read file ``index``, from the cache if possible."""
        cached = self.cache.get(index) if self.cache else None
        if cached is not None:
            return ArrayPicture(cached)
        picture = read_picture(self.paths[index], self.max_pixels)
        if self.cache and (picture.height, picture.width) == self.tiny_size:
            pixels = picture.pixels(3)[0]
            if picture.damage is None:  # the cache does not store damage
                self.cache.put(index, pixels)
            return ArrayPicture(pixels, picture.damage)
        return picture

    def _uniform_tiny_size(self) -> tuple[int, int] | None:
        """(height, width) if all readable files of an evenly spread sample are tiny and have the same size."""
        step = max(1, len(self.paths) // _SIZE_SAMPLE)
        sizes = set()
        for path in self.paths[::step]:
            try:
                picture = read_picture(path, self.max_pixels)
            except BadImageError:
                continue  # reported when it is loaded
            sizes.add((picture.height, picture.width))
            if len(sizes) > 1 or max(picture.height, picture.width) > TINY_SIDE:
                return None
        return sizes.pop() if sizes else None


class PixelCache:
    """Decoded uint8 (N, H, W, 3) in anonymous shared memory. The first process that decodes an image stores it.

    Forked workers share the pages, so an image is decoded once per run, not once per worker or epoch. A page takes no
    memory until it is written. A spawned process starts with its own empty cache.
    (``Tensor.share_memory_`` uses /dev/shm, which containers limit to 64 MB; a process that exceeds it is killed.)
    """

    def __init__(self, count: int, height: int, width: int) -> None:
        self.shape = (count, height, width, 3)
        self._allocate()

    def get(self, index: int) -> Pixels | None:
        """Return the pixels of an image, or None if it has not been decoded yet."""
        return self.pixels[index] if self.filled[index] else None

    def put(self, index: int, pixels: Pixels) -> None:
        """Store the pixels (H, W, 3) of an image."""
        self.pixels[index] = pixels
        self.filled[index] = 1

    def _allocate(self) -> None:
        count, size = self.shape[0], math.prod(self.shape)
        memory = np.frombuffer(mmap.mmap(-1, count + size), dtype=np.uint8)
        self.filled, self.pixels = memory[:count], memory[count:].reshape(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shape = state["shape"]
        self._allocate()


@dataclasses.dataclass(frozen=True)
class ImageSet(Dataset[Sample]):
    """Images with names and classes. ``images[i]`` or ``images[epoch, i]`` is a :class:`Sample`.

    Attributes:
        store: The source of the pictures.
        positions: Index of each image in the store.
        classes: Names of the classes, in the order of the targets.
        targets: Class of each image, or -1 if unknown.
        names: One name per image, such as its path below the data folder.
        transform: Converts a picture to a uint8 tensor. None gives all pixels (C, H, W), with the channels of the file.
        seed: Seed of the augmentation, which depends only on it, the epoch, and the index.
        non_images: Other files among the images, which are skipped.
    """

    store: Store
    positions: list[int]
    classes: tuple[str, ...]
    targets: list[int]
    names: list[str]
    transform: Transform | None = None
    seed: int = 0
    non_images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is one target and one name per image."""
        if not len(self.positions) == len(self.targets) == len(self.names):
            raise InputError(
                f"an image set needs one target and one name per image: {len(self.positions)} images, "
                f"{len(self.targets)} targets, {len(self.names)} names"
            )

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Load one image. Raises :class:`BadImageError`, with the reason as its message, if it cannot be decoded."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        picture = self.store.picture(self.positions[index])
        if self.transform is None:
            array = picture.pixels(1 if isinstance(picture, ArrayPicture) and picture.array.ndim == 2 else 3)[0]
            image = torch.from_numpy(array.copy()).permute(2, 0, 1)
        else:
            # String seeds are hashed with SHA-512, so neighboring seeds, epochs, and indices are independent.
            image = self.transform(picture, random.Random(f"{self.seed}/{epoch}/{index}"))
        return Sample(image, self.targets[index], index, picture.damage)

    def with_transform(self, transform: Transform | None, seed: int = 0) -> "ImageSet":
        """Return the same images with another transform. Pixels in memory are shared."""
        return dataclasses.replace(self, transform=transform, seed=seed)

    def subset(self, indices: Sequence[int]) -> "ImageSet":
        """Return some of the images in the given order, with indices from 0."""
        return dataclasses.replace(
            self,
            positions=[self.positions[i] for i in indices],
            targets=[self.targets[i] for i in indices],
            names=[self.names[i] for i in indices],
        )
