"""Compares an SE network with its plain twin under the same recipe and seeds, and reports whether SE helps.

For each seed, the twins share the order of the images, the augmentation, and the initial values of their common
weights. The reported error is that of the last epoch: choosing the best epoch on the same images is optimistic, more so
for the noisier network. The error of the best epoch is stored, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from senet.comparison.files import check_same, on_other_data, save_comparison
from senet.comparison.statistics import HELPS, HURTS, UNKNOWN, Interval, mean_interval, paired_interval, verdict, widen
from senet.comparison.step_time import StepTimes, time_steps
from senet.cost.count import Cost, model_cost, module_cost
from senet.data.sources import DataSource
from senet.errors import InputError
from senet.models.external import ATTACHED
from senet.models.registry import model_spec
from senet.runs import folder as folders
from senet.runs import outputs
from senet.runs.data_record import record_of
from senet.runs.recipe import Recipe
from senet.runs.settings import RunResult, RunSettings, check, se_config
from senet.system.csv_file import write_csv
from senet.system.timing import Ratio
from senet.training.curves import plot_curves, read_csv
from senet.training.feed import transform_for
from senet.training.interrupt import Interrupted, StopRequest
from senet.training.processes import check_processes
from senet.training.run import build_classifier, open_data, threads_for, train

KIND = outputs.COMPARISON
MAX_SEEDS = 1000
_CSV_COLUMNS = (
    "row",
    "model",
    "seed",
    "val_error",
    "val_error_half_width_95",
    "val_top5_error",
    "val_loss",
    "train_error",
    "best_val_error",
    "best_epoch",
    "epochs",
    "seconds",
    "parameters",
    "mult_adds",
    "train_step_ms",
)


@dataclass(frozen=True)
class Side:
    """One of the two networks: its runs, one per seed, and their mean errors in percent."""

    model: str
    cost: Cost
    runs: tuple[RunResult, ...]
    val_error: Interval
    train_error: Interval
    step_seconds: float


@dataclass(frozen=True)
class Comparison:
    """The result. ``difference`` is SE minus plain, in percentage points of validation error, paired by seed."""

    data: str
    split: str
    plain: Side
    se: Side
    difference: Interval
    step_ratio: Ratio
    step_batch: int
    verdict: str
    sentence: str
    folder: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def twins(model: str) -> tuple[str, str]:
    """The names (plain, SE) of a network and its twin. ``model`` may be either of them."""
    spec = model_spec(model)
    return (spec.twin, model) if spec.se is not None else (model, spec.twin)


def compare(
    settings: RunSettings,
    recipe: Recipe,
    output: str | Path,
    *,
    seeds: int = 3,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed_data: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Train both networks with every seed, time a training step, and write figures and tables to ``output``.

    Args:
        settings: As for a single run. ``model`` may be either twin, and ``seed`` is the first seed.
        recipe: How to train both networks.
        output: Folder for ``curves.png``, ``results.json``, ``results.csv``, and the run folders in ``runs``.
        seeds: Runs per network. A single seed gives no interval.
        resume: Continue a comparison in ``output``. Finished runs are not repeated, and ``seeds`` may be larger.
        overwrite: Replace a comparison in ``output``.
        allow_changed_data: If images were added, removed, or renamed, repeat the runs on the old images. A verdict
            never pools runs on different data.
        console: Shows the progress.

    Raises:
        InputError: Bad settings or data.
        Interrupted: The comparison was asked to stop. ``resume=True`` continues it.
    """
    check_processes(devices=1, num_nodes=1)
    if not 1 <= seeds <= MAX_SEEDS:
        raise InputError(f"--seeds is {seeds}; give 1 to {MAX_SEEDS}")
    plain, se = twins(settings.model)
    output = Path(output)
    settings = replace(settings, model=se)  # the side that accepts SE options
    check(settings, recipe)
    check(replace(settings, seed=settings.seed + seeds - 1), recipe)
    inputs = {"--data": settings.data, "--pretrained": settings.pretrained}
    examined = partial(outputs.examine, output, KIND, resume=resume, overwrite=overwrite)
    resuming = examined()
    if resuming:
        recipe = check_same(output, plain, settings, recipe)
    source = open_data(settings)
    if not resuming:
        for model in (plain, se):  # find any mismatch before an old comparison is removed
            build_classifier(_side(settings, model), recipe, source)
    stop = StopRequest()
    plan = [
        (replace(_side(settings, model), seed=seed), output / "runs" / f"{model.replace(':', '_')}-seed{seed}")
        for seed in range(settings.seed, settings.seed + seeds)
        for model in (plain, se)
    ]
    homes = [home for _, home in plan]
    stale = on_other_data(homes, record_of(source), settings, allow_changed_data) if resuming else set()
    with outputs.taken(output, KIND, examined, resuming, inputs), stop.listening():
        save_comparison(output, plain, settings, recipe)
        results = _train_all(plan, stale, recipe, source, stop, console, allow_changed_data)
        with threads_for(transform_for(recipe, source, model_spec(se).input_size).size, settings.device):
            times = time_steps(settings, recipe, source, plain, se, stop)
        comparison = _summary(settings, recipe, source, results, times, output)
        _write(comparison, output)
    return comparison


