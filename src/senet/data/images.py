"""The image set: pixels by index, with augmentation that depends on (seed, epoch, index) and on nothing else."""

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
CACHE_BYTES = 512 * 2**20  # ... and are kept in memory, decoded, when all together stay below this
_SIZE_SAMPLE = 64


class Sample(NamedTuple):
    """One image: uint8 (C, H, W) (ten crops: (10, C, H, W)), its class (-1: unknown) and its number in the set.

    ``damage`` says what was wrong with a file that could be decoded all the same.
    """

    image: Tensor
    target: int
    number: int
    damage: str | None = None


class Store(Protocol):
    """Where pictures come from. Both methods work in any process."""

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Picture:
        """Return a picture or raise :class:`BadImageError`."""
        ...


class ArrayStore:
    """Images that are in memory already: uint8 (N, H, W) or (N, H, W, C)."""

    def __init__(self, arrays: Pixels) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def picture(self, index: int) -> Picture:
        """Return image ``index``."""
        return ArrayPicture(self.arrays[index])


class FileStore:
    """Image files. Tiny ones of one size are decoded once and then kept; above ``max_pixels``, an image is bad."""

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
        """Read file ``index``; from memory when it is there."""
        cached = self.cache.get(index) if self.cache else None
        if cached is not None:
            return ArrayPicture(cached)
        picture = read_picture(self.paths[index], self.max_pixels)
        if self.cache and (picture.height, picture.width) == self.tiny_size:
            pixels = picture.pixels(3)[0]
            if picture.damage is None:  # which would be forgotten in the cache
                self.cache.put(index, pixels)
            return ArrayPicture(pixels, picture.damage)
        return picture

    def _uniform_tiny_size(self) -> tuple[int, int] | None:
        """Look at some files, evenly spread: (height, width) when all that open are tiny and of one size."""
        step = max(1, len(self.paths) // _SIZE_SAMPLE)
        sizes = set()
        for path in self.paths[::step]:
            try:
                picture = read_picture(path, self.max_pixels)
            except BadImageError:
                continue  # reported when it is its turn to be loaded
            sizes.add((picture.height, picture.width))
            if len(sizes) > 1 or max(picture.height, picture.width) > TINY_SIDE:
                return None
        return sizes.pop() if sizes else None


class PixelCache:
    """Decoded uint8 (N, H, W, 3) in anonymous shared memory, filled by whichever process decodes an image first.

    Forked workers write into the same pages, so an image is decoded once in a run, not once a worker or an epoch.
    Pages cost memory when they are first written. A process that was spawned instead starts with an empty cache of its
    own.
    (Not ``Tensor.share_memory_``: it lives in /dev/shm, which containers limit to 64 MB and kill the process beyond.)
    """

    def __init__(self, count: int, height: int, width: int) -> None:
        self.shape = (count, height, width, 3)
        self._allocate()

    def get(self, index: int) -> Pixels | None:
        """Return the pixels of an image, or None when nobody has decoded it yet."""
        return self.pixels[index] if self.filled[index] else None

    def put(self, index: int, pixels: Pixels) -> None:
        """Keep the pixels (H, W, 3) of an image."""
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
    """Images with names and classes; ``images[i]`` or ``images[epoch, i]`` is a :class:`Sample`.

    Attributes:
        store: where the pictures are.
        positions: the place in the store of each image of this set.
        classes: names of the classes, in the order of the targets.
        targets: class of each image, -1 when unknown.
        names: one name per image, for example its path below the data folder.
        transform: from picture to uint8 tensor; None: all pixels, (C, H, W), as many channels as the file has.
        seed: with the epoch and the index, all that augmentation depends on.
        non_images: files of other kinds that lay among the images and are left out.
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
        """Load one image. Raises :class:`BadImageError` (its message is the reason) when it cannot be decoded."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        picture = self.store.picture(self.positions[index])
        if self.transform is None:
            array = picture.pixels(1 if isinstance(picture, ArrayPicture) and picture.array.ndim == 2 else 3)[0]
            image = torch.from_numpy(array.copy()).permute(2, 0, 1)
        else:
            # Text seeds are hashed with SHA-512: neighbouring seeds, epochs and indices share nothing.
            image = self.transform(picture, random.Random(f"{self.seed}/{epoch}/{index}"))
        return Sample(image, self.targets[index], index, picture.damage)

    def with_transform(self, transform: Transform | None, seed: int = 0) -> "ImageSet":
        """Return the same images under another transform; pixels in memory are shared."""
        return dataclasses.replace(self, transform=transform, seed=seed)

    def subset(self, indices: Sequence[int]) -> "ImageSet":
        """Return some of the images, in the order given; indices start at 0 again."""
        return dataclasses.replace(
            self,
            positions=[self.positions[i] for i in indices],
            targets=[self.targets[i] for i in indices],
            names=[self.names[i] for i in indices],
        )
