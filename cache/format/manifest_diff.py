"""Comparing two manifests: the images they share, and the first difference.

Images are matched by the dataset's ids, because annotation files are often rewritten in another order. Everything else
about an image has to be equal, because its features were made from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Manifest


def rows_by_id(manifest: Manifest, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64, one per id: the row of the image in the manifest, -1 if the manifest lacks it."""
    if not len(manifest):
        return np.full(len(image_ids), -1)
    order = np.argsort(manifest.image_ids, kind="stable")
    positions = np.searchsorted(manifest.image_ids, image_ids, sorter=order)
    rows = order[np.minimum(positions, len(order) - 1)]
    return np.where(manifest.image_ids[rows] == image_ids, rows, -1)


def first_difference(stored: Manifest, requested: Manifest) -> str | None:
    """The first difference between the images of two manifests, row by row, as text; None if there is none.

    Compared are ids, paths, sizes and regions, not category names or federated lists. Both have equally many images.
    """
    image_columns: list[tuple[str, NDArray[Any], NDArray[Any]]] = [
        ("image id", stored.image_ids, requested.image_ids),
        ("path", stored.paths, requested.paths),
        ("height", stored.heights, requested.heights),
        ("width", stored.widths, requested.widths),
        ("number of regions", stored.region_count, requested.region_count),
    ]
    for name, old, new in image_columns:
        if len(rows := np.flatnonzero(old != new)):
            return _difference(stored, int(rows[0]), "", name, old[rows[0]], new[rows[0]])
    region_columns: list[tuple[str, NDArray[Any], NDArray[Any]]] = [
        ("box", stored.boxes_xyxy, requested.boxes_xyxy),
        ("category index", stored.category_index, requested.category_index),
        ("annotation id", stored.annotation_ids, requested.annotation_ids),
    ]
    if stored.scores is not None and requested.scores is not None:
        region_columns.append(("score", stored.scores, requested.scores))
    for name, old, new in region_columns:
        if len(differing := np.argwhere(old != new)):
            region = int(differing[0][0])
            row = int(np.searchsorted(stored.offsets, region, side="right")) - 1
            return _difference(stored, row, f", region {region - stored.offsets[row]}", name, old[region], new[region])
    if (stored.scores is None) != (requested.scores is None):
        return "only one of them has scores of its boxes"
    return None


def _difference(manifest: Manifest, row: int, region: str, name: str, old: Any, new: Any) -> str:
    image = f"image {manifest.image_ids[row]} (row {row}, {manifest.paths[row]}){region}"
    return f"{image}: {name} is {_plain(old)}, not {_plain(new)}"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else repr(value)


def same_categories(stored: Manifest, requested: Manifest) -> bool:
    """Whether the categories of `requested` start with those of `stored`, so that every stored index stays valid."""
    old, new = ([(each.id, each.name) for each in manifest.categories] for manifest in (stored, requested))
    return new[: len(old)] == old


def order_like(stored: Manifest, requested: Manifest) -> Manifest | None:
    """The requested images: first those of `stored`, in its order, then the others in their own order.

    None if an image of `stored` is not among them.
    """
    rows = rows_by_id(requested, stored.image_ids)
    if (rows < 0).any():
        return None
    others = np.ones(len(requested), dtype=bool)
    others[rows] = False
    order = np.concatenate([rows, np.flatnonzero(others)])
    return requested if (order == np.arange(len(requested))).all() else requested.select(order)


def select_stored(stored: Manifest, requested: Manifest) -> Manifest:
    """The requested images in the order of `stored`, if they are the same; otherwise `requested` itself.

    A subset of another cache also accepts a request for the whole: the images that it lacks are dropped.
    """
    ordered = order_like(stored, requested)
    if ordered is None or not (_is_subset(stored) or len(ordered) == len(stored)):
        return requested
    return ordered.head(len(stored))


def _is_subset(stored: Manifest) -> bool:
    """Whether the cache was created by `regionspot cache subset`."""
    return any(note["operation"] == "subset" for note in stored.source.get("made_from", []))


def needs_growth(stored: Manifest, requested: Manifest) -> bool:
    """Whether a cache of `stored` was made with a smaller `--limit` than `requested` and has to be extended."""
    return len(stored) < len(requested) and not _is_subset(stored) and differs_by_limit(stored, requested)


def differs_by_limit(part: Manifest, whole: Manifest) -> bool:
    """Whether the two differ only by `--limit`: read from the same files, and `whole` holds all images of `part`.

    Files are compared by SHA-256; annotation files that grew are a case for `regionspot cache extend`.
    """
    files = part.source.get("files")
    if not files or files != whole.source.get("files") or len(part) > len(whole):
        return False
    if (part.dataset, part.split) != (whole.dataset, whole.split) or len(part.categories) != len(whole.categories):
        return False
    rows = rows_by_id(whole, part.image_ids)
    return bool((rows >= 0).all()) and same_categories(part, whole) and not first_difference(whole.select(rows), part)
