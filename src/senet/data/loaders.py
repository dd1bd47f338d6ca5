"""Batches: the order of the images, and the handling of images that cannot be read."""

import logging
import random
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from senet.data.decode import BadImageError
from senet.data.images import ImageSet, Sample
from senet.errors import InputError
from senet.text import shown

log = logging.getLogger("senet.data")
MAX_BAD_FRACTION = 0.01  # with more unreadable images, something is wrong with the data
_LISTED = 20  # bad images listed in an error message
_CANDIDATES = 32  # images tried as replacement of a bad one


class Batch(NamedTuple):
    """``images`` uint8 (N, C, H, W) (ten crops: (N, 10, C, H, W)), ``targets`` int64 (N,), ``indices`` int64 (N,)."""

    images: Tensor
    targets: Tensor
    indices: Tensor


class BadImage(NamedTuple):
    """An image that cannot be read: its index in the set, and the reason."""

    number: int
    reason: str


class _Loaded(NamedTuple):
    """One entry of a batch: the image (None: none could be read), and the bad images tried for it."""

    sample: Sample | None
    bad: list[BadImage]


class _Collated(NamedTuple):
    """A batch, the bad images tried for it, its nominal size, and the damaged images in it."""

    batch: Batch
    bad: list[BadImage]
    places: int
    damaged: list[BadImage]


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (epoch, index), so that a worker knows the epoch for the augmentation.

    If shuffled (training), every (seed, epoch) has a new order. All processes get the same number of images, if
    necessary with a few repeated, because they average their gradients at every step. Otherwise (evaluation), every
    image occurs exactly once over all processes, without padding. To resume within an epoch, the next iteration skips
    ``start`` images of this process. ``len`` is always that of a full epoch.
    """

    def __init__(
        self,
        images: Dataset[Any],
        *,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise InputError(f"rank {rank} of {num_replicas} processes: give 0 to {num_replicas - 1}")
        super().__init__(images, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.start = start
        self.count = len(images)  # type: ignore[arg-type]  # Dataset does not declare __len__
        if not shuffle:
            self.num_samples = len(range(rank, self.count, num_replicas))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        indices = list(range(self.count))
        if self.shuffle:
            # Combined so that seed 0, epoch 1 and seed 1, epoch 0 have different orders.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            indices = torch.randperm(self.count, generator=generator).tolist()
            missing = self.total_size - self.count
            indices += (indices * (missing // max(self.count, 1) + 1))[:missing]
        mine = indices[self.rank :: self.num_replicas]
        return iter([(self.epoch, index) for index in mine[start:]])


class ImageLoader(DataLoader[Batch]):
    """A DataLoader of :class:`Batch` that reports and counts bad images, created by :func:`make_loader`.

    It always yields ``len`` batches, the same number on every process. In training, bad images are replaced, so batches
    keep their size. In evaluation, they are skipped, and a batch without readable images is empty.

    Attributes:
        images: The image set.
        sampler: The :class:`EpochSampler`. Call ``sampler.set_epoch`` (or ``set_epoch`` here) before every epoch.
        bad: Name → reason, for every bad image so far and for files that are not images.
        damaged: Name → damage, for every damaged image so far that could still be decoded.
    """

    def __init__(
        self,
        images: ImageSet,
        sampler: EpochSampler,
        *,
        on_bad_image: Literal["skip", "fail"] = "skip",
        max_bad_fraction: float = MAX_BAD_FRACTION,
        **options: Any,
    ) -> None:
        self.images = images
        self.on_bad_image, self.max_bad_fraction = on_bad_image, max_bad_fraction
        self.bad: dict[str, str] = {}
        self.damaged: dict[str, str] = {}
        self._order = sampler
        guarded = _Guarded(images, replace=sampler.shuffle)
        super().__init__(guarded, sampler=sampler, collate_fn=_collate, **options)  # type: ignore[arg-type]  # bad images too
        self._add_non_images()

    def __len__(self) -> int:
        """Batches per process in an epoch; in evaluation, those of the process with the most images."""
        if self._order.shuffle:
            return super().__len__()
        return -(-self._order.count // (self._order.num_replicas * (self.batch_size or 1)))

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator
        given = self._order.start // (self.batch_size or 1)
        damaged_before = max(len(self.damaged), _LISTED)
        for batch, bad, places, damaged in self._collated():
            for image in damaged:
                self._add_damaged(self.images.names[image.number], image.reason)
            for image in bad:
                self._add_bad(self.images.names[image.number], image.reason)
            if self._order.shuffle and len(batch.targets) < places:
                raise InputError(f"too few readable images to fill a batch; repair or remove these: {self._listed()}")
            yield batch
            given += 1
        if len(self.damaged) > damaged_before:
            log.warning("%d images so far were decoded with damage", len(self.damaged))
        for _ in range(given, len(self)):
            yield _collate([]).batch

    def _collated(self) -> Iterator[_Collated]:
        try:
            batches: Iterator[Any] = super().__iter__()
        except OSError as error:  # no resources for a process, or no space in /dev/shm for its locks
            raise RuntimeError(f"DataLoader worker cannot be started: {error}") from error
        yield from batches

    @property
    def unreadable(self) -> dict[str, str]:
        """``bad`` without the files that are not images."""
        return {name: reason for name, reason in self.bad.items() if name not in self.images.non_images}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines order and augmentation, for the next iteration."""
        self._order.set_epoch(epoch)

    def skip_batches(self, count: int) -> None:
        """Skip the first ``count`` batches of the next iteration, to resume within an epoch."""
        self._order.start = count * (self.batch_size or 1)

    def _add_bad(self, name: str, reason: str) -> None:
        if name in self.bad:
            return
        self.bad[name] = reason
        log.warning("skipped %s: %s", shown(name), shown(reason))
        damaged = len(self.bad) - len(self.images.non_images)
        if self.on_bad_image == "fail":
            raise InputError(f"{name}: {reason}; repair or remove it, or use --on-bad-image skip")
        if damaged > self.max_bad_fraction * len(self.images):
            raise InputError(
                f"more than {self.max_bad_fraction:.3g} of the {len(self.images)} images cannot be read, "
                f"{damaged} so far; repair or remove them: {self._listed()}"
            )

    def _add_damaged(self, name: str, reason: str) -> None:
        if name in self.damaged:
            return
        self.damaged[name] = reason
        if self.on_bad_image == "fail":
            raise InputError(f"{name}: {reason}; repair or remove it, or use --on-bad-image skip")
        if len(self.damaged) <= _LISTED:  # they are used, so their number is not limited
            log.warning("%s: %s", shown(name), shown(reason))

    def _listed(self) -> str:
        listed = [f"{name} ({reason})" for name, reason in self.unreadable.items()]
        return ", ".join(listed[:_LISTED]) + (", ..." if len(listed) > _LISTED else "")

    def _add_non_images(self) -> None:
        names = self.images.non_images
        if not names:
            return
        self.bad.update(dict.fromkeys(names, "not an image"))
        few = ", ".join(map(shown, names[:5])) + (", ..." if len(names) > 5 else "")
        if self.on_bad_image == "fail":
            raise InputError(f"{len(names)} files are not images; remove them: {few}")
        log.warning("left out %d files that are not images: %s", len(names), few)