def _train_all(
    plan: Sequence[tuple[RunSettings, Path]],
    stale: set[Path],
    recipe: Recipe,
    source: DataSource,
    stop: StopRequest,
    console: Console | None,
    allow_changed_data: bool,
) -> dict[str, list[RunResult]]:
    """The results of all runs, by network. Finished runs are not repeated, unless they are ``stale``."""
    results: dict[str, list[RunResult]] = {}
    for number, (run, home) in enumerate(plan, 1):
        result = train(
            run,
            recipe,
            home,
            resume=home not in stale,
            overwrite=home in stale,
            allow_changed_data=allow_changed_data,
            console=console,
            label=f"[{number}/{len(plan)}] {run.model}, seed {run.seed}".replace("[", r"\["),
            loggers=False,
            stop=stop,
            source=source,
        )
        results.setdefault(run.model, []).append(result)
        if stop.requested:
            raise Interrupted(stop.signal)
    return results


def _side(settings: RunSettings, model: str) -> RunSettings:
    """The settings of one of the twins, from those of the SE network."""
    return replace(settings, model=model, se=settings.se if model == settings.model else ())


def _summary(
    settings: RunSettings,
    recipe: Recipe,
    source: DataSource,
    results: dict[str, list[RunResult]],
    times: StepTimes,
    output: Path,
) -> Comparison:
    plain, se = results
    size = transform_for(recipe, source, model_spec(se).input_size).size
    sides = []
    for model, runs in results.items():
        if model.endswith(ATTACHED):
            classifier, _ = build_classifier(_side(settings, model), recipe, source)
            cost = module_cost(classifier.model, size, source.in_chans)
        else:
            options: dict[str, Any] = {"se": se_config(se, settings.se)} if model == se else {}
            cost = model_cost(model, len(source.classes), source.in_chans, size, **options)
        val_error = mean_interval([run.val_error for run in runs])
        train_error = mean_interval([run.train_error for run in runs])
        sides.append(Side(model, cost, tuple(runs), val_error, train_error, times.seconds[model]))
    val_images = results[se][0].val_images  # fewer than in the data for a dry run
    difference = widen(
        paired_interval([run.val_error for run in results[se]], [run.val_error for run in results[plain]]),
        100 / val_images,
    )
    word = verdict(difference)
    return Comparison(
        data=source.name,
        split=source.split,
        plain=sides[0],
        se=sides[1],
        difference=difference,
        step_ratio=times.ratio,
        step_batch=times.batch,
        verdict=word,
        sentence=explain(word, difference, val_images),
        folder=str(output),
    )


def explain(word: str, difference: Interval, val_images: int) -> str:
    """A sentence on what the difference (SE minus plain, in percentage points) does and does not show."""
    step = f"one of the {val_images} validation images is {100 / val_images:.2g} points"
    if word == UNKNOWN:
        return (
            f"a single seed gives no interval; the error changed by {difference.points()}, "
            f"which may be due to chance ({step}). Use --seeds 3 or more."
        )
    assert difference.half_width is not None
    found = f"{difference.points()} over {difference.count} seeds"
    if word in (HELPS, HURTS):
        return f"the error changes by {found} (95 %), more than the scatter over seeds; {step}."
    return (
        f"the error changes by {found} (95 %): an effect smaller than about {difference.half_width:.2f} points "
        f"would not be seen with these seeds; {step}."
    )


def _write(comparison: Comparison, output: Path) -> None:
    sides = (comparison.se, comparison.plain)
    curves = {side.model: [read_csv(Path(run.folder) / "curves.csv") for run in side.runs] for side in sides}
    title = f"{comparison.se.model} and its plain twin on {Path(comparison.data).name}"
    plot_curves(output / "curves.png", curves, title)
    write_csv(output / "results.csv", _CSV_COLUMNS, _csv_rows(comparison))
    folders.write_json(output / "results.json", comparison.to_dict())


def _csv_rows(comparison: Comparison) -> list[dict[str, Any]]:
    sides = (comparison.se, comparison.plain)
    runs = [asdict(run) for side in sides for run in side.runs]
    rows = [{"row": "run"} | {key: run[key] for key in _CSV_COLUMNS if key in run} for run in runs]
    rows += [
        {
            "row": "mean",
            "model": side.model,
            "val_error": side.val_error.mean,
            "val_error_half_width_95": side.val_error.half_width,
            "train_error": side.train_error.mean,
            "parameters": side.cost.params,
            "mult_adds": side.cost.mult_adds,
            "train_step_ms": 1000 * side.step_seconds,
        }
        for side in sides
    ]
    difference = {
        "row": "difference",
        "model": f"{comparison.se.model} - {comparison.plain.model}",
        "val_error": comparison.difference.mean,
        "val_error_half_width_95": comparison.difference.half_width,
    }
    return [*rows, difference]
