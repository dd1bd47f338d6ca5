"""A network with its loss, optimizer, and metrics, as a Lightning module."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from senet.acceleration.use import compiled
from senet.data.transforms import TransformSpec
from senet.errors import InputError
from senet.evaluation.evaluate import TOP5_CLASSES
from senet.nn.attachment import attached
from senet.runs.recipe import Recipe, ScheduleRecipe

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from senet.data.loaders import Batch

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Classifier(pl.LightningModule):
    """Trains ``model`` on batches of uint8 images according to ``recipe``.

    ``model`` maps float32 (N, C, H, W) to logits (N, classes). Images are normalized here, on the device, so that
    loaders transfer a quarter of the bytes. Errors are in percent, losses in nats.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, spec: TransformSpec, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.spec = spec
        self.num_classes = num_classes
        self.train_correct, self.train_loss = _accuracy(num_classes), _mean()
        self.val_correct, self.val_loss, self.val_seen = _accuracy(num_classes), _mean(), SumMetric("disable")
        self.val_top5 = _accuracy(num_classes, 5) if num_classes >= TOP5_CLASSES else None
        for metric in (self.train_correct, self.train_loss):
            metric.persistent(True)  # an epoch that is resumed reports all of its images
        self.mix = _mix(recipe, num_classes)
        self.last_loss = torch.zeros(())  # a run that resumes with a validation has no loss yet
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.run = compiled(self.model, recipe.compile)

    def forward(self, images: Tensor) -> Tensor:
        """Logits for uint8 or float pixels in 0..255: (N, C, H, W) → (N, classes)."""
        x = self.spec.normalize(images)
        if self.recipe.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.run(x)

    def on_train_start(self) -> None:
        """Freeze here, too: a run that resumes within an epoch does not start that epoch."""
        self._freeze_batch_norms()

    def on_train_epoch_start(self) -> None:
        """Freeze the batch norms in the recipe's last epochs."""
        self._freeze_batch_norms()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of frozen norms, so that the optimizer skips their parameters."""
        if self._norms_are_frozen:
            for module in self._batch_norms():
                for parameter in module.parameters():
                    parameter.grad = None

    def _freeze_batch_norms(self) -> None:
        # As SENet-154 was trained: "the parameters of all BN layers were frozen for the last few epochs".
        if self._norms_are_frozen:
            for module in self._batch_norms():
                module.eval()

    @property
    def _norms_are_frozen(self) -> bool:
        return self.current_epoch >= self.recipe.epochs - self.recipe.freeze_bn_epochs

    def _batch_norms(self) -> list[nn.Module]:
        return [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch. The Trainer handles the optimizer, precision, and accumulation."""
        images, targets = batch.images, batch.targets
        labels = targets
        if self.mix is not None:
            # Mixing blends pixels, so it gives (N, C, H, W) floats and class probabilities (N, classes).
            images, targets = self.mix(images.float(), targets)
            labels = targets.argmax(dim=1)
        logits = self(images).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
        self.last_loss = loss.detach()
        self.train_loss.update(self.last_loss, weight=len(labels))
        self.train_correct.update(logits.detach(), labels)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one validation batch. The loss is cross-entropy without label smoothing.

        A batch is empty if none of its images can be read.
        """
        if not len(batch.targets):
            return
        logits = self(batch.images).float()
        self.val_loss.update(F.cross_entropy(logits, batch.targets), weight=len(batch.targets))
        self.val_correct.update(logits, batch.targets)
        self.val_seen.update(len(batch.targets))
        if self.val_top5 is not None:
            self.val_top5.update(logits, batch.targets)

    def take_train_metrics(self) -> dict[str, float]:
        """Error in percent and mean loss over the epoch so far. Resets the counters."""
        values = {"train_error": _error(self.train_correct), "train_loss": _value(self.train_loss)}
        self.train_correct.reset()
        self.train_loss.reset()
        return values

    def take_val_metrics(self) -> dict[str, float | None]:
        """Top-1 and top-5 error in percent (None for fewer than six classes) and mean loss. Resets the counters."""
        if not _value(self.val_seen):
            raise InputError("none of the validation images can be read; repair them, or give another --data")
        values = {
            "val_error": _error(self.val_correct),
            "val_top5_error": _error(self.val_top5) if self.val_top5 is not None else None,
            "val_loss": _value(self.val_loss),
        }
        self.reset_val_metrics()
        return values

    def reset_val_metrics(self) -> None:
        """Reset the counters, including those of an interrupted validation."""
        for metric in (self.val_correct, self.val_top5, self.val_loss, self.val_seen):
            if metric is not None:
                metric.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer and its schedule, counted in optimizer steps."""
        optimizer = build_optimizer(self.model, self.recipe)
        feed: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning does not declare it
        factor = LrFactor(self.recipe.schedule, self.recipe.epochs, feed.steps_per_epoch * self.recipe.epochs)
        # A function, as PyTorch would save the class of a callable object and could not load it without unpickling.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class LrFactor:
    """Factor of the recipe's learning rate at an optimizer step: linear warmup, then step, cosine, or constant.

    It depends on the step alone. PyTorch's ``SequentialLR`` computes each rate from the previous one, which drifts, and
    it cannot resume the states that earlier runs have saved.
    """

    def __init__(self, schedule: ScheduleRecipe, epochs: int, total_steps: int) -> None:
        self.schedule = schedule
        self.total = total_steps
        self.warmup = round(total_steps * schedule.warmup_epochs / epochs)

    def __call__(self, step: int) -> float:
        """Factor in 0..1 for optimizer step ``step``, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule.name == "step":
            # As in the papers, milestones count from the start of the run, including warmup.
            passed = sum(step >= round(fraction * self.total) for fraction in self.schedule.milestones)
            return self.schedule.gamma**passed
        if self.schedule.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.total - self.warmup)))
        return 1.0


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters, with norms and biases in a group without decay if the recipe says so."""
    settings = recipe.optimizer
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if not settings.decay_norm_and_bias:
        spared = {
            id(parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if name == "bias" or isinstance(module, _NORMS)
        }
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in spared]},
            {"params": [p for p in model.parameters() if id(p) in spared], "weight_decay": 0.0},
        ]
    if recipe.attached_lr != 1:
        groups = _with_faster_gates(groups, model, recipe)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, recipe.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        groups, recipe.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=settings.nesterov
    )


