"""Runs a saved network on images and returns its errors (``evaluate``) or predictions (``predict``). No Lightning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from senet.acceleration.use import compiled
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
TOP5_CLASSES = 6  # with fewer classes, the top-5 error is meaningless
# Capturing a network takes seconds: as long as it saves over about this many images of 224 pixels on two cores.
COMPILED_FROM = 256


@dataclass(frozen=True)
class Evaluation:
    """Errors in percent with 95 % Wilson intervals over images. Top-5 is None for fewer than six classes."""

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
    damaged: dict[str, str] = field(default_factory=dict)  # images that could still be decoded

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, best first, with their probabilities."""

    name: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass
class Predictions:
    """Iterate to predict. ``bad`` (name → reason) is complete at the end of the iteration."""

    rows: Iterator[Prediction]
    bad: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Prediction]:
        return self.rows


def evaluate(
    checkpoint: str | Path,
    data: str,
    *,
    crops: Literal["center", "ten"] = "center",
    compile: str | None = None,
    view: Viewing = AS_TRAINED,
) -> Evaluation:
    """Measure the top-1 and top-5 error of a checkpoint.

    Args:
        checkpoint: A ``.safetensors`` file from ``senet train``.
        data: A folder or dataset. If the run was trained on this folder, only its validation images are used.
        crops: "center", or "ten" to average class probabilities over the four corners, the center, and their mirrors.
        compile: "senet", "inductor", or "off", as in ``senet.acceleration.use``. None is "senet" from 256 images on.
        view: How the images are prepared and loaded.

    Raises:
        InputError: No such checkpoint or data, classes that the network does not know, or weights or outputs that are
            NaN or infinite (the message names the first).
    """
    network, metadata, spec = load_network(checkpoint, view.size)
    images, sentence = unseen_images(Path(checkpoint), data, view, metadata)
    target = pick_device(view.device)
    loader = _loader(images.with_transform(spec.eval_transform(crops)), crops, view, MAX_BAD_FRACTION)
    start = time.perf_counter()
    run = compiled(network.to(target), compile or _worthwhile(images))
    answers = _forward(network, run, loader, spec, target, f"{checkpoint}: on images of {data}")
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
    compile: str | None = None,
    view: Viewing = AS_TRAINED,
) -> Predictions:
    """Predict the most likely classes of image files, or of all images in folders, batch by batch.

    An image that cannot be read is listed in ``bad`` and skipped.

    Raises:
        InputError: No such checkpoint, a missing path, no images, or weights or (while iterating) outputs that are NaN
            or infinite (the message names the first).
    """
    if top_k < 1:
        raise InputError(f"--top-k is {top_k}; give at least 1")
    network, metadata, spec = load_network(checkpoint, view.size)
    images = open_files(paths, max_pixels=view.max_pixels)
    target = pick_device(view.device)
    # Predictions are independent, so any number of bad images is allowed, and each is listed.
    every = replace(view, on_bad_image="skip")
    loader = _loader(images.with_transform(spec.eval_transform(crops)), crops, every, 1.0)
    classes = metadata["classes"]
    run = compiled(network.to(target), compile or _worthwhile(images))
    result = Predictions(iter(()))

    def rows() -> Iterator[Prediction]:
        for batch, probabilities in _forward(network, run, loader, spec, target, str(checkpoint)):
            values, numbers = probabilities.topk(min(top_k, len(classes)))
            for index, number, value in zip(batch.indices.tolist(), numbers.tolist(), values.tolist(), strict=True):
                yield Prediction(images.names[index], tuple(classes[n] for n in number), tuple(value))
        result.bad |= loader.unreadable

    result.rows = rows()
    return result


def load_network(checkpoint: str | Path, size: int | None) -> tuple[nn.Module, dict[str, Any], TransformSpec]:
    """The network, metadata, and transform (at ``size`` pixels, if given) of a checkpoint."""
    network, metadata = build_from_checkpoint(checkpoint)
    missing = [key for key in ("classes", "transform") if not metadata.get(key)]
    if missing:
        raise InputError(f"{checkpoint}: its metadata lack {missing[0]}; use a checkpoint written by `senet train`")
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
    """The transform in the metadata of a weight file, at ``size`` pixels if given.

    Args:
        values: The entry ``transform``.
        label: Name of the file in messages.
        size: Side of the network's input in pixels, instead of the file's.

    Raises:
        InputError: A value has the wrong type or is not allowed, or the images would be too large.
    """
    check_fields(values, TransformSpec, f"{label}: its metadata are damaged: transform:")
    try:
        spec = TransformSpec.from_dict(values)
    except (InputError, TypeError, ValueError) as error:  # for example, three numbers instead of two
        raise InputError(f"{label}: its metadata are damaged: transform: {error}") from error
    return spec if size is None else spec.with_size(size)


def unseen_images(checkpoint: Path, data: str, view: Viewing, metadata: dict[str, Any]) -> tuple[ImageSet, str]:
    """The images to evaluate on, without those that the network was trained on, which would bias the result."""
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
            "%s has other images now than when %s was trained on it; some of them may have been training images",
            data,
            checkpoint,
        )
    return images, sentence


def _count(answers: Iterator[tuple[Batch, Tensor]]) -> tuple[int, int, int]:
    """The numbers of images, of top-1 hits, and of top-5 hits."""
    counted, top1, top5 = 0, 0, 0
    for batch, probabilities in answers:
        hits = probabilities.topk(min(5, probabilities.shape[1])).indices == batch.targets[:, None]
        counted += len(batch.targets)
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
    return counted, top1, top5


def _loader(images: ImageSet, crops: str, view: Viewing, max_bad_fraction: float) -> ImageLoader:
    """A loader with ``view.batch_size`` crops per batch, for one or ten crops per image."""
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
    network: nn.Module,
    run: Callable[[Tensor], Tensor],
    loader: ImageLoader,
    spec: TransformSpec,
    device: torch.device,
    label: str,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches with class probabilities (N, classes) on the CPU, averaged over the crops of an image.

    ``run`` computes what ``network`` does; the network itself is asked where an output becomes infinite or NaN.

    Raises:
        InputError: An output is NaN or infinite. The message starts with ``label``.
    """
    for batch in loader:
        if not len(batch.targets):  # none of its images can be read
            continue
        images = batch.images.to(device, non_blocking=True)
        crops = images.shape[1] if images.dim() == 5 else 1
        # A context manager around `yield` would stay active in the caller's code.
        with torch.inference_mode():
            x = spec.normalize(images.flatten(0, 1) if crops > 1 else images)
            logits = run(x).float()
            if not logits.isfinite().all():
                raise InputError(f"{label}: {first_not_finite(network, x)}")
            probabilities = logits.softmax(dim=1).unflatten(0, (-1, crops)).mean(dim=1).cpu()
        yield batch, probabilities


def _worthwhile(images: ImageSet) -> str:
    return "senet" if len(images) >= COMPILED_FROM else "off"


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole


def _percent_interval(part: int, whole: int) -> tuple[float, float]:
    """Wilson's (1927) 95 % interval of a proportion, in percent, which keeps its coverage near 0 % and 100 %."""
    from scipy.stats import binomtest

    found = binomtest(part, whole).proportion_ci(0.95, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)
