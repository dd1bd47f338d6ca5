"""Speed as a ratio: candidates run interleaved, round by round, so drift of the machine affects them equally."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, in seconds, one per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median time of a round, in seconds."""
        return statistics.median(self.rounds)

    @property
    def fastest(self) -> float:
        """The fastest round, in seconds: on a shared machine, the round with the least interference."""
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
    """Time each candidate once per round, in rotating order, after ``warmup`` rounds that are not counted.

    Args:
        candidates: name → function without arguments.
        rounds: number of counted rounds, at least 2.
        warmup: number of rounds before them.
        device: the device that computes; a CUDA device is synchronized around each call.
        pause: seconds before each call, in which the threads of another engine's pool go to sleep.
        before: called before each call, not timed.
        on_round: called after each counted round with the times so far, to show progress and to keep partial results.

    Returns:
        name → the times of the counted rounds.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for index in range(warmup + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:  # no candidate always follows the same one
            if before is not None:
                before()
            synchronize()
            time.sleep(pause)
            start = time.perf_counter()
            candidates[name]()
            synchronize()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
        if on_round is not None and index >= warmup:
            on_round({name: Timing(tuple(values)) for name, values in times.items()})
    return {name: Timing(tuple(values)) for name, values in times.items()}


def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """Median and quartiles of the ratios round by round; with a single round, its ratio."""
    ratios = [a / b for a, b in zip(numerator.rounds, denominator.rounds, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    q25, median, q75 = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, q25, q75)
