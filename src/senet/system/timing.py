"""Speed as a ratio: candidates run in turn, round by round, so that a drifting machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, in seconds, one a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median time of a round, in seconds."""
        return statistics.median(self.rounds)

    @property
    def fastest(self) -> float:
        """The fastest round, in seconds: on a shared machine the time that others disturbed least."""
        return min(self.rounds)


@dataclass(frozen=True)
class Ratio:
    """The ratio of two candidates, round by round: median and quartiles."""

    median: float
    q25: float
    q75: float


def interleaved(
    candidates: dict[str, Callable[[], object]],
    rounds: int = 20,
    warmup: int = 3,
    device: str = "cpu",
    pause: float = 0.0,
    before: Callable[[], object] | None = None,
    on_round: Callable[[dict[str, Timing]], object] | None = None,
) -> dict[str, Timing]:
    """Time each candidate once a round, in turning order, after ``warmup`` rounds that do not count.

    Args:
        candidates: name → function without arguments.
        rounds: at least 2.
        device: of the work; a CUDA device is synchronised around each call.
        pause: seconds before each call, in which the threads of another engine's pool fall asleep.
        before: called before each call, outside of the time.
        on_round: called after each counted round with the times so far, for progress and for a run that is stopped.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for index in range(warmup + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:  # no candidate always follows the same one
            if before is not None:
                before()
            synchronise()
            time.sleep(pause)
            start = time.perf_counter()
            candidates[name]()
            synchronise()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
        if on_round is not None and index >= warmup:
            on_round({name: Timing(tuple(values)) for name, values in times.items()})
    return {name: Timing(tuple(values)) for name, values in times.items()}


def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """Median and quartiles of the ratios of the same rounds; of one round, its ratio."""
    ratios = [a / b for a, b in zip(numerator.rounds, denominator.rounds, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    q25, median, q75 = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, q25, q75)
