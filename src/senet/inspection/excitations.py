"""Statistics of excitations over a data set: count, mean, and spread of each channel by class, exact under merging.

They use Welford's and Chan's updates in float64 (Chan, Golub and LeVeque, "Updating formulae", 1979). These need a
single pass, and memory that depends on the number of channels and classes, not on the number of images. Shape
suffixes: N images, C channels, K classes. Rows are the K classes, followed by one for images without a class.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from senet.errors import InputError
from senet.inspection import files
from senet.inspection.site_excitations import Integers, SiteExcitations


@dataclass
class Excitations:
    """Statistics of a network's gates over a data set, from ``senet.record_excitations``.

    Attributes:
        sites: the statistics by the gate's name, in the network's order.
        classes: class names; row i of a site is class i.
        names: names of the images that open or close a channel most, by image number.
        about: a description of the origin (model, data, …), as strings.
    """

    sites: dict[str, SiteExcitations]
    classes: tuple[str, ...] = ()
    names: dict[int, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[SiteExcitations]:
        return iter(self.sites.values())

    def __getitem__(self, name: str) -> SiteExcitations:
        if name not in self.sites:
            raise InputError(
                f"there is no gate {name!r} among the {len(self.sites)} recorded; {_few(list(self.sites))}"
            )
        return self.sites[name]

    @property
    def images(self) -> int:
        """Number of images (the maximum over gates)."""
        return max((site.images for site in self), default=0)

    def class_index(self, name: str) -> int:
        """The row of a class; InputError if the name is unknown."""
        if name not in self.classes:
            raise InputError(f"there is no class {name!r} among the {len(self.classes)}; {_few(self.classes)}")
        return self.classes.index(name)

    def empty_classes(self) -> list[str]:
        """Names of the classes without images."""
        counts: Sequence[Integers] = [site.count[:-1] for site in self]
        return [name for i, name in enumerate(self.classes) if all(count[i] == 0 for count in counts)]

    @classmethod
    def merge(cls, parts: Sequence[Excitations]) -> Excitations:
        """Merge the recordings of several processes. The result equals that of a single process.

        Images must be numbered over the whole data set, as this package's loaders do, and no image may be recorded
        twice.

        Raises:
            InputError: no parts, or parts with different gates or classes.
        """
        if not parts:
            raise InputError("Excitations.merge: there is nothing to merge; give at least one recording")
        longest = max((part.classes for part in parts), key=len)
        first = parts[0]
        for number, part in enumerate(parts):
            if part.classes != longest[: len(part.classes)]:
                raise InputError(
                    f"Excitations.merge: part {number} has different classes; merge recordings of the same data set"
                )
            if _shape(part) != _shape(first):
                raise InputError(
                    f"Excitations.merge: part {number} has different gates; merge recordings of the same network"
                )
        sites = {}
        for name, site in first.sites.items():
            top = site.opening.values.shape[1]
            merged = SiteExcitations.empty(site, len(longest), site.channels, top)
            for part in parts:
                merged.add(part.sites[name])
            sites[name] = merged
        names: dict[int, str] = {}
        for part in parts:
            names |= part.names
        shown = shown_images(sites)
        return cls(sites, longest, {i: names[i] for i in sorted(names) if i in shown}, dict(first.about))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``….npz`` or ``….parquet`` (one row per gate, class, and channel; needs pyarrow) atomically."""
        files.save(path, files.Content(self.sites, self.classes, self.names, self.about))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Excitations:
        """Read a file written by ``save``, with identical numbers; InputError if it is missing, damaged, or foreign."""
        return cls(*files.load(path))


def shown_images(sites: Mapping[str, SiteExcitations]) -> set[int]:
    """Numbers of all images that open or close any channel most."""
    shown: set[int] = set()
    for site in sites.values():
        for extremes in (site.opening, site.closing):
            shown.update(np.unique(extremes.images).tolist())
    return shown - {-1}


def _shape(part: Excitations) -> list[tuple[Any, ...]]:
    return [(s.name, s.kind, s.function, s.channels, s.opening.values.shape[1]) for s in part]


def _few(names: Sequence[str]) -> str:
    return "there are " + ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