def _with_faster_gates(groups: list[dict[str, Any]], model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Split each group into attached gates, which get their own learning rate, and all other parameters."""
    gates = {id(parameter) for gate in attached(model).values() for parameter in gate.parameters()}
    faster = [
        group | {"params": [p for p in group["params"] if id(p) in gates], "lr": recipe.lr * recipe.attached_lr}
        for group in groups
    ]
    others = [group | {"params": [p for p in group["params"] if id(p) not in gates]} for group in groups]
    return [group for group in (*others, *faster) if group["params"]]


def _accuracy(num_classes: int, top_k: int = 1) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, average="micro", top_k=top_k, validate_args=False)


def _mean() -> MeanMetric:
    # The callbacks check for NaN; a check at every update would make an accelerator wait.
    return MeanMetric(nan_strategy="disable")


def _mix(recipe: Recipe, num_classes: int) -> nn.Module | None:
    from torchvision.transforms import v2

    choices: list[nn.Module] = []
    if recipe.mixup:
        choices.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
    if recipe.cutmix:
        choices.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
    if not choices:
        return None
    return choices[0] if len(choices) == 1 else v2.RandomChoice(choices)


def _error(metric: MulticlassAccuracy) -> float:
    # torchmetrics counts exactly but divides in float32, so further digits carry no information.
    return round(100.0 * (1.0 - _value(metric)), 4)


def _value(metric: MulticlassAccuracy | MeanMetric | SumMetric) -> float:
    with warnings.catch_warnings():
        # A resumed epoch restores the counts, but not torchmetrics' flag that updates have happened.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        return float(metric.compute())
