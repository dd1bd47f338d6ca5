"""One training run, from settings to a folder of results; broken off and resumed, it ends with the same numbers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console

from senet.data.sources import DataSource, open_source
from senet.errors import InputError
from senet.models.registry import create_model, model_spec
from senet.nn.squeeze_excite import SEConfig
from senet.training import folder as folders
from senet.training.callbacks import Recorder, StateSaver, WarmAverage
from senet.training.classifier import Classifier
from senet.training.evaluate import pick_device
from senet.training.feed import Feed, OnBadImage, transform_for
from senet.training.interrupt import Interrupted, StopRequest
from senet.training.progress import ProgressReport
from senet.training.recipe import Recipe, load_recipe

_LOG = logging.getLogger("senet.training")
_PRECISION = {"32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}
TINY_SIDE = 16
# What may differ between the parts of a run without changing what it computes.
_PLACE = ("device", "devices", "num_nodes", "workers", "root")


@dataclass(frozen=True)
class RunSettings:
    """All that defines a run besides its recipe; kept as ``run.json`` in the run's folder.

    ``se`` are values that replace those of the model's own SE configuration. ``limit_batches`` cuts every epoch short,
    for a dry run.
    """

    data: str
    model: str
    seed: int = 0
    se: tuple[tuple[str, Any], ...] = ()
    pretrained: str | None = None
    val_fraction: float = 0.2
    limit_batches: int | None = None
    on_bad_image: OnBadImage = "skip"
    root: str | None = None
    workers: int | None = None
    device: str = "auto"
    devices: int = 1
    num_nodes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"se": dict(self.se)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunSettings:
        """Undo ``to_dict``."""
        known = {field.name for field in fields(cls)}
        if not {"data", "model"} <= set(values) <= known:
            raise InputError("the run's settings are damaged or of another version; begin it anew with --overwrite")
        return cls(**values | {"se": tuple(values.get("se", {}).items())})


@dataclass(frozen=True)
class RunResult:
    """What came out: errors in percent, of the last epoch unless it says best."""

    model: str
    seed: int
    epochs: int
    val_error: float
    val_top5_error: float | None
    val_loss: float
    train_error: float
    best_val_error: float
    best_epoch: int
    seconds: float
    val_images: int
    folder: str


def default_recipe(data: str, model: str) -> str:
    """The recipe to take when the user names none."""
    return "digits" if data == "digits" else model_spec(model).recipe


def se_config(model: str, values: Sequence[tuple[str, Any]]) -> SEConfig | None:
    """The model's own SE configuration with some values replaced; None for a plain network."""
    own = model_spec(model).se
    if own is None:
        if values:
            raise InputError(f"{model} is a plain network without SE options; its SE twin is {model_spec(model).twin}")
        return None
    return SEConfig.from_dict(own.to_dict() | dict(values))


