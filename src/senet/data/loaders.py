"""Batches: which images, in which order, and what happens to those that cannot be read."""

import logging
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from senet.data.decode import BadImageError
from senet.data.images import ImageSet, Sample
from senet.errors import InputError

log = logging.getLogger("senet.data")
MAX_BAD_FRACTION = 0.01  # more unreadable images than this, and the data are not what they were taken for
_LISTED = 20  # bad images named in an error message


class Batch(NamedTuple):
    """``images`` uint8 (N, C, H, W) (ten crops: (N, 10, C, H, W)), ``targets`` int64 (N,), ``indices`` int64 (N,)."""

    images: Tensor
    targets: Tensor
    indices: Tensor


class BadImage(NamedTuple):
    """An image that cannot be read: its number in the set and the reason."""

    number: int
    reason: str


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (epoch, index), so that a worker knows the epoch that it augments for.

    Shuffled (training): a new order for every (seed, epoch); processes get equally many images, a few of them twice if
    need be, because gradients are averaged in step. Not shuffled (evaluation): every image exactly once over all
    processes, never padded. ``start`` images of this process are skipped at the next iteration only, to resume within
    an epoch; ``len`` is always that of a whole epoch.
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
            # One number out of both, so that seed 0, epoch 1 is not the order of seed 1, epoch 0.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            indices = torch.randperm(self.count, generator=generator).tolist()
            missing = self.total_size - self.count
            indices += (indices * (missing // max(self.count, 1) + 1))[:missing]
        mine = indices[self.rank :: self.num_replicas]
        return iter([(self.epoch, index) for index in mine[start:]])


class ImageLoader(DataLoader[Batch]):
    """A DataLoader of :class:`Batch` that drops, names and counts bad images; made by :func:`make_loader`.

    Attributes:
        images: the image set.
        sampler: the :class:`EpochSampler`; call ``sampler.set_epoch`` (or ``set_epoch`` here) before every epoch.
        bad: name → reason, of every bad image met so far and of files among the images that are none.
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
        super().__init__(_Guarded(images), sampler=sampler, collate_fn=_collate, **options)  # type: ignore[arg-type]  # bad images too
        self._add_non_images()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator
        for batch, bad in super().__iter__():
            for image in bad:
                self._add_bad(self.images.names[image.number], image.reason)
            if batch is not None:
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next iteration."""
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # an EpochSampler

    def skip_batches(self, count: int) -> None:
        """Leave out the first ``count`` batches of the next iteration, to resume within an epoch."""
        self.sampler.start = count * (self.batch_size or 1)  # type: ignore[attr-defined]  # likewise

    def _add_bad(self, name: str, reason: str) -> None:
        if name in self.bad:
            return
        self.bad[name] = reason
        log.warning("skipped %s: %s", name, reason)
        damaged = len(self.bad) - len(self.images.non_images)
        if self.on_bad_image == "fail":
            raise InputError(f"{name}: {reason}; repair or remove it, or use --on-bad-image skip")
        if damaged > self.max_bad_fraction * len(self.images):
            unreadable = [f"{n} ({r})" for n, r in self.bad.items() if n not in self.images.non_images]
            listed = ", ".join(unreadable[:_LISTED]) + (", ..." if damaged > _LISTED else "")
            raise InputError(
                f"more than {self.max_bad_fraction:.3g} of the {len(self.images)} images cannot be read, "
                f"{damaged} so far; repair or remove them: {listed}"
            )

    def _add_non_images(self) -> None:
        names = self.images.non_images
        if not names:
            return
        self.bad.update(dict.fromkeys(names, "not an image"))
        few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        if self.on_bad_image == "fail":
            raise InputError(f"{len(names)} files among the images are none; remove them: {few}")
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
    """Make the batches of an image set.

    Every batch depends on (seed, epoch) and the image set alone, never on ``workers`` or on what came before; the
    global random generators are left untouched. The last, smaller batch is kept, except in training when it would hold
    a single image, which batch normalisation cannot train on.

    Args:
        images: the set, with its transform.
        batch_size: images per batch and process.
        train: shuffle, and give every process equally many images.
        workers: worker processes; 0 loads in this one.
        seed: of the order. Augmentation has its own seed, in the image set.
        rank: number of this process, from 0.
        world_size: number of processes.
        on_bad_image: "skip" drops a bad image and names it once in the log "senet.data"; "fail" stops at the first.
        max_bad_fraction: more bad images than this fraction of the set stop the run with the list.
        skip: batches to leave out of the first iteration, to resume within an epoch.
    """
    if not len(images):
        raise InputError("the image set is empty: there is nothing to load")
    if images.transform is None:
        raise InputError("the image set has no transform: call with_transform(spec.train_transform()) first")
    if batch_size < 1 or workers < 0 or skip < 0:
        raise InputError(f"batch size {batch_size}, workers {workers}, skip {skip}: give at least 1, 0 and 0")
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
        generator=torch.Generator().manual_seed(seed % 2**63),  # else DataLoader draws from the global one
    )


class _Guarded(Dataset[Sample | BadImage]):
    """Turns the exception of a bad image into a value that travels from a worker to the main process."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample | BadImage:
        try:
            return self.images[key]
        except BadImageError as error:
            return BadImage(key[1], str(error))


def _collate(samples: list[Sample | BadImage]) -> tuple[Batch | None, list[BadImage]]:
    bad = [sample for sample in samples if isinstance(sample, BadImage)]
    good = [sample for sample in samples if isinstance(sample, Sample)]
    if not good:
        return None, bad
    first = good[0].image
    if get_worker_info() is not None:
        # Stacked straight into the shared memory in which the batch travels to the main process.
        size = first.numel() * len(good)
        images = first.new(first.untyped_storage()._new_shared(size)).resize_(len(good), *first.shape)
    else:
        images = first.new_empty((len(good), *first.shape))
    torch.stack([sample.image for sample in good], out=images)
    targets = torch.tensor([sample.target for sample in good])
    return Batch(images, targets, torch.tensor([sample.number for sample in good])), bad
