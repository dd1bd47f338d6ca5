"""What gates did over a data set: count, mean and spread of each channel by class, exact under merging.

Welford's and Chan's updates in float64 (Chan, Golub and LeVeque, "Updating formulae", 1979): one pass, and memory that
depends on channels and classes, never on the number of images. Shape suffixes: N images, C channels, K classes; rows
are the K classes and a last one for images without a class.
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
    """What the gates of a network did over a data set; made by ``senet.record_excitations``.

    Attributes:
        sites: by the gate's name, in the network's order.
        classes: their names; row i of a site is class i.
        names: names of the images that open or close a channel most, by number.
        about: where this comes from (model, data, …): strings, for people.
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
        """Images seen (by the gate that saw most)."""
        return max((site.images for site in self), default=0)

    def class_index(self, name: str) -> int:
        """The row of a class; InputError where there is none of that name."""
        if name not in self.classes:
            raise InputError(f"there is no class {name!r} among the {len(self.classes)}; {_few(self.classes)}")
        return self.classes.index(name)

    def empty_classes(self) -> list[str]:
        """Classes without an image."""
        counts: Sequence[Integers] = [site.count[:-1] for site in self]
        return [name for i, name in enumerate(self.classes) if all(count[i] == 0 for count in counts)]

    @classmethod
    def merge(cls, parts: Sequence[Excitations]) -> Excitations:
        """One out of the recordings of several processes: exactly what one process would have recorded.

        Images must be numbered over the whole data set, as this package's loaders do, and none seen twice.

        Raises:
            InputError: no parts, or parts of other gates or classes.
        """
        if not parts:
            raise InputError("Excitations.merge: there is nothing to merge; give at least one recording")
        longest = max((part.classes for part in parts), key=len)
        first = parts[0]
        for number, part in enumerate(parts):
            if part.classes != longest[: len(part.classes)]:
                raise InputError(
                    f"Excitations.merge: part {number} has other classes; merge recordings of one data set"
                )
            if _shape(part) != _shape(first):
                raise InputError(f"Excitations.merge: part {number} has other gates; merge recordings of one network")
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
        """Write ``….npz`` or ``….parquet`` (a row a gate, class and channel; needs pyarrow), whole or not at all."""
        files.save(path, files.Content(self.sites, self.classes, self.names, self.about))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Excitations:
        """Read what ``save`` wrote, equal in every number; InputError for a file that is missing, damaged or other."""
        return cls(*files.load(path))


def shown_images(sites: Mapping[str, SiteExcitations]) -> set[int]:
    """Numbers of all images that open or close some channel most."""
    shown: set[int] = set()
    for site in sites.values():
        for extremes in (site.opening, site.closing):
            shown.update(np.unique(extremes.images).tolist())
    return shown - {-1}


def _shape(part: Excitations) -> list[tuple[Any, ...]]:
    return [(s.name, s.kind, s.function, s.channels, s.opening.values.shape[1]) for s in part]


def _few(names: Sequence[str]) -> str:
    return "there are " + ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
