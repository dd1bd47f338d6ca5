"""``senet fold`` in Python: from a checkpoint and images to a checkpoint with fewer gates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from senet._version import __version__
from senet.data.images import ImageSet
from senet.data.loaders import make_loader
from senet.data.sources import open_source
from senet.data.transforms import TransformSpec
from senet.data.viewing import AS_TRAINED, Viewing
from senet.errors import InputError
from senet.evaluation.evaluate import load_network, unseen_images
from senet.evaluation.workers import default_workers
from senet.folding import files as fold_files
from senet.folding.fold import fold
from senet.folding.report import FoldReport
from senet.folding.search import Evaluate, accuracy_of
from senet.inspection.command import all_or_nothing, check_output
from senet.inspection.excitations import Excitations
from senet.inspection.record import record_excitations
from senet.runs.trained_on import TrainedOn, trained_on
from senet.system.device import pick_device
from senet.weights.load import save_weights

WEIGHTS = "folded.safetensors"
FILES = (WEIGHTS, *fold_files.FILES)
_IN_MEMORY = 2**30  # bytes of decoded images kept between steps of the search
_TIMED_BATCH = 8

Progress = Callable[[str, int, int], object]  # current task, steps done, total steps


@dataclass(frozen=True)
class FoldOptions:
    """Which gates to fold, and how to measure the folded network.

    Attributes:
        sites, stage, max_drop, constants: as in ``senet.fold``.
        excitations: a file from ``Excitations.save``, to use instead of recording.
        record_images: maximum number of images to record.
        images: maximum number of validation images for the accuracy; None means all.
        rounds: timing rounds per step; 0 turns timing off.
    """

    sites: str = "*"
    stage: int | None = None
    max_drop: float | None = None
    constants: bool = False
    excitations: str | Path | None = None
    record_images: int = 1024
    images: int | None = None
    rounds: int = 15

    def __post_init__(self) -> None:
        for name, least in (("record_images", 2), ("images", 1), ("rounds", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"fold: {name} is {value}; give at least {least}")


def fold_checkpoint(
    checkpoint: str | Path,
    data: str,
    output: str | Path,
    options: FoldOptions,
    *,
    view: Viewing = AS_TRAINED,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[FoldReport, dict[str, str]]:
    """Fold gates of a network from ``senet train``, and write ``FILES`` to a folder.

    Gates are recorded on training images if the data has any. Accuracy is measured on validation images. Files are
    written only after all computation has succeeded.

    Args:
        checkpoint: a ``.safetensors`` file written by ``senet train`` or by this function.
        data: as in ``senet.evaluation.evaluate.evaluate``.
        output: the folder. Files from an earlier run are replaced only with ``overwrite``.
        options: which gates to fold, and how to measure the result.
        view: how images are loaded and prepared.
        overwrite: replace files from an earlier run.
        progress: called as ``progress(task, done, total)``.

    Returns:
        the report, and a description of its inputs.

    Raises:
        InputError: the files exist already, there are no matching gates, the excitations belong to another network, …
    """
    output, checkpoint = Path(output), Path(checkpoint)
    check_output(output, overwrite, FILES, {"--checkpoint": checkpoint, "--excitations": options.excitations})
    network, metadata, spec = load_network(checkpoint, view.size)
    network = network.to(pick_device(view.device))
    unseen, sentence = unseen_images(checkpoint, data, view, metadata)
    known = trained_on(checkpoint, metadata)
    tell = progress or _silent
    batches = functools.partial(_batches, spec=spec, view=view)
    if options.excitations is None:
        shown = _evenly(_to_record(known, data, view, unseen), options.record_images)
        found = _recorded(network, batches(shown), spec, len(shown), tell)
    else:
        found = Excitations.load(options.excitations)
    judged = _evenly(unseen, options.images)
    timed, example = (_example(network, metadata, spec, batch) for batch in (_TIMED_BATCH, 1))
    report = fold(
        network,
        found,
        options.sites,
        stage=options.stage,
        evaluate=_evaluation(batches(judged), judged, spec),
        max_drop=options.max_drop,
        constants=options.constants,
        measure=fold_files.time_of(timed, options.rounds) if options.rounds else None,
        example_input=example,
        progress=lambda done, total, gate: tell(f"folding {gate}" if gate else "folding", done, total),
    )
    about = {
        **{"model": metadata["model"], "checkpoint": str(checkpoint), "data": data, "senet": __version__},
        "gates": f"means over {found.images} images of {options.excitations or data}",
        "accuracy": f"top-1 on {len(judged)} images ({sentence}); one image is {100 / len(judged):.3g} points",
    }
    with all_or_nothing(output) as place:
        save_weights(place / WEIGHTS, report.network, _described(report, metadata, known))
        fold_files.write_fold(place, report, about)
    return report, about


def _silent(what: str, done: int, total: int) -> None:
    pass


def _batches(images: ImageSet, *, spec: TransformSpec, view: Viewing) -> Iterable[Any]:
    workers = default_workers(images) if view.workers is None else view.workers
    shown = images.with_transform(spec.eval_transform("center"))
    return make_loader(shown, view.batch_size, train=False, workers=workers, on_bad_image=view.on_bad_image)


def _recorded(
    network: nn.Module, loader: Iterable[Any], spec: TransformSpec, count: int, tell: Progress
) -> Excitations:
    def progress(done: int) -> None:
        tell("recording the gates", done, count)

    return record_excitations(network, loader, preprocess=spec.normalize, top=0, progress=progress)


def _to_record(known: TrainedOn | None, data: str, view: Viewing, unseen: ImageSet) -> ImageSet:
    """The training images that belong to the validation images ``unseen``; ``unseen`` itself if there are none."""
    fraction = known.val_fraction if known else 0.2
    try:
        source = open_source(data, root=view.root, val_fraction=fraction, max_pixels=view.max_pixels)
    except InputError:
        return unseen
    return source.train if source.val.names == unseen.names else unseen


def _evenly(images: ImageSet, most: int | None) -> ImageSet:
    """At most ``most`` images, evenly spaced."""
    if most is None or len(images) <= most:
        return images
    return images.subset([index * len(images) // most for index in range(most)])


def _evaluation(loader: Iterable[Any], images: ImageSet, spec: TransformSpec) -> Evaluate:
    """A function that measures accuracy. Decoded images stay in memory if they fit."""
    if 3 * spec.size**2 * len(images) > _IN_MEMORY:
        return accuracy_of(loader, spec.normalize)
    kept: list[Any] = []

    def evaluate(network: nn.Module) -> float:
        if not kept:
            kept.extend(loader)
        return accuracy_of(kept, spec.normalize)(network)

    return evaluate


def _example(network: nn.Module, metadata: dict[str, Any], spec: TransformSpec, batch: int) -> torch.Tensor:
    like = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, metadata.get("in_chans", 3), spec.size, spec.size, generator=generator)
    return x.to(like.device, like.dtype)


def _described(report: FoldReport, metadata: dict[str, Any], known: TrainedOn | None) -> dict[str, Any]:
    """Metadata that rebuilds the folded network and identifies its training images."""
    config: Any = report.network.network_config
    structure = {"attached": config.attached, "folded": config.folded} if config.folded else {}
    final = report.final
    metrics = {} if final is None else {"metrics": {"val_error": 100 - final.accuracy}}
    origin = {} if known is None else {"trained_on": asdict(known)}
    return metadata | structure | metrics | origin
