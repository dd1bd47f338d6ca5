"""The SE tax: the time and memory of a network with SE relative to its plain twin, on this machine.

All candidates of a setting are timed in turn in one run. The result is the median and the quartiles of the per-round
ratios. Correctness is checked first; if a check fails, nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from senet.bench import checks
from senet.bench.candidates import BASE, CANDIDATES, DTYPES, LAYOUTS, Runner, Setting, Twins, build, make_twins
from senet.bench.engines import NotHere
from senet.bench.memory import peak_mb, saved_mb_per_image
from senet.bench.stages import StageCost, stage_costs
from senet.errors import InputError
from senet.models.registry import model_spec
from senet.system.timing import Ratio, Timing, interleaved, ratio
from senet.text import first_line

COLUMNS = (
    *("model", "mode", "batch", "size", "dtype", "layout", "device", "threads", "rounds", "candidate", "ms"),
    *("over_plain", "over_plain_q25", "over_plain_q75", "twin", "over_twin", "over_twin_q25", "over_twin_q75"),
    *("saved_mb_per_image", "peak_mb"),
)
FOREIGN_PAUSE = 0.005  # seconds; longer than the idle threads of any of these engines spin before they sleep

Progress = Callable[[str, int, int], object]


class CheckError(InputError):
    """Two networks that should compute the same function do not; nothing was timed."""


@dataclass
class Measured:
    """The measurements of one setting, filled step by step, so that an interrupted run keeps its results.

    Attributes:
        setting: the configuration.
        checks: the checks so far, in order.
        left_out: why a candidate was left out, by its name.
        timings: the rounds so far, by candidate.
        saved_mb, peak_mb: MB per image saved for backward, and peak MB of a step (CUDA), by candidate.
        stages: the cost of each stage.
        complete: whether everything was measured.
    """

    setting: Setting
    checks: list[checks.Check] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    saved_mb: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    stages: list[StageCost] = field(default_factory=list)
    complete: bool = False

    def ratio(self, numerator: str, denominator: str) -> Ratio | None:
        """The time of one candidate ÷ that of another, per round; None if either was not timed."""
        if numerator not in self.timings or denominator not in self.timings:
            return None
        return ratio(self.timings[numerator], self.timings[denominator])

    def rows(self) -> list[dict[str, Any]]:
        """One row per candidate, with ``COLUMNS``; missing values are None."""
        setting = self.setting
        shared = {name: getattr(setting, name) for name in COLUMNS[:7]} | {"threads": torch.get_num_threads()}
        rows = []
        for name, timing in self.timings.items():
            twin = CANDIDATES[name].twin
            row = shared | {"rounds": len(timing.rounds), "candidate": name, "ms": 1e3 * timing.median, "twin": twin}
            for column, over in (("over_plain", BASE), ("over_twin", twin)):
                r = self.ratio(name, over) if over and over != name else None
                row |= {column: r and r.median, f"{column}_q25": r and r.q25, f"{column}_q75": r and r.q75}
            row |= {"saved_mb_per_image": self.saved_mb.get(name), "peak_mb": self.peak_mb.get(name)}
            rows.append({column: row[column] for column in COLUMNS})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The measurements as JSON-serializable values."""
        return {
            "setting": asdict(self.setting),
            "complete": self.complete,
            "checks": [asdict(check) for check in self.checks],
            "left_out": self.left_out,
            "rows": self.rows(),
            "stages": [asdict(stage) for stage in self.stages],
        }


def checked_setting(setting: Setting) -> Setting:
    """The validated setting. The name of a plain twin is replaced with that of the SE network.

    Raises:
        InputError: a value is not allowed, or not supported on this machine.
    """
    spec = model_spec(setting.model)
    allowed = {"mode": ("train", "inference"), "dtype": DTYPES, "layout": LAYOUTS, "device": ("cpu", "cuda")}
    for name, values in allowed.items():
        if getattr(setting, name) not in values:
            raise InputError(f"--{name} {getattr(setting, name)!r} is unknown; choose one of {', '.join(values)}")
    for name, least in (("batch", 1), ("size", 1), ("rounds", 1)):
        if getattr(setting, name) < least:
            raise InputError(f"--{name} {getattr(setting, name)} is not allowed; it must be at least {least}")
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device was found; use --device cpu")
    return Setting(**asdict(setting) | {"model": spec.name if spec.se is not None else spec.twin})