def train(
    settings: RunSettings,
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    label: str | None = None,
    loggers: bool = True,
    stop: StopRequest | None = None,
    source: DataSource | None = None,
) -> RunResult:
    """Train one network and leave a run folder: recipe, environment, log, curves, weights, state.

    Args:
        settings: data, model, seed and place.
        recipe: how to train.
        output: the run's folder. It must be new or empty, unless ``resume`` or ``overwrite`` is given.
        resume: continue the run in ``output``, with the settings it was started with; begins it if there is none.
        overwrite: replace a run in ``output``.
        console: where progress goes; None shows none.
        label: the run's name in the progress.
        loggers: also write TensorBoard and CSV logs of every step.
        stop: shared request to stop, when the caller listens to signals itself.
        source: the opened data, when several runs share them.

    Raises:
        InputError: bad settings or data.
        Interrupted: the run was asked to stop; its folder resumes.
        NonFiniteError: the loss is infinite or NaN; the last good state stays in the folder.
    """
    output = Path(output)
    if Path(settings.data).is_dir():  # the run can then be resumed from another working folder
        settings = replace(settings, data=str(Path(settings.data).resolve()))
    first_process = rank_zero_only.rank == 0
    resuming = output.is_dir() and resume
    if first_process:
        # Everything that can be wrong with the settings is found before a folder is touched.
        _check(settings, recipe)
        resuming = folders.claim(output, folders.SETTINGS, resume=resume, overwrite=overwrite)
    if resuming:
        settings, recipe = _resumed(settings, recipe, output)
        if (output / folders.RESULT).is_file():
            return load_result(output)
    stop = stop or StopRequest()
    with stop.listening(), folders.log_to(output / "log.txt"), _quiet_lightning():
        if first_process:
            folders.write_json(output / folders.SETTINGS, settings.to_dict())
            (output / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        source = source or open_source(
            settings.data, root=settings.root, val_fraction=settings.val_fraction, seed=0
        )
        if first_process:
            folders.write_json(output / "environment.json", folders.environment(settings.device))
        return _fit(settings, recipe, output, source, console, label or settings.model, loggers, stop)


def _fit(
    settings: RunSettings,
    recipe: Recipe,
    output: Path,
    source: DataSource,
    console: Console | None,
    label: str,
    loggers: bool,
    stop: StopRequest,
) -> RunResult:
    classifier, metadata = build_classifier(settings, recipe, source)
    spec = classifier.spec
    feed = Feed(
        source,
        spec,
        recipe,
        seed=settings.seed,
        workers=settings.workers,
        on_bad_image=settings.on_bad_image,
        limit_batches=settings.limit_batches,
    )
    recorder = Recorder(output, metadata, f"{settings.model} on {Path(source.name).name}")
    callbacks = _callbacks(recorder, StateSaver(output, stop, settings.seed), recipe, console, label)
    trainer = _trainer(settings, recipe, output, callbacks, loggers, feed)
    checkpoint = output / folders.CHECKPOINT
    _LOG.info("%s; %s", source.split, "resuming" if checkpoint.exists() else "starting")
    state = checkpoint if checkpoint.exists() else None
    try:
        with threads_for(spec.size, settings.device):
            trainer.fit(classifier, datamodule=feed, ckpt_path=state, weights_only=True)
    except SystemExit as error:
        # Lightning turns the second Ctrl-C into an exit of its own.
        raise Interrupted(stop.signal) from error
    result = _result(settings, recorder, len(source.val), output)
    if trainer.is_global_zero:
        folders.write_json(output / folders.RESULT, asdict(result))
    return result


def build_classifier(settings: RunSettings, recipe: Recipe, source: DataSource) -> tuple[Classifier, dict[str, Any]]:
    """The network as the seed initialises it, and the metadata that its weight files carry."""
    spec = transform_for(recipe, source, model_spec(settings.model).input_size)
    config = se_config(settings.model, settings.se)
    extra = {} if recipe.dropout is None else {"drop_rate": recipe.dropout}
    torch.manual_seed(settings.seed)
    model = create_model(
        settings.model, len(source.classes), source.in_chans, se=config, pretrained=settings.pretrained, **extra
    )
    metadata = {
        "model": settings.model,
        "num_classes": len(source.classes),
        "in_chans": source.in_chans,
        "se": None if config is None else config.to_dict(),
        "classes": list(source.classes),
        "transform": spec.to_dict(),
    }
    return Classifier(model, recipe, spec, len(source.classes)), metadata


@contextmanager
def threads_for(size: int, device: str) -> Iterator[None]:
    """One thread for tiny images on the CPU, all threads for others.

    On 8x8 digits a second core gains a quarter, but costs a factor of 100 when another program wants it too; and the
    number of threads changes the rounding, so with one thread every machine trains the same network.
    """
    before = torch.get_num_threads()
    if size <= TINY_SIDE and pick_device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_result(folder: Path) -> RunResult:
    """The result of a finished run."""
    values = folders.read_json(folder / folders.RESULT)
    if set(values) != {field.name for field in fields(RunResult)}:
        raise InputError(f"{folder / folders.RESULT} is damaged or of another version; use --overwrite")
    return replace(RunResult(**values), folder=str(folder))


def load_run(folder: str | Path) -> tuple[RunSettings, Recipe]:
    """Settings and recipe of the run in a folder."""
    folder = Path(folder)
    if not (folder / folders.SETTINGS).is_file():
        raise InputError(f"{folder} holds no run; give the folder that was the --output of `senet train`")
    return RunSettings.from_dict(folders.read_json(folder / folders.SETTINGS)), load_recipe(folder / "recipe.yaml")


def _resumed(settings: RunSettings, recipe: Recipe, output: Path) -> tuple[RunSettings, Recipe]:
    """The saved run, in today's place; another data set, model or recipe would be another run."""
    saved, saved_recipe = load_run(output)
    here = replace(saved, **{name: getattr(settings, name) for name in _PLACE})
    for field in fields(RunSettings):
        if getattr(here, field.name) != getattr(settings, field.name):
            raise InputError(
                f"{output} was started with {field.name}={getattr(here, field.name)!r}, not "
                f"{getattr(settings, field.name)!r}; resume it as it was, or give another --output"
            )
    for key, value in recipe.model_dump(exclude={"name", "about"}).items():
        if saved_recipe.model_dump()[key] != value:
            raise InputError(
                f"{output} was started with another recipe ({key}: {saved_recipe.model_dump()[key]}); "
                "resume it as it was, or give another --output"
            )
    return here, saved_recipe


def _check(settings: RunSettings, recipe: Recipe) -> None:
    model_spec(settings.model)
    se_config(settings.model, settings.se)
    device = pick_device(settings.device)
    if recipe.precision == "16-mixed" and device.type != "cuda":
        raise InputError("precision 16-mixed needs a CUDA device; use bf16-mixed or 32 on the CPU")
    if settings.devices < 1 or settings.num_nodes < 1:
        raise InputError(f"devices={settings.devices}, num_nodes={settings.num_nodes}: give at least 1 of each")
    if settings.limit_batches is not None and settings.limit_batches < 1:
        raise InputError(f"limit_batches is {settings.limit_batches}; give at least 1")


def _callbacks(
    recorder: Recorder, saver: StateSaver, recipe: Recipe, console: Console | None, label: str
) -> list[Callback]:
    averaging = [WarmAverage(recipe.ema)] if recipe.ema is not None else []
    progress = [ProgressReport(console, label, recorder)] if console is not None else []
    return [recorder, *averaging, saver, *progress]  # the order matters: see senet.training.callbacks


def _trainer(
    settings: RunSettings, recipe: Recipe, output: Path, callbacks: list[Callback], loggers: bool, feed: Feed
) -> pl.Trainer:
    logs: list[Logger] = []
    if loggers:
        logs = [TensorBoardLogger(output, name="", version="tensorboard"), CSVLogger(output, name="steps")]
    limit: Any = 1.0 if settings.limit_batches is None else settings.limit_batches
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(settings.device, settings.device),
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        precision=_PRECISION[recipe.precision],  # type: ignore[arg-type]
        max_epochs=recipe.epochs,
        limit_train_batches=limit,
        limit_val_batches=limit,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip_grad_norm,
        callbacks=callbacks,
        logger=logs or False,
        default_root_dir=output,
        use_distributed_sampler=False,  # our sampler knows its rank
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # Recorder decides; this only keeps Lightning from complaining about short epochs
        enable_checkpointing=False,  # StateSaver's work
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _result(settings: RunSettings, recorder: Recorder, val_images: int, output: Path) -> RunResult:
    last = recorder.rows[-1]
    best = min(recorder.rows, key=lambda row: row["val_error"])
    return RunResult(
        model=settings.model,
        seed=settings.seed,
        epochs=len(recorder.rows),
        val_error=last["val_error"],
        val_top5_error=last["val_top5_error"],
        val_loss=last["val_loss"],
        train_error=last["train_error"],
        best_val_error=best["val_error"],
        best_epoch=best["epoch"],
        seconds=sum(row["seconds"] for row in recorder.rows),
        val_images=val_images,
        folder=str(output),
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's notes on devices and its tips, and three warnings whose cause is not here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Images in memory are loaded faster without worker processes; for the others --workers decides.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            # Feed skips the batches that the interrupted epoch has had.
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            # Lightning's own use of PyTorch's pytree.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
