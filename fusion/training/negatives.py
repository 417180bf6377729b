"""The classes that count in the loss of a step, and how often an image with rare classes is read.

A large vocabulary: the classes of the batch and some others, drawn with a weight of the square root of their number of
images, as in the federated loss of Zhou et al. 2021 (CenterNet2, arXiv:2103.07461, section 5.1).

A dataset whose annotators checked only some classes of an image (LVIS, OpenImages): a class counts as negative if the
image was verified to lack it, or if another region of the image shows it. All others are unknown there.

Rare classes: an image is repeated in an epoch by the factor of its rarest class (Gupta et al. 2019, LVIS,
arXiv:1908.03195, appendix "Repeat factor sampling").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Manifest, Ragged

Unverified = Literal["ignored", "negative"]

_DRAW, _REPEAT = 1001, 1002  # uses of random numbers, each with its own stream (cache/reading/sampling.py has more)
_IMAGES = 1 << 16  # counted at a time


class CountedClasses:
    """Selects the classes that count in each batch of one cache."""

    def __init__(
        self,
        manifest: Manifest,
        rows: NDArray[np.int64],
        *,
        sampled: int = 0,
        seed: int = 0,
        unverified: Unverified = "ignored",
    ) -> None:
        """`sampled` classes are drawn at each step, by their number of images among `rows`; 0: all classes count.

        unverified   what a class is that was not verified in an image: no negative, or a negative like any other
        """
        self._sampled, self._seed, self._classes = sampled, seed, len(manifest.categories)
        if sampled:
            with np.errstate(divide="ignore"):
                self._mean_wait = 1 / np.sqrt(images_per_class(manifest, rows))
        self._present = Ragged(manifest.offsets, manifest.category_index)
        self._negatives = self._not_exhaustive = None
        if unverified == "ignored":
            self._negatives, self._not_exhaustive = manifest.negatives, manifest.not_exhaustive

    @property
    def verified_only(self) -> bool:
        """Whether a class is a negative only where it was verified."""
        return self._negatives is not None

    def of_step(
        self, step: int, rows: NDArray[np.int64], categories: NDArray[np.integer[Any]]
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_] | None]:
        """The arguments `class_ids` and `ignored` of `region_loss`; they follow from the seed and the step.

        rows        int64 (B,)     of the batch
        categories  int (B, R)     of its regions, negative where unknown

        class_ids   int64 (K,)     ascending; None: all classes count
        ignored     bool  (B, K)   in the order of `class_ids`; None: no class is ignored
        """
        class_ids = self._draw(step, np.unique(categories[categories >= 0])) if self._sampled else None
        ignored = self._ignored(rows)
        if class_ids is not None and ignored is not None:
            ignored = ignored[:, class_ids]
        return class_ids, ignored

    def _draw(self, step: int, present: NDArray[np.integer[Any]]) -> NDArray[np.int64] | None:
        """The classes `present` and the drawn ones.

        Drawn without replacement as an exponential race: the classes that arrive first when the mean wait of a class is
        1 / weight (Efraimidis and Spirakis 2006). A class without an image never arrives; it is taken if no other is
        left.
        """
        number = len(present) + self._sampled
        if number >= self._classes:
            return None
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, step, _DRAW])).random_raw(self._classes)
        # Inside (0, 1): neither 0 nor 1 has a finite wait other than 0.
        uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        wait = -np.log(uniform) * self._mean_wait
        wait[present] = 0
        return np.sort(np.argpartition(wait, number)[:number])

    def _ignored(self, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        if self._negatives is None and self._not_exhaustive is None:
            return None
        ignored = np.full((len(rows), self._classes), self._negatives is not None)
        if self._negatives is not None:
            ignored[_listed(self._negatives, rows)] = False
            image, present = _listed(self._present, rows)
            ignored[image[present >= 0], present[present >= 0]] = False
        if self._not_exhaustive is not None:
            ignored[_listed(self._not_exhaustive, rows)] = True
        return ignored


def images_per_class(manifest: Manifest, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 (V,): on how many of the images at `rows` each class has a region."""
    classes = len(manifest.categories)
    images = np.zeros(classes, np.int64)
    for _, image, category in _classes_in_chunks(manifest, rows):
        pairs = np.sort(image * classes + category)  # np.unique is slower on many integers
        first = np.diff(pairs, prepend=-1) > 0
        images += np.bincount(pairs[first] % classes, minlength=classes)
    return images


def repeat_factors(manifest: Manifest, rows: NDArray[np.int64], threshold: float) -> NDArray[np.float64]:
    """float64 (n,), at least 1: how often each image is read in an epoch, on average.

    max(1, sqrt(threshold / f)) of the image's rarest class, which is on the share f of the images at `rows`
    """
    with np.errstate(divide="ignore"):
        of_class = np.maximum(1, np.sqrt(threshold * len(rows) / images_per_class(manifest, rows)))
    factors = np.ones(len(rows))
    for start, image, category in _classes_in_chunks(manifest, rows):
        np.maximum.at(factors, start + image, of_class[category])
    return factors


def repeated_rows(rows: NDArray[np.int64], factors: NDArray[np.float64], seed: int, epoch: int) -> NDArray[np.int64]:
    """The images of one epoch, each as often as its factor, rounded up or down at random.

    Every epoch has the same number of images: the sum of the factors, rounded up by scaling all of them a little.
    Systematic sampling: an image is taken whenever the sum of the factors in a random order passes an integer.
    """
    random = np.random.PCG64(np.random.SeedSequence([seed, epoch, _REPEAT])).random_raw(len(rows) + 1)
    order = np.argsort(random[:-1], kind="stable")
    length = math.ceil(factors.sum())
    ends = np.cumsum(factors[order])
    ends *= length / ends[-1]
    ends[-1] = length  # without rounding error
    offset = float(random[-1] >> np.uint64(12)) * 2.0**-52
    counts = np.diff(np.floor(ends + offset), prepend=0.0).astype(np.int64)
    return np.repeat(rows[order], counts)


def _classes_in_chunks(
    manifest: Manifest, rows: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int32]]]:
    """The known classes of the regions of the images at `rows`, in chunks: start of the chunk, image in it, class."""
    present = Ragged(manifest.offsets, manifest.category_index)
    for start in range(0, len(rows), _IMAGES):
        image, category = _listed(present, rows[start : start + _IMAGES])
        yield start, image[category >= 0], category[category >= 0]


def _listed(ragged: Ragged, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The lists of the images at `rows` as pairs: position in `rows`, class."""
    starts = ragged.offsets[rows]
    counts = ragged.offsets[rows + 1] - starts
    image = np.repeat(np.arange(len(rows)), counts)
    index = np.arange(len(image)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return image, ragged.values[index]
