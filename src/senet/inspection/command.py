"""``senet inspect`` in Python: from a network and images to a report on its gates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from senet._version import __version__
from senet.data.decode import BadImageError
from senet.data.images import ImageSet
from senet.data.loaders import make_loader
from senet.data.sources import open_eval
from senet.data.transforms import TransformSpec
from senet.data.viewing import AS_TRAINED, Viewing
from senet.errors import InputError
from senet.evaluation.evaluate import described_transform, load_network, unseen_images
from senet.evaluation.workers import default_workers
from senet.inspection.doctor import Diagnosis, Thresholds
from senet.inspection.record import record_excitations
from senet.inspection.report import FILES, write_report
from senet.models.registry import NetworkConfig, model_spec
from senet.system.atomic import temporary_folder
from senet.system.device import pick_device
from senet.weights.create import create_model
from senet.weights.known import find_known
from senet.weights.load import load_weights


@dataclass(frozen=True)
class Subject:
    """A network, its input images (with their transform), and a description of both."""

    network: nn.Module
    images: ImageSet
    spec: TransformSpec
    about: dict[str, str]

    def picture(self, number: int) -> NDArray[np.uint8] | None:
        """An image after the transform, uint8 (H, W, 1|3); None if it cannot be read."""
        try:
            return self.images[number].image.permute(1, 2, 0).numpy()
        except BadImageError:
            return None


def open_checkpoint(checkpoint: str | Path, data: str, view: Viewing = AS_TRAINED) -> Subject:
    """Open a network from ``senet train``. If ``data`` is its training data, only validation images are used."""
    network, metadata, spec = load_network(checkpoint, view.size)
    images, sentence = unseen_images(Path(checkpoint), data, view, metadata)
    about = {"model": metadata["model"], "data": data, "images": sentence, "checkpoint": str(checkpoint)}
    return _subject(network, images, spec, about)


def open_model(model: str, pretrained: str | None, data: str, view: Viewing = AS_TRAINED) -> Subject:
    """Open a network by name, with weights from a file or another source. Its classifier is not needed.

    Images are prepared as the weight file specifies, or as known for these weights; otherwise, as for ImageNet.
    """
    images, sentence = open_eval(data, root=view.root, max_pixels=view.max_pixels)
    classes = 1000 if model.startswith("torchvision:") else 0  # torchvision's networks need a classifier
    network = create_model(model, classes, pretrained=pretrained).eval()
    spec = _prepared_for(network, model, pretrained)
    spec = spec if view.size is None else spec.with_size(view.size)
    about = {"model": model, "data": data, "images": sentence, "weights": pretrained or "none: as initialized"}
    return _subject(network, images, spec, about)


def _prepared_for(network: nn.Module, model: str, pretrained: str | None) -> TransformSpec:
    described = load_weights(pretrained)[1].get("transform") if pretrained and Path(pretrained).is_file() else None
    if described:
        return described_transform(described, pretrained)
    known = find_known(pretrained, NetworkConfig(model, se=model_spec(model).se))
    if known is not None:
        resize = round(known.input_size / known.crop)
        return TransformSpec(known.input_size, known.mean, known.std, resize, _interpolation(known.interpolation))
    own = getattr(network, "pretrained_cfg", None)  # timm's
    if own:
        size = own["input_size"][-1]
        resize = round(size / own["crop_pct"])
        return TransformSpec(size, own["mean"], own["std"], resize, _interpolation(own["interpolation"]))
    return TransformSpec(model_spec(model).input_size)


def _interpolation(name: str) -> Literal["bilinear", "bicubic"]:
    return "bicubic" if name == "bicubic" else "bilinear"


def _subject(network: nn.Module, images: ImageSet, spec: TransformSpec, about: dict[str, str]) -> Subject:
    return Subject(network, images.with_transform(spec.eval_transform("center")), spec, about | {"senet": __version__})


def inspect(
    subject: Subject,
    output: str | Path,
    *,
    overwrite: bool = False,
    sites: str = "*",
    classes: Sequence[str] | None = None,
    top: int = 8,
    thresholds: Thresholds | None = None,
    view: Viewing = AS_TRAINED,
    progress: Callable[[int], None] | None = None,
) -> list[Diagnosis]:
    """Record the gates of a network over images, and write the report (``senet.inspection.report.FILES``) to a folder.

    Files are written only after all computation has succeeded. A failure leaves the folder unchanged.

    Args:
        subject: from ``open_checkpoint`` or ``open_model``.
        output: the folder. Files from an earlier report are replaced only with ``overwrite``.
        overwrite: replace files from an earlier report.
        sites: a shell pattern of the gates to record.
        classes: classes for the two figures; by default a few, evenly spaced.
        top: number of images to keep that open each channel most, and that close it most.
        thresholds: the limits of the gate doctor.
        view: how images are loaded; their size and root come from the subject.
        progress: called with the number of images so far.

    Returns:
        the gate doctor's diagnosis of each gate.

    Raises:
        InputError: a report exists already, no gate matches, a class is unknown or has no images, NaN, …
    """
    output = Path(output)
    check_output(output, overwrite)
    filled = sorted({subject.images.classes[target] for target in subject.images.targets if target >= 0})
    for name in classes or ():
        if name not in filled:
            few = ", ".join(filled[:8]) + (", …" if len(filled) > 8 else "")
            raise InputError(f"class {name!r} has no images here, so it cannot be drawn; choose from {few}")
    loader = make_loader(
        subject.images,
        view.batch_size,
        train=False,
        workers=default_workers(subject.images) if view.workers is None else view.workers,
        on_bad_image=view.on_bad_image,
    )
    excitations = record_excitations(
        subject.network.to(pick_device(view.device)),
        loader,
        preprocess=subject.spec.normalize,
        sites=sites,
        top=top,
        progress=progress,
    )
    excitations.about |= subject.about
    with all_or_nothing(output) as folder:
        return write_report(folder, excitations, thresholds=thresholds, classes=classes, picture=subject.picture)


def check_output(
    output: Path, overwrite: bool, files: Sequence[str] = FILES, inputs: Mapping[str, str | Path | None] | None = None
) -> None:
    """Refuse an output folder that holds one of ``files``, or that cannot be created or written to.

    ``inputs`` maps options to the files that they name, which must not be overwritten.
    """
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file; choose a folder as --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written to; choose another --output")
    targets = {(output / name).resolve() for name in files}
    for option, named in (inputs or {}).items():
        if named and Path(named).resolve() in targets:
            raise InputError(f"{option} {named} would be overwritten by this command; choose another --output")
    for name in files:
        if (output / name).exists() and not overwrite:
            raise InputError(f"{output / name} exists; choose another --output, or use --overwrite")


@contextmanager
def all_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary folder whose files move to ``output`` at the end, or are discarded on failure."""
    # Inside the output folder if it exists: it may be on another disk, or the only writable place.
    with temporary_folder(output if output.is_dir() else output.parent) as folder:
        yield folder
        output.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir()):
            os.replace(path, output / path.name)
