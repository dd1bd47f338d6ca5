"""The images of a run: a transform that fits data and model, and loaders that resume within an epoch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from senet.data.images import ImageSet
from senet.data.loaders import ImageLoader, make_loader
from senet.data.transforms import TransformSpec
from senet.evaluation.workers import default_workers
from senet.runs.recipe import Recipe
from senet.runs.settings import OnBadImage
from senet.training.interrupt import end_others

if TYPE_CHECKING:
    from senet.data.sources import DataSource
    from senet.weights.known import KnownWeights

_LOG = logging.getLogger("senet.training")


def transform_for(
    recipe: Recipe, source: DataSource, input_size: int, weights: KnownWeights | None = None
) -> TransformSpec:
    """The recipe's transform, with missing values of size, mean, and deviation taken from the data or the network.

    Color images for pretrained ``weights`` are normalized as the weights expect, unless the recipe sets one value per
    channel: a single value for all channels is meant for training from scratch.
    """
    wanted = recipe.transform
    mean, std = wanted.mean, wanted.std
    if weights is not None and source.in_chans == 3:
        mean = mean if mean is not None and len(mean) == 3 else weights.mean
        std = std if std is not None and len(std) == 3 else weights.std
    return TransformSpec(
        size=wanted.size or source.native_size or input_size,
        mean=_of_channels(mean, source.mean),
        std=_of_channels(std, source.std),
        resize=wanted.resize,
        interpolation=wanted.interpolation,
        augment=wanted.augment,
        scale=wanted.scale,
        ratio=wanted.ratio,
        flip=wanted.flip,
        cutout=wanted.cutout,
    )


def _of_channels(wanted: tuple[float, ...] | None, own: tuple[float, ...]) -> tuple[float, ...]:
    """The recipe's values, repeated for all channels if there is only one, or else the data's own."""
    if wanted is None:
        return own
    return wanted * len(own) if len(wanted) == 1 else wanted


class Feed(pl.LightningDataModule):
    """The loaders of a run. A run that was saved within an epoch gets the rest of that epoch."""

    def __init__(
        self,
        source: DataSource,
        spec: TransformSpec,
        recipe: Recipe,
        *,
        seed: int,
        workers: int | None,
        on_bad_image: OnBadImage,
        limit_batches: int | None,
    ) -> None:
        super().__init__()
        self.train_images = source.train.with_transform(spec.train_transform(), seed)
        self.val_images = source.val.with_transform(spec.eval_transform())
        self.batch_size = recipe.batch_size
        self.accumulate = recipe.accumulate
        self.seed, self.on_bad_image, self.limit = seed, on_bad_image, limit_batches
        self.workers = default_workers(source.train) if workers is None else workers
        self.train_loader: ImageLoader | None = None
        self.val_loader: ImageLoader | None = None

    def setup(self, stage: str) -> None:
        """Make the loaders once the number of processes is known."""
        trainer = self._trainer
        share = self.batch_size // self.accumulate
        if self.batch_size > len(self.train_images):
            _LOG.warning(
                "batch_size %d is larger than the %d training images, so an epoch is one step; try --set batch_size=",
                self.batch_size,
                len(self.train_images),
            )
        self.train_loader = self._loader(self.train_images, share // trainer.world_size, train=True)
        # Evaluation needs no gradients, so a batch of this size always fits into memory.
        self.val_loader = self._loader(self.val_images, share // trainer.world_size, train=False)

    @property
    def batches_per_epoch(self) -> int:
        """Training batches per process in an epoch."""
        assert self.train_loader is not None
        batches = len(self.train_loader)
        return batches if self.limit is None else min(batches, self.limit)

    @property
    def val_count(self) -> int:
        """Images per validation, over all devices."""
        assert self.val_loader is not None
        seen = len(self.val_loader) if self.limit is None else min(len(self.val_loader), self.limit)
        return min(len(self.val_images), seen * (self.val_loader.batch_size or 1) * self._trainer.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, including that of a last, partial accumulation."""
        return -(-self.batches_per_epoch // self.accumulate)

    def train_dataloader(self) -> ImageLoader:
        """The training images. Called after a checkpoint is restored, so the loops know the progress of the epoch."""
        assert self.train_loader is not None
        loops = self._trainer.fit_loop
        self.train_loader.set_epoch(self._trainer.current_epoch)
        done = loops.epoch_loop.batch_progress.current.ready if loops.restarting else 0
        if done < self.batches_per_epoch:  # otherwise, only the validation of this epoch remains
            self.train_loader.skip_batches(done)
        return self.train_loader

    def val_dataloader(self) -> ImageLoader:
        """The validation images, each once, in order."""
        assert self.val_loader is not None
        return self.val_loader

    def on_exception(self, exception: BaseException) -> None:
        """End the other processes after a failure, such as an unreadable image, so that they do not wait forever."""
        end_others(self._trainer, exception)

    def teardown(self, stage: str) -> None:
        """At the end of the run, log how many images were unreadable."""
        bad = {name for loader in (self.train_loader, self.val_loader) if loader for name in loader.unreadable}
        if bad:
            _LOG.warning("%d images could not be read; training replaced them, validation skipped them", len(bad))

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None
        return self.trainer

    def _loader(self, images: ImageSet, batch_size: int, *, train: bool) -> ImageLoader:
        return make_loader(
            images,
            batch_size,
            train=train,
            workers=self.workers,
            seed=self.seed,
            rank=self._trainer.global_rank,
            world_size=self._trainer.world_size,
            on_bad_image=self.on_bad_image,
        )
