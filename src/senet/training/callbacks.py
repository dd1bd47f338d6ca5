"""Callbacks of the training loop: they record results and save a state that resumes bit for bit.

The order of the callbacks matters and is fixed in ``run._fit``. ``Recorder`` comes before the callback that swaps the
averaged (EMA) weights back, so it sees them at the end of validation. ``StateSaver`` comes after it, so it saves the
updated average.
"""

from __future__ import annotations

import math
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor

from senet.system.csv_file import write_csv
from senet.training.classifier import Classifier
from senet.training.curves import COLUMNS, plot_curves
from senet.training.interrupt import Interrupted, StopRequest
from senet.weights.load import save_weights

SYNC_EVERY = 50  # steps between reads of the loss on an accelerator, where each read synchronizes with the device
SAVE_SECONDS = 900.0  # a run that is killed loses at most this much work, even in a long epoch


class NonFiniteError(RuntimeError):
    """The loss or a weight became infinite or NaN. The message says where, and what to try."""


class Recorder(Callback):
    """Collects one row per epoch and writes curves and weights. ``rows`` are the rows of ``curves.csv``."""

    def __init__(self, folder: Path, metadata: dict[str, Any], title: str) -> None:
        self.folder, self.metadata, self.title = folder, metadata, title
        self.rows: list[dict[str, Any]] = []
        self.best = math.inf
        self._validation: dict[str, float | None] = {}
        self._seconds = 0.0  # spent in this epoch before an interruption
        self._since = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, so that the checkpoint loads without unpickling."""
        return {"rows": self.rows, "best": self.best, "seconds": self._seconds + time.monotonic() - self._since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the checkpoint; files written after it are written again."""
        self.rows = [{column: row[column] for column in COLUMNS} for row in state_dict["rows"]]
        self.best, self._seconds = state_dict["best"], state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock once the data and the device are ready."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log loss and learning rate every ``SYNC_EVERY`` steps, as each read of the loss makes an accelerator wait."""
        if trainer.loggers and trainer.global_step % SYNC_EVERY == 1:
            numbers = {"loss": float(_classifier(pl_module).last_loss), "lr": self._last_lr(trainer)}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discard the counts of an interrupted validation."""
        _classifier(pl_module).reset_val_metrics()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the weights that were validated: with EMA, the averaged ones."""
        classifier = _classifier(pl_module)
        self._validation = classifier.take_val_metrics()
        error, loss = self._validation["val_error"], self._validation["val_loss"]
        if loss is None or error is None or not math.isfinite(loss):
            raise _non_finite(trainer, "the validation loss")
        if not trainer.is_global_zero:
            return
        metadata = self.metadata | {"metrics": self._validation, "epoch": trainer.current_epoch + 1}
        save_weights(self.folder / "last.safetensors", classifier.model, metadata)
        if error < self.best:
            self.best = error
            save_weights(self.folder / "best.safetensors", classifier.model, metadata)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's row to ``curves.csv`` and the logs."""
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1, **_classifier(pl_module).take_train_metrics()}
        row |= self._validation
        row["lr"] = self._last_lr(trainer)
        row["seconds"] = self._seconds + time.monotonic() - self._since
        self._seconds, self._since = 0.0, time.monotonic()
        self.rows.append(row)
        if trainer.is_global_zero:
            write_csv(self.folder / "curves.csv", COLUMNS, self.rows)
        numbers = {key: value for key, value in row.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves once, at the end: a figure takes as long as an epoch of a small network."""
        self.draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw the curves of an interrupted run, if the disk has room for them."""
        with suppress(OSError):
            self.draw(trainer)

    def draw(self, trainer: pl.Trainer) -> None:
        """Write ``curves.png`` with the epochs so far, if any."""
        if trainer.is_global_zero and self.rows:
            plot_curves(self.folder / "curves.png", {self.metadata["model"]: [self.rows]}, self.title)

    @staticmethod
    def _last_lr(trainer: pl.Trainer) -> float:
        """The learning rate of the last step; the schedule has already advanced to the next."""
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler  # a LambdaLR, see Classifier
        return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](max(0, trainer.global_step - 1)))


