"""A saved network on images: its errors (``evaluate``), or its answers (``predict``). Needs no Lightning."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from senet.data.images import ImageSet
from senet.data.loaders import MAX_BAD_FRACTION, Batch, ImageLoader, make_loader
from senet.data.sources import open_eval, open_files
from senet.data.transforms import TransformSpec
from senet.data.viewing import AS_TRAINED, Viewing
from senet.errors import InputError
from senet.evaluation.non_finite import first_not_finite
from senet.runs.trained_on import trained_on
from senet.system.device import pick_device
from senet.weights.load import build_from_checkpoint
from senet.weights.metadata import check_fields

_LOG = logging.getLogger("senet.evaluation")
TOP5_CLASSES = 6  # below this many classes a top-5 error says nothing


@dataclass(frozen=True)
class Evaluation:
    """Errors in percent with their 95 % Wilson intervals (over images); top-5 is None below six classes."""

    checkpoint: str
    model: str
    data: str
    images: int
    skipped: dict[str, str]
    crops: str
    size: int
    top1_error: float
    top1_interval: tuple[float, float]
    top5_error: float | None
    top5_interval: tuple[float, float] | None
    seconds: float
    damaged: dict[str, str] = field(default_factory=dict)  # images that could be decoded all the same

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first, with their probabilities."""

    name: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass
class Predictions:
    """Iterate to predict; ``bad`` (name → reason) is complete when the iteration is over."""

    rows: Iterator[Prediction]
    bad: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Prediction]:
        return self.rows


def evaluate(
    checkpoint: str | Path,
    data: str,
    *,
    crops: Literal["center", "ten"] = "center",
    view: Viewing = AS_TRAINED,
) -> Evaluation:
    """Top-1 and top-5 error of a checkpoint.

    Args:
        checkpoint: a ``.safetensors`` file of ``senet train``.
        data: a folder or data set. The folder that the run was trained on gives its validation images only.
        crops: "center", or "ten": the class probabilities are averaged over four corners, centre, and their mirrors.
        view: how the images are shown.

    Raises:
        InputError: no such checkpoint or data, classes that the network does not know, or weights or outputs that are
            NaN or infinite: it names the first.
    """
    network, metadata, spec = load_network(checkpoint, view.size)
    images, sentence = unseen_images(Path(checkpoint), data, view, metadata)
    target = pick_device(view.device)
    loader = _loader(images.with_transform(spec.eval_transform(crops)), crops, view, MAX_BAD_FRACTION)
    start = time.perf_counter()
    answers = _forward(network.to(target), loader, spec, target, f"{checkpoint}: on images of {data}")
    counted, top1, top5 = _count(answers)
    if counted == 0:
        raise InputError(f"none of the images of {data} can be read")
    has_top5 = len(metadata["classes"]) >= TOP5_CLASSES
    return Evaluation(
        checkpoint=str(checkpoint),
        model=metadata["model"],
        data=sentence,
        images=counted,
        skipped=loader.unreadable,
        crops=crops,
        size=spec.size,
        top1_error=_percent(counted - top1, counted),
        top1_interval=_percent_interval(counted - top1, counted),
        top5_error=_percent(counted - top5, counted) if has_top5 else None,
        top5_interval=_percent_interval(counted - top5, counted) if has_top5 else None,
        seconds=time.perf_counter() - start,
        damaged=dict(loader.damaged),
    )


def predict(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    *,
    top_k: int = 1,
    crops: Literal["center", "ten"] = "center",
    view: Viewing = AS_TRAINED,
) -> Predictions:
    """The likeliest classes of image files, or of all images in folders; results come as batches are done.

    An image that cannot be read is named in ``bad`` and the rest is done.

    Raises:
        InputError: no such checkpoint, a path that is missing, no images at all, or weights or outputs (while
            iterating) that are NaN or infinite: it names the first.
    """
    if top_k < 1:
        raise InputError(f"--top-k is {top_k}; give at least 1")
    network, metadata, spec = load_network(checkpoint, view.size)
    images = open_files(paths, max_pixels=view.max_pixels)
    target = pick_device(view.device)
    # Each answer stands for itself: every bad image is named, however many there are.
    every = replace(view, on_bad_image="skip")
    loader = _loader(images.with_transform(spec.eval_transform(crops)), crops, every, 1.0)
    classes = metadata["classes"]
    result = Predictions(iter(()))

    def rows() -> Iterator[Prediction]:
        for batch, probabilities in _forward(network.to(target), loader, spec, target, str(checkpoint)):
            values, numbers = probabilities.topk(min(top_k, len(classes)))
            for index, number, value in zip(batch.indices.tolist(), numbers.tolist(), values.tolist(), strict=True):
                yield Prediction(images.names[index], tuple(classes[n] for n in number), tuple(value))
        result.bad |= loader.unreadable

    result.rows = rows()
    return result


