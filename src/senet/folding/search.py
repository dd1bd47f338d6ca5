"""The search within an accuracy budget: one gate at a time, least movement first, on top of the last kept fold."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.folding.apply import Folder
from senet.folding.report import FoldStep
from senet.inspection.record import device_of, parts_of, run
from senet.nn.modes import evaluating

Evaluate = Callable[[nn.Module], float]
Measure = Callable[[nn.Module, nn.Module], tuple[float, float, float]]
Progress = Callable[[int, int, str], object]

_ROUNDING = 1e-9  # of percentages


def search(
    folder: Folder,
    order: Sequence[str],
    variations: Mapping[str, float],
    evaluate: Evaluate,
    max_drop: float | None,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> list[FoldStep]:
    """Measure the original network, then try each gate in ``order``; see ``senet.fold``.

    Accuracy is not monotonic in the number of folds, so every gate is tried, without bisection.
    """
    start = folder.apply([])
    base = _finite(evaluate, start, "the network as it is")
    parameters = sum(p.numel() for p in start.parameters())
    steps = [FoldStep("", True, 0, base, 0.0, parameters, math.nan, None if measure is None else (1.0, 1.0, 1.0))]
    kept: list[str] = []
    for done, name in enumerate(order):
        if progress is not None:
            progress(done, len(order), name)
        network = folder.apply([*kept, name])
        accuracy = _finite(evaluate, network, f"the network without {name}")
        is_kept = max_drop is None or base - accuracy <= max_drop + _ROUNDING
        time = measure(start, network) if measure is not None else None
        count = sum(p.numel() for p in network.parameters())
        kept += [name] if is_kept else []
        folds = len(kept) if is_kept else len(kept) + 1
        steps.append(FoldStep(name, is_kept, folds, accuracy, base - accuracy, count, variations[name], time))
    if progress is not None:
        progress(len(order), len(order), "")
    return steps


def _finite(evaluate: Evaluate, network: nn.Module, what: str) -> float:
    accuracy = float(evaluate(network))
    if not math.isfinite(accuracy):
        raise InputError(f"fold: evaluate returned {accuracy} for {what}; it must return a finite accuracy")
    return accuracy


def accuracy_of(loader: Iterable[Any], preprocess: Callable[[Tensor], Tensor] | None = None) -> Evaluate:
    """A function that measures the top-1 accuracy of a network on a loader, in percent.

    Args:
        loader: yields tuples of (images, targets, …). Each call iterates over it once. Images of unknown class (−1) do
            not count.
        preprocess: turns the loader's images into the network's input, on the network's device.
    """

    def evaluate(network: nn.Module) -> float:
        device = device_of(network)
        right, count = 0, 0
        with evaluating(network), torch.inference_mode():
            for batch in loader:
                images, targets, _ = parts_of(batch[:2] if isinstance(batch, (tuple, list)) else batch, 0)
                if not len(images):
                    continue
                answers = run(network, images.to(device, non_blocking=True), preprocess)
                if not isinstance(answers, Tensor) or answers.ndim != 2:
                    shape = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
                    raise InputError(
                        f"fold: the network returns {shape}, not (N, classes); pass a function as evaluate="
                    )
                right += int((answers.argmax(1).cpu().numpy() == targets).sum())
                count += int((targets >= 0).sum())
        if not count:
            raise InputError(
                "fold: the evaluation loader gave no images with a class; it must be iterable once per measurement"
            )
        return 100 * right / count

    return evaluate
