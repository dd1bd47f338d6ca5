"""Progress of a run: a bar with the remaining time on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from senet.training.callbacks import Recorder
from senet.training.classifier import Classifier

_REFRESH = 0.2  # seconds between reads of the loss, which make an accelerator wait


class ProgressReport(Callback):
    """Shows epoch, loss, error, images per second, and the remaining time of the run."""

    def __init__(self, console: Console, label: str, recorder: Recorder) -> None:
        self.console, self.label, self.recorder = console, label, recorder
        self.bar: Progress | None = None
        self._images, self._training_seconds = 0, 0.0
        self._batch_since = self._started = self._shown = 0.0
        self._first_batch = 0
        self._compiles = False  # in the first batch of this process, which says nothing about the rate

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar. A resumed run starts where it stopped."""
        self._started = time.monotonic()
        self._first_batch = self._batches_done(trainer)
        assert isinstance(pl_module, Classifier)
        self._compiles = pl_module.run.how != "off"
        if not self._shows_bar(trainer):
            return
        self.bar = Progress(*self._columns(), console=self.console, transient=True, refresh_per_second=5)
        total = (trainer.max_epochs or 0) * int(trainer.num_training_batches)
        self.bar.add_task(
            self.label, total=total, completed=self._first_batch, numbers="compiling" if self._compiles else ""
        )
        self.bar.start()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Start the clock at the first batch after a validation."""
        if not self._batch_since:
            self._batch_since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, unless the network was compiled in it."""
        now = time.monotonic()
        if not self._compiles:
            self._images += len(batch.targets) * trainer.world_size
            self._training_seconds += now - self._batch_since
        self._compiles = False
        self._batch_since = now
        if self.bar is not None and now - self._shown > _REFRESH:
            self._shown = now
            loss: Any = getattr(pl_module, "last_loss", float("nan"))
            numbers = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            if self._is_wide():
                numbers += f"  loss {float(loss):.3f}"
            if self.recorder.rows:
                numbers += f"  error {self.recorder.rows[-1]['val_error']:.2f} %"
            numbers += f"  {self._rate():,.0f} {'images' if self._is_wide() else 'img'}/s"
            self.bar.update(self.bar.task_ids[0], completed=self._batches_done(trainer) + 1, numbers=numbers)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock, as validation does not count as training time."""
        self._batch_since = 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch if there is no bar."""
        if self.bar is None and trainer.is_global_zero and not self.console.is_terminal:
            row = self.recorder.rows[-1]
            done = self._batches_done(trainer) - self._first_batch
            all_batches = (trainer.max_epochs or 0) * int(trainer.num_training_batches)
            left = (time.monotonic() - self._started) / max(done, 1) * (all_batches - self._batches_done(trainer))
            self.console.print(
                f"{self.label}: epoch {row['epoch']}/{trainer.max_epochs}  train error {row['train_error']:.2f} %  "
                f"val error {row['val_error']:.2f} %  {self._rate():,.0f} images/s  "
                f"{timedelta(seconds=round(left))} left",
                highlight=False,
                soft_wrap=True,
            )
        self._images, self._training_seconds, self._batch_since = 0, 0.0, 0.0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message has the terminal to itself."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _columns(self) -> list[ProgressColumn]:
        """The columns of the bar. An 80-column terminal has no room for the bar itself, only for the numbers."""
        label, share = TextColumn("[bold]{task.description}[/]"), TextColumn("{task.percentage:>3.0f} %")
        left = [TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)), TextColumn("left")]
        numbers = TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True))
        if not self._is_wide():
            return [label, share, *left, numbers]
        return [label, BarColumn(bar_width=24), share, *left, numbers]

    def _is_wide(self) -> bool:
        return self.console.width >= 130

    def _shows_bar(self, trainer: pl.Trainer) -> bool:
        return self.console.is_terminal and trainer.is_global_zero

    def _rate(self) -> float:
        return self._images / self._training_seconds if self._training_seconds else 0.0

    @staticmethod
    def _batches_done(trainer: pl.Trainer) -> int:
        return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)
