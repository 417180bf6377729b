"""OpenImages' verified image labels and class hierarchy, as the federated lists of a manifest.

    negatives        classes that annotators verified to be absent, and all classes below them in the hierarchy
    not_exhaustive   classes above one that the image shows: a dog without a box called animal is an animal

A class that the image shows, and one above it, is never among its negatives. The same rules as for the images' labels
in the evaluation of OpenImages (oid_hierarchical_labels_expansion.py of tensorflow/models, research/object_detection).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Manifest, Ragged
from regionspot.pipeline.datasets.json_stream import AnnotationFile
from regionspot.pipeline.datasets.openimages import image_id_of, read_classes
from regionspot.pipeline.datasets.region_table import Ints, Lookup

_COLUMNS = ("ImageID", "LabelName", "Confidence")
_PRESENT, _ABSENT = 1, 0  # Confidence of a label that a human verified
_BLOCK = 16 << 20  # bytes of the file that are decoded at a time


class _Node(msgspec.Struct):
    """A class of the hierarchy and the kinds of it. Its parts (`Part`) are other things, so they are not read."""

    LabelName: str
    Subcategory: list[_Node] = []


def with_verified_labels(manifest: Manifest, classes: Path, labels: Path | None, hierarchy: Path | None) -> Manifest:
    """The manifest with federated lists.

    labels      the human-verified image labels; without them, there are no negatives
    hierarchy   bbox_labels_600_hierarchy.json; without it, no class is above another

    Raises AnnotationError for files of another kind.
    """
    category_of_mid, _ = read_classes(AnnotationFile(classes))
    number = len(manifest.categories)
    below, files = np.zeros((number, number), np.bool_), dict(manifest.source["files"])
    if hierarchy is not None:
        file = AnnotationFile(hierarchy)
        below |= _read_hierarchy(file, category_of_mid)
        files |= file.source["files"]
    # A pair of an image and a class is one number: row * number of classes + class.
    row = np.repeat(np.arange(len(manifest)), manifest.region_count)
    shown = _sorted((row * number + manifest.category_index)[manifest.category_index >= 0])
    negatives = None
    if labels is not None:
        file = AnnotationFile(labels)
        present, absent = _read_labels(file, category_of_mid, manifest.image_ids)
        files |= file.source["files"]
        shown = _sorted(shown, present)
        absent = _sorted(absent, _related(absent, below))
        negatives = np.setdiff1d(absent, _sorted(shown, _related(shown, below.T)), assume_unique=True)
    return replace(
        manifest,
        negatives=None if negatives is None else _lists(negatives, len(manifest), number),
        not_exhaustive=None if hierarchy is None else _lists(_related(shown, below.T), len(manifest), number),
        source={**manifest.source, "files": files},
    )


def _read_hierarchy(file: AnnotationFile, category_of_mid: Mapping[str, int]) -> NDArray[np.bool_]:
    """bool (V, V): whether the second class is a kind of the first."""
    below = np.zeros((len(category_of_mid), len(category_of_mid)), np.bool_)

    def visit(node: _Node, above: list[int]) -> None:
        category = category_of_mid.get(node.LabelName)  # the root is no class
        if category is not None:
            below[above, category] = True
            above = [*above, category]
        for child in node.Subcategory:
            visit(child, above)

    visit(file.decode(_Node), [])
    if not below.any():
        raise file.error("holds none of the classes; expected OpenImages' hierarchy, bbox_labels_600_hierarchy.json")
    return below


def _read_labels(file: AnnotationFile, category_of_mid: Mapping[str, int], image_ids: Ints) -> tuple[Ints, Ints]:
    """The pairs of present and of absent classes, sorted. Labels of other images and other classes are skipped."""
    text = pa.dictionary(pa.int32(), pa.string())
    convert = pa.csv.ConvertOptions(
        include_columns=_COLUMNS, column_types=dict(zip(_COLUMNS, (text, text, pa.float32()), strict=True))
    )
    rows, pairs = Lookup(image_ids), {value: [np.zeros(0, np.int64)] for value in (_PRESENT, _ABSENT)}
    try:
        for block in pa.csv.open_csv(
            file.path, read_options=pa.csv.ReadOptions(block_size=_BLOCK), convert_options=convert
        ):
            images, labels, confidence = (block[name] for name in _COLUMNS)
            ids = np.array([_image_id_or_0(name) for name in images.dictionary.to_pylist()], np.int64)
            mids = labels.dictionary.to_pylist()
            categories = np.array([category_of_mid.get(mid.strip(), -1) for mid in mids], np.int64)
            row, category = rows.find(ids)[images.indices.to_numpy()], categories[labels.indices.to_numpy()]
            known = (row >= 0) & (category >= 0)
            for value in pairs:
                selected = known & (confidence.to_numpy(zero_copy_only=False) == value)
                pairs[value].append(row[selected] * len(category_of_mid) + category[selected])
    except (pa.ArrowInvalid, KeyError) as error:
        first_line = str(error).splitlines()[0]
        raise file.error(
            f"this is not OpenImages' table of image labels, with columns {', '.join(_COLUMNS)} ({first_line})"
        ) from None
    present, absent = (
        np.unique(np.concatenate([np.zeros(0, np.int64), *pairs.get(v, [])])) for v in (_PRESENT, _ABSENT)
    )
    return present, absent


def _image_id_or_0(name: str) -> int:
    """The id of an image, 0 for a name that is none: no image of OpenImages has only zeros."""
    try:
        return image_id_of(name)
    except ValueError:
        return 0


def _related(pairs: Ints, relation: NDArray[np.bool_]) -> Ints:
    """The pairs of the same images and the classes that `relation` (V, V) gives for the class of each pair, sorted."""
    number = len(relation)
    targets = np.nonzero(relation)[1]  # of all classes, in their order
    counts = relation.sum(axis=1)
    starts = np.cumsum(counts) - counts
    row, category = pairs // number, pairs % number
    repeats = counts[category]
    offset = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return _sorted(np.repeat(row, repeats) * number + targets[np.repeat(starts[category], repeats) + offset])


def _sorted(*pairs: Ints) -> Ints:
    """All of these pairs once. np.unique, which hashes, took four fifths of the time of this module (numpy 2.4)."""
    together = np.sort(np.concatenate(pairs))
    return together[np.diff(together, prepend=-1) > 0]


def _lists(pairs: Ints, images: int, classes: int) -> Ragged:
    """Sorted pairs as one list per image."""
    counts = np.bincount(pairs // classes, minlength=images)
    return Ragged(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), (pairs % classes).astype(np.int32))
