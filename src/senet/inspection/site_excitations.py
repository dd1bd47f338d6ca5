"""Statistics of one gate: count, mean, and spread of each channel by class, and the most extreme images.

The math and the shape suffixes are those of ``senet.inspection.excitations``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass
class Extremes:
    """The images with the largest (or smallest) excitations of each channel, the most extreme first.

    Attributes:
        values: (C, k) excitations; NaN if there are fewer than k images. Ties are ordered by image number, so that the
            order of recording does not matter.
        images: (C, k) numbers of these images; −1 if there are fewer.
        largest: whether the largest excitations are kept, or the smallest.
    """

    values: Floats
    images: Integers
    largest: bool

    @classmethod
    def empty(cls, channels: int, count: int, largest: bool) -> Extremes:
        """No images yet."""
        return cls(np.full((channels, count), np.nan), np.full((channels, count), -1, np.int64), largest)

    def add(self, values_cn: Floats, images: Integers) -> None:
        """Add images: ``values_cn`` (C, N), ``images`` (N,) or (C, N)."""
        count = self.values.shape[1]
        if count == 0 or values_cn.shape[1] == 0:
            return
        worst = self.values[:, -1]  # only channels with a new entry are sorted again
        best = np.fmax.reduce(values_cn if self.largest else -values_cn, axis=1)  # skips NaN, an empty entry
        rows = np.flatnonzero(np.isnan(worst) | (best >= (worst if self.largest else -worst)))
        values = np.concatenate([self.values[rows], values_cn[rows]], axis=1)
        numbers = np.concatenate([self.images[rows], np.broadcast_to(images, values_cn.shape)[rows]], axis=1)
        order = np.lexsort((numbers, -values if self.largest else values), axis=1)[:, :count]  # NaN sorts last
        self.values[rows] = np.take_along_axis(values, order, 1)
        self.images[rows] = np.take_along_axis(numbers, order, 1)


@dataclass
class SiteExcitations:
    """The excitations of one gate.

    Attributes:
        name, kind, function, low, neutral, high: properties of the gate, see ``senet.surgery.find_gates.Gate``.
        count: (K + 1,) number of images per row. A gate that runs twice in a forward pass counts each image twice.
        mean, m2: (K + 1, C) mean, and sum of squared deviations from it; 0 in rows without images.
        lowest, highest: (C,) extremes over all images.
        opening, closing: the images that open and close each channel most.
    """

    name: str
    kind: str
    function: str
    low: float
    neutral: float
    high: float
    count: Integers
    mean: Floats
    m2: Floats
    lowest: Floats
    highest: Floats
    opening: Extremes
    closing: Extremes

    @classmethod
    def empty(cls, gate: Any, classes: int, channels: int, top: int) -> SiteExcitations:
        """No images yet; ``gate`` is any object with a gate's name, kind, function, and range."""
        return cls(
            name=gate.name,
            kind=gate.kind,
            function=gate.function,
            low=gate.low,
            neutral=gate.neutral,
            high=gate.high,
            count=np.zeros(classes + 1, np.int64),
            mean=np.zeros((classes + 1, channels)),
            m2=np.zeros((classes + 1, channels)),
            lowest=np.full(channels, np.inf),
            highest=np.full(channels, -np.inf),
            opening=Extremes.empty(channels, top, True),
            closing=Extremes.empty(channels, top, False),
        )

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.mean.shape[1]

    @property
    def images(self) -> int:
        """Number of images, with and without a class."""
        return int(self.count.sum())

    @property
    def span(self) -> float:
        """The width of the gate's range; 1 if it is unbounded."""
        return self.high - self.low if np.isfinite(self.high - self.low) else 1.0

    def overall(self) -> tuple[Floats, Floats]:
        """(C,) mean and (C,) population standard deviation over all images."""
        mean, m2 = self._pooled()
        return mean, np.sqrt(m2 / self.images)

    def class_mean(self) -> Floats:
        """(K, C) mean excitation of each class (the paper's Fig. 6); NaN for a class without images."""
        return np.where(self.count[:-1, None] > 0, self.mean[:-1], np.nan)

    def class_std(self) -> Floats:
        """(K, C) standard deviation over the images of a class (Fig. 7); NaN for a class without images."""
        count = self.count[:-1, None]
        return np.where(count > 0, np.sqrt(self.m2[:-1] / np.maximum(count, 1)), np.nan)

    def variation(self) -> float:
        """The gate's movement: root mean square of the standard deviation ÷ root mean square of the mean.

        It is 0 for a constant gate, which folds into its neighbors exactly.
        """
        mean, std = self.overall()
        size = float(np.sqrt(np.mean(mean**2)))
        return float(np.sqrt(np.mean(std**2))) / size if size > 0 else 0.0

    def channel_selectivity(self) -> Floats:
        """(C,) fraction of each channel's variance that the class explains, 0 to 1, corrected for few images (ε²)."""
        between, within, n, k = self._explained()
        total = between + within
        if n <= k or k < 2:
            return np.full(self.channels, np.nan)
        share = 1 - (within / (n - k)) / np.where(total > 0, total / (n - 1), np.inf)
        return np.where(total > self._rounding(n), share.clip(0, 1), 0.0)

    def selectivity(self) -> float:
        """The same fraction over all channels; NaN with fewer than two classes, or one image per class."""
        between, within, n, k = self._explained()
        if n <= k or k < 2:
            return float("nan")
        total = float((between + within).sum())
        if total <= self._rounding(n) * self.channels:
            return 0.0
        return float(np.clip(1 - (within.sum() / (n - k)) / (total / (n - 1)), 0, 1))

    def update(self, values_nc: Floats, targets: Integers, images: Integers) -> None:
        """Add a batch: excitations (N, C), classes (N,) with −1 for none, image numbers (N,)."""
        rows, inverse = np.unique(np.where(targets < 0, len(self.count) - 1, targets), return_inverse=True)
        one_hot = (inverse == np.arange(len(rows))[:, None]).astype(np.float64)
        count = np.bincount(inverse, minlength=len(rows))
        mean = one_hot @ values_nc / count[:, None]
        m2 = one_hot @ (values_nc - mean[inverse]) ** 2
        self._combine(rows, count, mean, m2)
        np.minimum(self.lowest, values_nc.min(0), out=self.lowest)
        np.maximum(self.highest, values_nc.max(0), out=self.highest)
        self.opening.add(values_nc.T, images)
        self.closing.add(values_nc.T, images)

    def add(self, other: SiteExcitations) -> None:
        """Add the statistics of the same gate from another process."""
        self.widen(len(other.count) - 1)
        rows = np.append(np.arange(len(other.count) - 1), len(self.count) - 1)
        self._combine(rows, other.count, other.mean, other.m2)
        np.minimum(self.lowest, other.lowest, out=self.lowest)
        np.maximum(self.highest, other.highest, out=self.highest)
        self.opening.add(other.opening.values, other.opening.images)
        self.closing.add(other.closing.values, other.closing.images)

    def widen(self, classes: int) -> None:
        """Make room for ``classes`` classes."""
        more = classes + 1 - len(self.count)
        if more > 0:
            self.count = np.insert(self.count, [-1] * more, 0)
            self.mean = np.insert(self.mean, [-1] * more, 0, axis=0)
            self.m2 = np.insert(self.m2, [-1] * more, 0, axis=0)

    def _combine(self, rows: Integers, count: Integers, mean: Floats, m2: Floats) -> None:
        """Apply Chan's update to ``rows``."""
        before = self.count[rows]
        total = np.maximum(before + count, 1)[:, None]
        step = mean - self.mean[rows]
        self.m2[rows] += m2 + step**2 * (before[:, None] * (count[:, None] / total))
        self.mean[rows] += step * (count[:, None] / total)
        self.count[rows] += count

    def _pooled(self) -> tuple[Floats, Floats]:
        """(C,) mean and (C,) sum of squared deviations from it, over all rows."""
        if not self.images:
            return np.full(self.channels, np.nan), np.full(self.channels, np.nan)
        weight = self.count[:, None] / self.images
        mean = (weight * self.mean).sum(0)
        return mean, (self.m2 + self.count[:, None] * (self.mean - mean) ** 2).sum(0)

    def _explained(self) -> tuple[Floats, Floats, int, int]:
        """(C,) sums of squares between and within classes; number of images with a class, of classes with images."""
        count = self.count[:-1, None]
        n = int(count.sum())
        mean = (count / max(n, 1) * self.mean[:-1]).sum(0)
        between = (count * (self.mean[:-1] - mean) ** 2).sum(0)
        return between, self.m2[:-1].sum(0), n, int((count > 0).sum())

    def _rounding(self, n: int) -> float:
        """The largest sum of squares that float32 rounding alone can cause."""
        return n * (float(np.finfo(np.float32).eps) * self.span) ** 2
