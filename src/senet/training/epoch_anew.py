"""Restarts an interrupted epoch if the images have changed, since its remaining images are then undefined."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class EpochAnew(Callback):
    """Stores a digest of the training images in the checkpoint. If it differs on resume, the epoch starts over.

    The digest is in the checkpoint so that all processes decide alike, even one that starts after the run folder was
    updated.
    """

    def __init__(self, images: str) -> None:
        self.images = images

    def state_dict(self) -> dict[str, Any]:
        """The digest of the training images."""
        return {"images": self.images}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Reset Lightning's counters before the loops read them. Weights, optimizer, and schedule are kept."""
        # Earlier versions stored no digest and allowed no change.
        before = checkpoint["callbacks"].get(self.state_key, {}).get("images", self.images)
        loops = checkpoint["loops"]["fit_loop"]
        epoch = loops["epoch_progress"]
        if before == self.images or epoch["current"]["processed"] == epoch["current"]["started"]:
            return  # nothing has changed, or the epoch was complete
        for metric in (pl_module.train_correct, pl_module.train_loss):  # restored with the weights
            metric.reset()  # type: ignore[union-attr, operator]
        for counts in (epoch["current"], epoch["total"]):
            counts.update(dict.fromkeys(("started", "processed"), counts["completed"]))
        for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
            progress = loops[name]
            progress["is_last_batch"] = False
            progress["current"] = dict.fromkeys(progress["current"], 0)
            progress["total"] = dict.fromkeys(progress["total"], progress["total"]["ready"])
