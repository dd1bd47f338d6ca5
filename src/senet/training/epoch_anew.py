"""An epoch that was broken off is begun again where the images have changed: there is no rest of it any more."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class EpochAnew(Callback):
    """Keeps a digest of the training images in the checkpoint, and sets one of other images back to its epoch's begin.

    The checkpoint says so to all processes alike, also to those that start when the run's folder has been renewed.
    """

    def __init__(self, images: str) -> None:
        self.images = images

    def state_dict(self) -> dict[str, Any]:
        """The digest of the images that the checkpoint's epoch is made of."""
        return {"images": self.images}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Set Lightning's counters back before the loops read them; weights, optimizer and schedule stay."""
        # A version before this one kept no digest and knew of no change.
        before = checkpoint["callbacks"].get(self.state_key, {}).get("images", self.images)
        loops = checkpoint["loops"]["fit_loop"]
        epoch = loops["epoch_progress"]
        if before == self.images or epoch["current"]["processed"] == epoch["current"]["started"]:
            return  # nothing has changed, or the epoch was over
        for metric in (pl_module.train_correct, pl_module.train_loss):  # restored with the weights
            metric.reset()  # type: ignore[union-attr, operator]
        for counts in (epoch["current"], epoch["total"]):
            counts.update(dict.fromkeys(("started", "processed"), counts["completed"]))
        for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
            progress = loops[name]
            progress["is_last_batch"] = False
            progress["current"] = dict.fromkeys(progress["current"], 0)
            progress["total"] = dict.fromkeys(progress["total"], progress["total"]["ready"])