def measure(setting: Setting, progress: Progress = lambda what, done, total: None) -> Measured:
    """Check and measure one setting; see ``measure_into``."""
    measured = Measured(checked_setting(setting))
    measure_into(measured, progress)
    return measured


def measure_into(measured: Measured, progress: Progress) -> None:
    """Check and measure ``measured.setting``. If interrupted, ``measured`` keeps the results so far.

    Args:
        measured: holds a setting from ``checked_setting``.
        progress: called as ``progress(task, done, total)``.

    Raises:
        CheckError: a candidate computes another function; nothing is timed.
        InputError: the plain network itself cannot run.
    """
    setting = measured.setting
    torch.compiler.reset()  # code compiled for other shapes would make this setting's code dynamic
    twins = _twins(setting)
    progress("checking gradients", 0, 1)
    _demand(measured, checks.check_gradients(setting))
    runners = _ready(measured, twins, progress)
    progress("checking outputs", 0, 1)
    _demand(measured, checks.check_outputs(setting, twins, runners))
    for name, runner in runners.items():
        for values, value in (
            (measured.saved_mb, saved_mb_per_image(name, setting, twins, runner)),
            (measured.peak_mb, peak_mb(name, setting, runner)),
        ):
            if value is not None:
                values[name] = value

    def on_round(timings: dict[str, Timing]) -> None:
        measured.timings = timings
        progress("timing", len(timings[BASE].rounds), setting.rounds)

    steps: dict[str, Callable[[], object]] = {name: runner.run for name, runner in runners.items()}
    pause = FOREIGN_PAUSE if any(CANDIDATES[name].float32_only for name in runners) else 0.0
    interleaved(steps, setting.rounds, warmup=2, device=setting.device, pause=pause, on_round=on_round)
    progress("timing stages", 0, 1)
    measured.stages = stage_costs(setting, twins, runners, setting.rounds)
    measured.complete = True


def _twins(setting: Setting) -> Twins:
    """The networks; refuses settings whose training step cannot run or cannot be compared."""
    twins = make_twins(setting)
    if setting.mode == "inference":
        return twins
    try:
        with torch.no_grad():
            first, second = (twins.networks["plain"].train()(twins.x) for _ in range(2))
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise InputError(
                f"--batch {setting.batch} with --size {setting.size} leaves batch norm one value per channel; "
                "use a larger batch or size for training"
            ) from error
        raise
    if not torch.allclose(first, second, rtol=0, atol=0.01 * first.abs().max().item()):
        raise InputError(f"{setting.model} is random in training, so outputs cannot be compared; use --mode inference")
    return twins


def _demand(measured: Measured, made: Iterable[checks.Check]) -> None:
    for check in made:
        measured.checks.append(check)
        if not check.ok:
            raise CheckError(f"{check}: the results differ, so nothing was timed")


def _ready(measured: Measured, twins: Twins, progress: Progress) -> dict[str, Runner]:
    """The candidates that can run here, compiled; the reasons for the others go to ``measured.left_out``."""
    setting, runners = measured.setting, {}
    names = [name for name in setting.candidates if setting.mode in CANDIDATES[name].modes]
    for index, name in enumerate(names):
        candidate = CANDIDATES[name]
        progress(f"preparing {name}", index, len(names))
        try:
            runner = build(candidate, setting, twins)
            runner.run()
            runners[name] = runner
        except NotHere as reason:
            measured.left_out[name] = str(reason)
        except torch.OutOfMemoryError:
            measured.left_out[name] = "out of memory"
        except RuntimeError as error:
            if not (candidate.compiled or candidate.float32_only):
                raise
            measured.left_out[name] = f"cannot run here: {first_line(error)}"
    if BASE not in runners:
        raise InputError(
            f"batch {setting.batch}, size {setting.size}: the device ran out of memory; use a smaller --batch"
        )
    return runners
