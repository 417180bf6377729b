"""The zero-shot split: which of the evaluated classes a head was trained on, and the AP of these and of the others.

A class counts as seen if its name or one of its synonyms is the name of a class with boxes in the training data. Names
are compared in lower case with one space for every run of other characters, so "traffic_light" is "Traffic Light"; of
"Monitor/TV", a name of Objects365, each part is a name too. Plurals and parts of a name ("boots" and "boot", "bow" and
"bow_(weapon)") are different names: the split has a rule that can be repeated, not a judgement of meanings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Category
from regionspot.evaluation.metrics.average_precision import ApResult


def seen_classes(categories: Sequence[Category], trained: Collection[str]) -> NDArray[np.bool_]:
    """bool (K,): whether each class was trained on, in the order of `categories`; `trained` are names."""
    known = _normalised(trained)
    return np.array([bool(known & _normalised((each.name, *each.synonyms))) for each in categories], np.bool_)


def zero_shot_split(seen: NDArray[np.bool_], results: Iterable[ApResult]) -> dict[str, dict[str, float | int | None]]:
    """Of the "seen" and of the "unseen" classes: "classes" with ground truth, and "bbox" and "segm", their AP (0..1).

    `seen` bool (K,) in the order of the classes of `results`, which are of boxes and of masks. AP is None without such
    a class.
    """
    split: dict[str, dict[str, float | int | None]] = {"seen": {}, "unseen": {}}
    for result in results:
        for name, chosen in (("seen", seen), ("unseen", ~seen)):
            ap = result.classes.ap[chosen & ~np.isnan(result.classes.ap)]
            split[name] |= {"classes": len(ap), result.iou_type: float(ap.mean()) if len(ap) else None}
    return split


def _normalised(names: Iterable[str]) -> set[str]:
    variants = (variant for name in names for variant in (name, *name.split("/")))
    return {re.sub(r"[\W_]+", " ", variant.lower()).strip() for variant in variants} - {""}
