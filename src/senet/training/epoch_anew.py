"""An epoch that was broken off is begun again where the images have changed: there is no rest of it any more."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class EpochAnew(Callback):
    """Sets Lightning's counters in a checkpoint back to the beginning of its epoch, before the loops read them."""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Weights, optimizer and schedule stay as they are."""
        loops = checkpoint["loops"]["fit_loop"]
        epoch = loops["epoch_progress"]
        if epoch["current"]["processed"] == epoch["current"]["started"]:
            return  # the epoch was over
        for metric in (pl_module.train_correct, pl_module.train_loss):  # restored with the weights
            metric.reset()  # type: ignore[union-attr, operator]
        for counts in (epoch["current"], epoch["total"]):
            counts.update(dict.fromkeys(("started", "processed"), counts["completed"]))
        for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
            progress = loops[name]
            progress["is_last_batch"] = False
            progress["current"] = dict.fromkeys(progress["current"], 0)
            progress["total"] = dict.fromkeys(progress["total"], progress["total"]["ready"])
