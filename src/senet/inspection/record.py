"""``senet.record_excitations``: run a network over images, and collect statistics of its gates in one pass."""

from __future__ import annotations

import fnmatch
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.inspection.excitations import Excitations, shown_images
from senet.inspection.site_excitations import Integers, SiteExcitations
from senet.nn.modes import evaluating
from senet.surgery.find_gates import Gate, find_gates, plain_network

_LOG = logging.getLogger("senet.inspection")


def record_excitations(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    sites: str = "*",
    top: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Excitations:
    """Record mean and spread of each SE gate's excitation, by class and overall, over a loader's images (Figs. 6, 7).

    The network runs in evaluation mode on its current device, and its mode is restored afterward. Memory does not
    depend on the number of images. In a multi-process run, each process records its share, and ``Excitations.merge``
    combines them.

    Args:
        model: any network with SE gates: ours, timm's, or torchvision's; plain, wrapped, compiled, or accelerated
            (``senet.surgery.find_gates`` defines what counts as a gate).
        loader: yields images, (images, targets), or (images, targets, numbers), as tuples or lists. Images (N, C, *S)
            are moved to the network's device. Targets (N,) are class indices, −1 for unknown. Numbers (N,) identify
            images in the data set; by default, images are numbered in order.
        preprocess: turns the loader's images into the network's input, on its device; ``TransformSpec.normalize``, for
            example.
        classes: names of the classes; by default those of the loader's data set, else "0", "1", …
        names: names of all images by number, such as paths; by default those of the loader's image set.
        sites: a shell pattern of gate names; ``"layer4.*"`` records only those.
        top: number of images to keep that open each channel most, and that close it most.
        progress: called after each batch with the number of images so far.

    Returns:
        the statistics of each gate that ran.

    Raises:
        InputError: no matching gate, no images, invalid targets, a network on the meta device, or a gate with NaN or
            infinity; the message names it.
    """
    network = plain_network(model)
    gates = _chosen(find_gates(network), sites, type(network).__name__)
    if top < 0:
        raise InputError(f"record_excitations: top={top} is not allowed; give at least 0")
    given = tuple(classes) if classes is not None else _classes_of(loader)
    recorder = _Recorder(gates, given, top)
    device = device_of(network)
    seen = 0
    # Compiled parts run eagerly, because compiled code does not call hooks that were added later.
    with evaluating(network), torch.no_grad(), torch.compiler.set_stance("force_eager"), ExitStack() as stack:
        for gate in gates:
            stack.enter_context(gate.listening(recorder.receiver(gate)))
        for batch in loader:
            images, targets, numbers = parts_of(batch, seen)
            if not len(images):
                continue
            run(network, images.to(device, non_blocking=True), preprocess)
            recorder.end_of_batch(targets, numbers)
            seen += len(images)
            if progress is not None:
                progress(seen)
    if seen == 0:
        raise InputError("record_excitations: the loader gave no images; check the data")
    return recorder.result(names if names is not None else getattr(getattr(loader, "images", None), "names", None))


class _Recorder:
    """Holds the excitations of one batch on the device, and the statistics of all earlier batches."""

    def __init__(self, gates: list[Gate], classes: tuple[str, ...] | None, top: int) -> None:
        self.gates = {gate.name: gate for gate in gates}
        self.classes, self.top = classes, top
        self.sites: dict[str, SiteExcitations] = {}
        self.batch: list[tuple[str, Tensor]] = []

    def receiver(self, gate: Gate) -> Callable[[Tensor | None], None]:
        def receive(excitation: Tensor | None) -> None:
            if excitation is not None:
                self.batch.append((gate.name, excitation.detach().clone()))
            elif self.gates.pop(gate.name, None) is not None:
                _LOG.warning("skipped %s: its output is not gate × input, so it is not an SE gate", gate.name)

        return receive

    def end_of_batch(self, targets: Integers, numbers: Integers) -> None:
        """Add the statistics of the batch. This is the only synchronization with the device."""
        if self.classes is not None and targets.max(initial=-1) >= len(self.classes):
            raise InputError(f"record_excitations: target {targets.max()}, but there are {len(self.classes)} classes")
        batch, self.batch = self.batch, []
        for name, excitation in batch:
            if name not in self.gates:
                continue
            values = excitation.cpu().double().numpy()  # in this order, because MPS has no float64
            if len(values) != len(targets):
                raise InputError(
                    f"gate {name!r} got {len(values)} feature maps for {len(targets)} images; exclude it with sites="
                )
            _require_finite(name, values, numbers)
            if name not in self.sites:
                rows = len(self.classes) if self.classes is not None else 0
                self.sites[name] = SiteExcitations.empty(self.gates[name], rows, values.shape[1], self.top)
            self.sites[name].widen(int(targets.max(initial=-1)) + 1)
            self.sites[name].update(values, targets, numbers)

    def result(self, names: Sequence[str] | None) -> Excitations:
        unused = [name for name in self.gates if name not in self.sites]
        if unused:
            _LOG.warning("%d gates were never used in the forward pass, %s first", len(unused), unused[0])
        if not self.sites:
            raise InputError("record_excitations: none of the gates ran in the forward pass; check the network")
        rows = max(len(site.count) - 1 for site in self.sites.values())
        for site in self.sites.values():
            site.widen(rows)
        classes = self.classes if self.classes is not None else tuple(map(str, range(rows)))
        sites = {name: self.sites[name] for name in self.gates if name in self.sites}
        shown = sorted(shown_images(sites))
        named = {i: str(names[i]) for i in shown if i < len(names)} if names is not None else {}
        found = Excitations(sites, classes, named)
        empty = found.empty_classes()
        if empty:
            first = ", ".join(map(repr, empty[:5])) + (", …" if len(empty) > 5 else "")
            _LOG.warning("%d of %d classes have no images here: %s", len(empty), len(classes), first)
        return found


def _chosen(gates: list[Gate], pattern: str, network: str) -> list[Gate]:
    if not gates:
        raise InputError(f"{network} has no SE gates to record; add some with `senet.attach`, or use an SE network")
    chosen = [gate for gate in gates if fnmatch.fnmatchcase(gate.name, pattern)]
    if not chosen:
        raise InputError(
            f"no SE gate of {network} matches {pattern!r}; it has {len(gates)} gates, the first is {gates[0].name!r}"
        )
    return chosen


def device_of(network: nn.Module) -> torch.device:
    """The device of a network's first tensor; InputError for the meta device."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device.type == "meta":
        raise InputError("the network is on the meta device and has no weights; load them before recording")
    return device


def parts_of(batch: Any, seen: int) -> tuple[Tensor, Integers, Integers]:
    """The images, targets (−1 for unknown), and numbers (counted from ``seen``) of a loader's batch."""
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if not 1 <= len(parts) <= 3 or not all(isinstance(part, Tensor) for part in parts):
        raise InputError(
            f"the loader gives {type(batch).__name__} of {len(parts)}; "
            "it must give tensors: images, (images, targets), or (images, targets, numbers)"
        )
    images = parts[0]
    targets = parts[1] if len(parts) > 1 else torch.full((len(images),), -1)
    numbers = parts[2] if len(parts) > 2 else torch.arange(seen, seen + len(images))
    for what, values in (("targets", targets), ("numbers", numbers)):
        if values.is_floating_point() or values.shape != (len(images),):
            shape = f"{tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
            raise InputError(f"{what} are {shape}; give one integer per image")
    return images, targets.cpu().numpy().astype(np.int64), numbers.cpu().numpy().astype(np.int64)


def run(network: nn.Module, images: Tensor, preprocess: Callable[[Tensor], Tensor] | None) -> Any:
    """The network's output for a loader's images, which are already on its device."""
    if preprocess is not None:
        images = preprocess(images)
    elif not images.is_floating_point():
        raise InputError(
            f"images are {images.dtype}; pass preprocess= to record_excitations, or load floating-point images"
        )
    return network(images)


def _classes_of(loader: object) -> tuple[str, ...] | None:
    """The class names of the loader's data set, ours or torchvision's."""
    for holder in (getattr(loader, "images", None), getattr(loader, "dataset", None)):
        known = getattr(holder, "classes", None)
        if isinstance(known, (list, tuple)) and known:
            return tuple(map(str, known))
    return None


def _require_finite(name: str, values: Any, numbers: Integers) -> None:
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise InputError(
            f"gate {name!r} gives NaN or infinity for {bad.sum()} of {len(bad)} images, image {numbers[bad][0]} first; "
            "check the weights and the normalization of the images"
        )
