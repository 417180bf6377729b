"""Two manifests side by side: which images they share, and what is the first thing that differs.

Images are matched by the dataset's ids: annotation files are often written anew in another order, and a row is only
a position. Whatever else is known of an image has to be equal, since its features were made from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.format.manifest import Manifest


def rows_by_id(manifest: Manifest, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64, as many as ids: the row of each image in the manifest, -1 where it holds none of that id."""
    if not len(manifest):
        return np.full(len(image_ids), -1)
    order = np.argsort(manifest.image_ids, kind="stable")
    place = np.searchsorted(manifest.image_ids, image_ids, sorter=order)
    rows = order[np.minimum(place, len(order) - 1)]
    return np.where(manifest.image_ids[rows] == image_ids, rows, -1)


def first_difference(stored: Manifest, asked: Manifest) -> str | None:
    """What differs first between the images of two manifests, row by row, in words; None where nothing does.

    Compared is what features are made from and what finds them: ids, paths, sizes and regions, not the categories'
    names nor the federated lists. The manifests have equally many images.
    """
    of_images: list[tuple[str, NDArray[Any], NDArray[Any]]] = [
        ("image id", stored.image_ids, asked.image_ids),
        ("path", stored.paths, asked.paths),
        ("height", stored.heights, asked.heights),
        ("width", stored.widths, asked.widths),
        ("number of regions", stored.region_count, asked.region_count),
    ]
    for name, was, now in of_images:
        if len(rows := np.flatnonzero(was != now)):
            return _told(stored, int(rows[0]), "", name, was[rows[0]], now[rows[0]])
    of_regions: list[tuple[str, NDArray[Any], NDArray[Any]]] = [
        ("box", stored.boxes_xyxy, asked.boxes_xyxy),
        ("category index", stored.category_index, asked.category_index),
        ("annotation id", stored.annotation_ids, asked.annotation_ids),
    ]
    if stored.scores is not None and asked.scores is not None:
        of_regions.append(("score", stored.scores, asked.scores))
    for name, was, now in of_regions:
        if len(found := np.argwhere(was != now)):
            region = int(found[0][0])
            row = int(np.searchsorted(stored.offsets, region, side="right")) - 1
            which = f", region {region - stored.offsets[row]}"
            return _told(stored, row, which, name, was[region], now[region])
    if (stored.scores is None) != (asked.scores is None):
        return "only one of them has scores of its boxes"
    return None


def _told(manifest: Manifest, row: int, which: str, name: str, was: Any, now: Any) -> str:
    image = f"image {manifest.image_ids[row]} (row {row}, {manifest.paths[row]}){which}"
    return f"{image}: {name} is {_plain(was)}, not {_plain(now)}"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else repr(value)


def same_categories(stored: Manifest, asked: Manifest) -> bool:
    """Whether an index into the categories of `stored` means the same in `asked`, which may have more at the end."""
    before, now = ([(each.id, each.name) for each in one.categories] for one in (stored, asked))
    return now[: len(before)] == before


def in_order_of(stored: Manifest, asked: Manifest) -> Manifest | None:
    """The asked images with those of `stored` first, in its order, and the others as they came.

    None where an image of `stored` is not among them.
    """
    rows = rows_by_id(asked, stored.image_ids)
    if (rows < 0).any():
        return None
    others = np.ones(len(asked), dtype=bool)
    others[rows] = False
    order = np.concatenate([rows, np.flatnonzero(others)])
    return asked if (order == np.arange(len(asked))).all() else asked.select(order)


def as_stored(stored: Manifest, asked: Manifest) -> Manifest:
    """The asked images as a cache of `stored` has them, where they are those; otherwise as they came.

    That is in its order, and for a cache that was cut out of another one without the images that it left out.
    """
    ordered = in_order_of(stored, asked)
    if ordered is None or not (_was_cut(stored) or len(ordered) == len(stored)):
        return asked
    return ordered.head(len(stored))


def _was_cut(stored: Manifest) -> bool:
    return any(note["operation"] == "subset" for note in stored.source.get("made_from", []))


def grows_to(stored: Manifest, asked: Manifest) -> bool:
    """Whether a cache of `stored` was made with a smaller limit than `asked`, and is to take in the other images."""
    return len(stored) < len(asked) and not _was_cut(stored) and is_part_of(stored, asked)


def is_part_of(some: Manifest, whole: Manifest) -> bool:
    """Whether the two differ by `--limit` alone: read from the same files, and all images of `some` are in `whole`.

    Files are compared by their SHA-256, so annotations that grew are another thing, for `regionspot cache extend`.
    """
    files = some.source.get("files")
    if not files or files != whole.source.get("files") or len(some) > len(whole):
        return False
    if (some.dataset, some.split) != (whole.dataset, whole.split) or len(some.categories) != len(whole.categories):
        return False
    rows = rows_by_id(whole, some.image_ids)
    return bool((rows >= 0).all()) and same_categories(some, whole) and not first_difference(whole.select(rows), some)
