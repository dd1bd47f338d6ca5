"""A training run, from settings to a folder of results. Interrupted and resumed, it ends with the same numbers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console

from senet.attachment.attach import attach
from senet.attachment.policies import sites_from
from senet.data.sources import DataSource, open_source
from senet.errors import InputError
from senet.models.external import ATTACHED
from senet.models.registry import NetworkConfig, model_spec
from senet.nn.attachment import described
from senet.runs import folder as folders
from senet.runs import outputs
from senet.runs.data_record import DataRecord, check_data, record_of, save_record
from senet.runs.recipe import Recipe
from senet.runs.settings import RunResult, RunSettings, check, load_result, load_settings, resumed, se_config
from senet.system.atomic import write_atomically
from senet.system.device import pick_device
from senet.training.callbacks import Recorder, StateSaver, WarmAverage
from senet.training.classifier import Classifier
from senet.training.epoch_anew import EpochAnew
from senet.training.feed import Feed, transform_for
from senet.training.interrupt import Interrupted, StopRequest
from senet.training.processes import check_processes, environment_plugins, is_first_process
from senet.training.progress import ProgressReport
from senet.training.state import StateFile, checked_state, restoring
from senet.weights.create import create_model
from senet.weights.known import find_known

_LOG = logging.getLogger("senet.training")
TINY_SIDE = 16  # pixels
_PRECISION = {"32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


def train(
    settings: RunSettings,
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed_data: bool = False,
    console: Console | None = None,
    label: str | None = None,
    loggers: bool = True,
    stop: StopRequest | None = None,
    source: DataSource | None = None,
) -> RunResult:
    """Train one network and write a run folder: recipe, environment, log, curves, weights, state.

    Args:
        settings: Data, model, seed, and devices.
        recipe: How to train.
        output: The run folder. It must be new or empty, unless ``resume`` or ``overwrite`` is given.
        resume: Continue the run in ``output`` with its original settings, or start it if there is none. If its data
            has moved, ``settings`` has the new folder.
        overwrite: Replace a run in ``output``.
        allow_changed_data: Resume even if images were added, removed, or renamed. The classes must be the same.
        console: Shows the progress. None shows none.
        label: Name of the run in the progress.
        loggers: Also write TensorBoard and CSV logs, every 50 steps and every epoch.
        stop: Shared request to stop, if the caller handles signals itself.
        source: The opened data, if several runs share it.

    Raises:
        InputError: Bad settings or data, or the data differs from that of the run to resume.
        Interrupted: The run was asked to stop. It can be resumed.
        NonFiniteError: The loss is infinite or NaN. The last good state stays in the folder.
    """
    output = Path(output)
    check_processes(settings.devices, settings.num_nodes)
    if settings.data.strip() and Path(settings.data).is_dir():  # a run resumes from any working directory
        settings = replace(settings, data=str(Path(settings.data).resolve()))
    first_process = is_first_process()
    resuming = resume and (output / folders.SETTINGS).is_file()
    inputs = {"--data": settings.data, "--pretrained": settings.pretrained}
    examined = partial(outputs.examine, output, outputs.RUN, resume=resume, overwrite=overwrite)
    with ExitStack() as held:
        if first_process:
            # All errors in the settings are found before a folder is touched.
            check(settings, recipe)
            resuming = examined()
        moved = False
        if resuming:
            settings, recipe, moved = _as_saved(settings, recipe, output)
            if (output / folders.RESULT).is_file():
                if first_process:
                    outputs.tidy(output)
                return load_result(output)
        source = source or open_data(settings)
        record = record_of(source)
        if resuming:
            check_data(output, record, settings.data, moved=moved, allow_changed=allow_changed_data)
        stop = stop or StopRequest()
        held.enter_context(stop.listening())
        held.enter_context(_quiet_lightning())
        log_to = held.enter_context(folders.log_file())
        # Any mismatch (transform, weights, options, devices) is found before an old run is removed.
        classifier, metadata = build_classifier(settings, recipe, source)
        _trainer(settings, recipe, output, [], loggers=False)
        if first_process:
            held.enter_context(outputs.taken(output, outputs.RUN, examined, resuming, inputs))
            _begin(settings, recipe, output, record, is_new=not resuming, moved=moved)
            log_to(output / "log.txt")
        # Testing whether it exists is not enough: another process may not have removed an old run yet.
        state = checked_state(output / folders.CHECKPOINT) if resuming else None
        run = _Run(settings, recipe, output, source, record, classifier, metadata, state)
        progress = None if console is None else partial(ProgressReport, console, label or settings.model)
        return _fit(run, stop, progress, loggers)


def _begin(
    settings: RunSettings, recipe: Recipe, output: Path, record: DataRecord, *, is_new: bool, moved: bool
) -> None:
    """Write the files that define the run, and its current environment."""
    if is_new:
        write_atomically(output / "recipe.yaml", recipe.to_yaml().encode())
    save_record(output, record)
    if is_new or moved:
        folders.write_json(output / folders.SETTINGS, settings.to_dict())  # last, as it marks the folder as a run
    folders.write_json(output / "environment.json", folders.environment(settings.device))


def _as_saved(settings: RunSettings, recipe: Recipe, output: Path) -> tuple[RunSettings, Recipe, bool]:
    """Settings (with the current data and devices) and recipe of the run to resume, and whether its data has moved."""
    known = load_settings(output).data
    settings, recipe = resumed(settings, recipe, output)
    is_gone = Path(settings.data).is_absolute() and not Path(settings.data).exists()
    if is_gone and not (output / folders.RESULT).is_file():
        raise InputError(f"{output}: its data {settings.data} is missing; if it has moved, give --data NEW-FOLDER")
    return settings, recipe, known != settings.data


def open_data(settings: RunSettings) -> DataSource:
    """The data of a run. The split has its own seed, so that all runs train and validate on the same images."""
    return open_source(
        settings.data,
        root=settings.root,
        val_fraction=settings.val_fraction,
        seed=0,
        max_pixels=settings.max_pixels,
    )


@dataclass(frozen=True)
class _Run:
    """A run whose parts are checked, opened, and built. ``state`` is the checkpoint to resume from."""

    settings: RunSettings
    recipe: Recipe
    output: Path
    source: DataSource
    record: DataRecord
    classifier: Classifier
    metadata: dict[str, Any]
    state: Path | None


def _fit(
    run: _Run, stop: StopRequest, progress: Callable[[Recorder], ProgressReport] | None, loggers: bool
) -> RunResult:
    settings, output, spec = run.settings, run.output, run.classifier.spec
    feed = Feed(
        run.source,
        spec,
        run.recipe,
        seed=settings.seed,
        workers=settings.workers,
        on_bad_image=settings.on_bad_image,
        limit_batches=settings.limit_batches,
    )
    recorder = Recorder(output, run.metadata, f"{settings.model} on {Path(run.source.name).name}")
    saver = StateSaver(output, stop, settings.seed)
    averaging = [WarmAverage(run.recipe.ema)] if run.recipe.ema is not None else []
    shown = [progress(recorder)] if progress is not None else []
    # The order matters: see senet.training.callbacks.
    callbacks: list[Callback] = [recorder, *averaging, saver, *shown, EpochAnew(run.record.train.names)]
    trainer = _trainer(settings, run.recipe, output, callbacks, loggers)
    _LOG.info("%s; %s", run.source.split, "resuming" if run.state else "starting")
    try:
        with threads_for(spec.size, settings.device), restoring(run.state, lambda: saver.is_restored):
            trainer.fit(run.classifier, datamodule=feed, ckpt_path=run.state, weights_only=True)
    except SystemExit as error:
        # Lightning turns a second Ctrl-C into SystemExit.
        raise Interrupted(stop.signal) from error
    result = _result(settings, recorder, feed.val_count, output)
    if trainer.is_global_zero:
        folders.write_json(output / folders.RESULT, asdict(result))
    return result


def build_classifier(settings: RunSettings, recipe: Recipe, source: DataSource) -> tuple[Classifier, dict[str, Any]]:
    """The network, initialized with the seed, and the metadata of its weight files."""
    config = se_config(settings.model, settings.se)
    extra = {} if recipe.dropout is None else {"drop_rate": recipe.dropout}
    name = settings.model.removesuffix(ATTACHED)
    is_attached = name != settings.model
    weights = find_known(settings.pretrained, NetworkConfig(name, se=None if is_attached else config))
    spec = transform_for(recipe, source, model_spec(settings.model).input_size, weights)
    torch.manual_seed(settings.seed)
    model = create_model(
        name,
        len(source.classes),
        source.in_chans,
        se=None if is_attached else config,
        pretrained=settings.pretrained,
        **extra,
    )
    if is_attached and config is not None:
        example = torch.zeros(1, source.in_chans, spec.size, spec.size)
        _LOG.info("%s", attach(model, config, sites_from(settings.sites), example).summary())
    metadata = {
        "model": name,
        "num_classes": len(source.classes),
        "in_chans": source.in_chans,
        "se": None if config is None or is_attached else config.to_dict(),
        "attached": described(model),
        "classes": list(source.classes),
        "transform": spec.to_dict(),
    }
    return Classifier(model, recipe, spec, len(source.classes)), metadata


@contextmanager
def threads_for(size: int, device: str) -> Iterator[None]:
    """Use one thread for tiny images on the CPU, and all threads otherwise.

    On 8×8 digits, a second core saves a quarter of the time, but costs a factor of 100 if another program uses it, too.
    Also, the number of threads changes the rounding: with one thread, every machine trains the same network.
    """
    before = torch.get_num_threads()
    if size <= TINY_SIDE and pick_device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trainer(
    settings: RunSettings, recipe: Recipe, output: Path, callbacks: list[Callback], loggers: bool
) -> pl.Trainer:
    logs: list[Logger] = []
    if loggers:
        logs = [TensorBoardLogger(output, name="", version="tensorboard"), CSVLogger(output, name="steps")]
    limit: Any = 1.0 if settings.limit_batches is None else settings.limit_batches
    try:
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
            use_distributed_sampler=False,  # our sampler is aware of its rank
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # Recorder decides; this only avoids Lightning's warning about short epochs
            enable_checkpointing=False,  # StateSaver does it
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[StateFile(), *environment_plugins(settings.devices, settings.num_nodes)],
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:  # missing devices, a launcher
        raise InputError(" ".join(str(error).split())) from None


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
    """Silence Lightning's messages about devices, its tips, and warnings that do not apply here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Images in memory load faster without worker processes; for other images, --workers decides.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            # Feed skips the batches that the interrupted epoch has already used.
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            # srun may be installed without being used.
            warnings.filterwarnings("ignore", message="The `srun` command is available")
            # Lightning's own use of PyTorch's pytree.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