def make_loader(
    images: ImageSet,
    batch_size: int,
    *,
    train: bool,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_bad_image: Literal["skip", "fail"] = "skip",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    skip: int = 0,
) -> ImageLoader:
    """Make a loader of batches of an image set.

    Each batch depends only on (seed, epoch) and the image set, not on ``workers`` or on earlier batches. The global
    random generators are not used. The last, smaller batch is kept, except in training if it has a single image, on
    which batch norm cannot train. Bad images are skipped in evaluation. In training, they are replaced by images that
    depend only on (seed, epoch, index).

    Args:
        images: The image set, with its transform.
        batch_size: Images per batch and process.
        train: Shuffle, and give every process the same number of images.
        workers: Number of worker processes; 0 loads in this process.
        seed: Seed of the order. The augmentation has its own seed, in the image set.
        rank: Index of this process.
        world_size: Number of processes.
        on_bad_image: "skip" replaces or skips a bad image and logs it once in "senet.data". An image that is decoded
            with damage is used, logged, and counted. "fail" stops at the first bad or damaged image.
        max_bad_fraction: If the fraction of bad images is larger, loading stops and lists them.
        skip: Number of batches that the first iteration skips, to resume within an epoch.

    Raises:
        InputError: An argument is not allowed, or the set is empty or has no transform.
    """
    if not len(images):
        raise InputError("the image set is empty: there is nothing to load")
    if images.transform is None:
        raise InputError("the image set has no transform: call with_transform(spec.train_transform()) first")
    if batch_size < 1 or workers < 0 or skip < 0:
        raise InputError(f"batch size {batch_size}, workers {workers}, skip {skip}: give at least 1, 0, and 0")
    if on_bad_image not in ("skip", "fail"):
        raise InputError(f"on_bad_image is {on_bad_image!r}: choose skip or fail")
    sampler = EpochSampler(
        images, num_replicas=world_size, rank=rank, shuffle=train, seed=seed, start=skip * batch_size
    )
    return ImageLoader(
        images,
        sampler,
        on_bad_image=on_bad_image,
        max_bad_fraction=max_bad_fraction,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=train and len(sampler) > batch_size and len(sampler) % batch_size == 1,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed % 2**63),  # otherwise, DataLoader uses the global one
    )


class _Guarded(Dataset[_Loaded]):
    """Turns the exception of a bad image into a value, which a worker can send to the main process.

    With ``replace``, another image of the epoch replaces a bad one, so that every batch keeps its size.
    """

    def __init__(self, images: ImageSet, *, replace: bool) -> None:
        self.images, self.replace = images, replace

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> _Loaded:
        epoch, index = key
        bad: list[BadImage] = []
        for candidate in self._candidates(epoch, index):
            try:
                return _Loaded(self.images[epoch, candidate], bad)
            except BadImageError as error:
                bad.append(BadImage(candidate, str(error)))
        return _Loaded(None, bad)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        if self.replace:
            # Independent of the image's augmentation, and the same in every process and after a resume.
            draw = random.Random(f"{self.images.seed}/{epoch}/{index}/instead")
            yield from draw.sample(range(len(self)), min(_CANDIDATES, len(self)))


def _collate(loaded: list[_Loaded]) -> _Collated:
    samples = [one.sample for one in loaded if one.sample is not None]
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
    numbers = torch.tensor([sample.number for sample in samples], dtype=torch.int64)
    batch = Batch(_stacked([sample.image for sample in samples]), targets, numbers)
    damaged = [BadImage(sample.number, sample.damage) for sample in samples if sample.damage]
    return _Collated(batch, [bad for one in loaded for bad in one.bad], len(loaded), damaged)


def _stacked(images: list[Tensor]) -> Tensor:
    if not images:
        return torch.empty((0, 0, 0, 0), dtype=torch.uint8)
    first = images[0]
    if get_worker_info() is None:
        return torch.stack(images)
    # Stacked directly in shared memory, which transfers the batch to the main process.
    shared = first.new(first.untyped_storage()._new_shared(first.numel() * len(images)))
    return torch.stack(images, out=shared.resize_(len(images), *first.shape))