def load_network(checkpoint: str | Path, size: int | None) -> tuple[nn.Module, dict[str, Any], TransformSpec]:
    """A checkpoint's network, metadata and transform (at ``size`` pixels where given)."""
    network, metadata = build_from_checkpoint(checkpoint)
    missing = [key for key in ("classes", "transform") if not metadata.get(key)]
    if missing:
        raise InputError(f"{checkpoint}: does not say its {missing[0]}; use a checkpoint written by `senet train`")
    classes, outputs = len(metadata["classes"]), metadata.get("num_classes", 1000)
    if classes != outputs:
        raise InputError(f"{checkpoint}: its metadata name {classes} classes, its network has {outputs}; save it again")
    spec = described_transform(metadata["transform"], checkpoint, size)
    if spec.channels != metadata.get("in_chans", 3):
        raise InputError(
            f"{checkpoint}: its transform gives {spec.channels}-channel images, its network takes "
            f"{metadata.get('in_chans', 3)} channels; save it again"
        )
    return network, metadata, spec


def described_transform(values: dict[str, Any], label: object, size: int | None = None) -> TransformSpec:
    """The transform in a weight file's metadata, at ``size`` pixels where given.

    Args:
        values: the entry ``transform``.
        label: what messages call the file.
        size: side of the network's input instead of the file's.

    Raises:
        InputError: a value is of a wrong type or not allowed, or the images would be too large.
    """
    check_fields(values, TransformSpec, f"{label}: its metadata are damaged: transform:")
    try:
        spec = TransformSpec.from_dict(values)
    except (InputError, TypeError, ValueError) as error:  # three numbers where two belong, say
        raise InputError(f"{label}: its metadata are damaged: transform: {error}") from error
    return spec if size is None else spec.with_size(size)


def unseen_images(checkpoint: Path, data: str, view: Viewing, metadata: dict[str, Any]) -> tuple[ImageSet, str]:
    """The images to evaluate on, without those that the network was trained on: they would flatter it."""
    known = trained_on(checkpoint, metadata)
    seen = known if known is not None and Path(data).is_dir() and known.is_in(Path(data)) else None
    images, sentence = open_eval(
        data,
        root=view.root,
        classes=metadata["classes"],
        val_fraction=known.val_fraction if known else 0.2,
        part="val" if seen else "auto",
        max_pixels=view.max_pixels,
    )
    if seen and seen.differs(images):
        _LOG.warning(
            "%s has other images now than when %s was trained on it, perhaps on some of those that it is judged on",
            data,
            checkpoint,
        )
    return images, sentence


def _count(answers: Iterator[tuple[Batch, Tensor]]) -> tuple[int, int, int]:
    """Images, and those whose class is the likeliest, and among the five likeliest."""
    counted, top1, top5 = 0, 0, 0
    for batch, probabilities in answers:
        hits = probabilities.topk(min(5, probabilities.shape[1])).indices == batch.targets[:, None]
        counted += len(batch.targets)
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
    return counted, top1, top5


def _loader(images: ImageSet, crops: str, view: Viewing, max_bad_fraction: float) -> ImageLoader:
    """Batches of as many views as ``view`` says, whether an image has one or ten."""
    from senet.evaluation.workers import default_workers

    return make_loader(
        images,
        max(1, view.batch_size // 10) if crops == "ten" else view.batch_size,
        train=False,
        workers=default_workers(images) if view.workers is None else view.workers,
        on_bad_image=view.on_bad_image,
        max_bad_fraction=max_bad_fraction,
    )


def _forward(
    network: nn.Module, loader: ImageLoader, spec: TransformSpec, device: torch.device, label: str
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with class probabilities (N, classes) on the CPU, averaged over crops where there are ten.

    Raises:
        InputError: an output is NaN or infinite; ``label`` is what the message begins with.
    """
    for batch in loader:
        if not len(batch.targets):  # none of its images could be read
            continue
        images = batch.images.to(device, non_blocking=True)
        crops = images.shape[1] if images.dim() == 5 else 1
        # A context around `yield` would stay in force in the caller's code.
        with torch.inference_mode():
            x = spec.normalize(images.flatten(0, 1) if crops > 1 else images)
            logits = network(x).float()
            if not logits.isfinite().all():
                raise InputError(f"{label}: {first_not_finite(network, x)}")
            probabilities = logits.softmax(dim=1).unflatten(0, (-1, crops)).mean(dim=1).cpu()
        yield batch, probabilities


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole


def _percent_interval(part: int, whole: int) -> tuple[float, float]:
    """The 95 % interval of a share, in percent: Wilson's (1927), which keeps its coverage near 0 % and 100 %."""
    from scipy.stats import binomtest

    found = binomtest(part, whole).proportion_ci(0.95, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)
