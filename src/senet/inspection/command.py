"""``senet inspect`` in Python: a network, images, and the report on what its gates do with them."""

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
    """A network, the images to show it (with their transform), and where both come from."""

    network: nn.Module
    images: ImageSet
    spec: TransformSpec
    about: dict[str, str]

    def picture(self, number: int) -> NDArray[np.uint8] | None:
        """What the network sees of an image: uint8 (H, W, 1|3); None where it cannot be read."""
        try:
            return self.images[number].image.permute(1, 2, 0).numpy()
        except BadImageError:
            return None


def open_checkpoint(checkpoint: str | Path, data: str, view: Viewing = AS_TRAINED) -> Subject:
    """A network of ``senet train``. Of the data that it was trained on, its validation images are taken."""
    network, metadata, spec = load_network(checkpoint, view.size)
    images, sentence = unseen_images(Path(checkpoint), data, view, metadata)
    about = {"model": metadata["model"], "data": data, "images": sentence, "checkpoint": str(checkpoint)}
    return _subject(network, images, spec, about)


def open_model(model: str, pretrained: str | None, data: str, view: Viewing = AS_TRAINED) -> Subject:
    """A network of the zoo with weights from a file or another source. Its classifier is not needed.

    Images are prepared as the weights' file says, or as is known of the weights; else as for ImageNet.
    """
    images, sentence = open_eval(data, root=view.root, max_pixels=view.max_pixels)
    classes = 1000 if model.startswith("torchvision:") else 0  # torchvision's networks do not go without a classifier
    network = create_model(model, classes, pretrained=pretrained).eval()
    spec = _prepared_for(network, model, pretrained)
    spec = spec if view.size is None else spec.with_size(view.size)
    about = {"model": model, "data": data, "images": sentence, "weights": pretrained or "none: as initialised"}
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
    """Record the gates of a network over images and write the report (``senet.inspection.report.FILES``) into a folder.

    Nothing is written before everything has been computed; whatever stops it leaves the folder as it was.

    Args:
        subject: from ``open_checkpoint`` or ``open_model``.
        output: the folder; files of an earlier report in it are replaced with ``overwrite`` only.
        sites: a shell pattern of the gates to record.
        classes: what the two figures show; by default a few, evenly spread.
        top: images to keep that open, and that close, each channel most.
        thresholds: where the gate doctor draws its lines.
        view: how the images are shown; their size and root are the subject's.
        progress: called with the number of images so far.

    Raises:
        InputError: a report is there already, no gate, a class that is not there or has no images, NaN, …
    """
    output = Path(output)
    check_output(output, overwrite)
    filled = sorted({subject.images.classes[target] for target in subject.images.targets if target >= 0})
    for name in classes or ():
        if name not in filled:
            few = ", ".join(filled[:8]) + (", …" if len(filled) > 8 else "")
            raise InputError(f"there are no images of a class {name!r} here to draw; there are {few}")
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
    """Refuse a folder that holds one of these files, or that cannot be made or written into.

    ``inputs`` are options and the files that they name: they must not be among those to be replaced.
    """
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file; give a folder as --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written into; give another --output")
    targets = {(output / name).resolve() for name in files}
    for option, named in (inputs or {}).items():
        if named and Path(named).resolve() in targets:
            raise InputError(f"{option} {named} is a file that this command writes; give another --output")
    for name in files:
        if (output / name).exists() and not overwrite:
            raise InputError(f"{output / name} exists; choose another --output, or --overwrite")


@contextmanager
def all_or_nothing(output: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to ``output`` at the end, or vanish if there is no such end."""
    # Inside of the folder if it is there: it may be another disk than what is around it, or all that may be written.
    with temporary_folder(output if output.is_dir() else output.parent) as folder:
        yield folder
        output.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir()):
            os.replace(path, output / path.name)