class StateSaver(Callback):
    """Saves ``last.ckpt``, the full state of the run, at points from which it resumes bit for bit.

    These points are: between an epoch's last training batch and its validation; after an epoch; every 15 minutes; and
    after the current batch when the user or the system asks the run to stop.
    """

    def __init__(self, folder: Path, stop: StopRequest, seed: int) -> None:
        self.path, self.stop, self.seed = folder / "last.ckpt", stop, seed
        self._saved_at = time.monotonic()
        self._before_validation = False
        self._random: dict[str, Any] | None = None
        self.is_restored = False

    def state_dict(self) -> dict[str, Any]:
        """The states of the random generators, as tensors and integers."""
        return {"random": random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until everything that might draw random numbers is set up."""
        self._random = state_dict["random"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the states of the random generators and our signal handlers."""
        self.stop.take_back()
        if self._random is not None:
            try:
                set_random_state(self._random)
            except RuntimeError as error:
                raise ValueError(f"the random generators' states: {error}") from None  # wrong size
            if trainer.global_rank:  # the checkpoint has the first process's states; the others must not copy them
                torch.manual_seed(self.seed + 1_000_003 * trainer.global_rank + trainer.global_step)
            self._random = None
        self.is_restored = True
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss. Save, and stop if asked to, but only where no accumulated gradient is lost."""
        loss = _classifier(pl_module).last_loss
        self._check_loss(trainer, loss, batch_idx)
        # After the epoch's last batch, validation follows, which saves the state.
        if (batch_idx + 1) % trainer.accumulate_grad_batches or batch_idx + 1 >= trainer.num_training_batches:
            return
        if self._should_stop(trainer):
            self._save(trainer, pl_module)
            raise Interrupted(self.stop.signal)
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._save(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save before validation, so that a run interrupted in it resumes with it."""
        self._before_validation = True
        try:
            self._save(trainer, pl_module)
        finally:
            self._before_validation = False
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop during validation; the state was saved at its start."""
        self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the epoch. After the last epoch, a request to stop is ignored, as the run is done."""
        self._save(trainer, pl_module)
        if trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            self._stop_if_asked(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark the validation as started but not finished, so that Lightning resumes the run with it."""
        if not self._before_validation:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part].update(ready=1, started=1, processed=0, completed=0)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_loss(trainer, _classifier(pl_module).last_loss)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in pl_module.parameters()):
            raise _non_finite(trainer, "a weight")
        trainer.save_checkpoint(self.path, weights_only=False)  # atomic: see senet.training.state
        self._saved_at = time.monotonic()

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self._should_stop(trainer):
            raise Interrupted(self.stop.signal)

    def _should_stop(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return self.stop.requested
        # A signal reaches the processes at different batches, but all must stop at the same one.
        return trainer.strategy.reduce_boolean_decision(self.stop.requested, all=False)

    @staticmethod
    def _check_loss(trainer: pl.Trainer, loss: Tensor, batch_idx: int = 0) -> None:
        if (loss.device.type == "cpu" or batch_idx % SYNC_EVERY == 0) and not math.isfinite(float(loss)):
            raise _non_finite(trainer, f"the loss ({float(loss)})")


class WarmAverage(WeightAveraging):
    """Exponential moving average of the weights, with a decay that grows from 0.1 to ``decay``.

    With a constant decay of 0.9999, the initial weights still contribute a third after 10,000 steps. With
    min(decay, (1 + n) / (10 + n)) after n updates, they vanish within the first steps, even in short runs.
    """

    def __init__(self, decay: float) -> None:
        def blend(average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            if not average.is_floating_point():
                return current  # a counter, such as batch norm's
            count = float(updates)
            return torch.lerp(average, current.to(average), 1 - min(decay, (1 + count) / (10 + count)))

        super().__init__(avg_fn=blend)


def random_state() -> dict[str, Any]:
    """States of the global generators of Python, NumPy, and PyTorch, as tensors, numbers, and tuples."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that :func:`random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])


def _classifier(pl_module: pl.LightningModule) -> Classifier:
    assert isinstance(pl_module, Classifier)
    return pl_module


def _non_finite(trainer: pl.Trainer, what: str) -> NonFiniteError:
    mixed = "" if str(trainer.precision).startswith("32") else ", or --set precision=32"
    return NonFiniteError(
        f"{what} is not finite in epoch {trainer.current_epoch + 1}, step {trainer.global_step}; "
        f"try a lower learning rate (--set lr=...), some epochs of warmup (--set schedule.warmup_epochs=5), "
        f"--set clip_grad_norm=1{mixed}"
    )
