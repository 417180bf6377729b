"""Boxes of several images from one file of another program.

    [[x1, y1, x2, y2], ...] or {"boxes": [...]}   the same boxes for every image
    COCO annotations                              {"images": [...], "annotations": [...], "categories": [...]}
    detectors                                     COCO results and the others of pipeline/datasets/detector_formats.py
    Label Studio                                  its JSON export: rectangles and polygons, in per cent of the image
    LabelMe                                       one JSON per image: give the file, or the folder of the files

Images are found by path, file name or file name without its suffix. In files that know images by number alone, such as
COCO results, the number must be the file name: 139 is 000000000139.jpg.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import AnnotationError
from regionspot.cache.format.manifest import Category, Manifest
from regionspot.evaluation.inference.boxes import box_table, read_json
from regionspot.pipeline.datasets.proposals import read_proposals
from regionspot.pipeline.datasets.region_table import manifest_of_images
from regionspot.pipeline.datasets.registry import read_dataset

log = logging.getLogger(__name__)

Boxes = NDArray[np.float32]
NamedBoxes = Iterator[tuple[str, list[list[float]]]]  # an image's path or name, and its boxes XYXY in pixels

_UNLIMITED = 2**24  # a side that clips no box: the boxes are checked when the image is read
_UPLOAD_PREFIX = re.compile("^[0-9a-f]{8}-")  # which Label Studio puts before the names of uploaded files


def boxes_of_images(given: Boxes | Path | None, images: Sequence[Path]) -> Sequence[Boxes | None]:
    """float32 (n, 4) for each image, XYXY in pixels: the given ones for each, or those of a file. None stays None.

    An image that the file does not have has no box; how many these are is logged. Raises AnnotationError or InputError
    for a file of another form, and if it has none of the images.
    """
    if not isinstance(given, Path):
        return [given] * len(images)
    path = given
    if path.is_dir():
        named = _label_me_folder(path, images)
    else:
        content = read_json(path)
        first = content[0] if isinstance(content, list) and content else None
        if _is_plain(content):
            boxes = box_table(content["boxes"] if isinstance(content, dict) else content, str(path))
            return [boxes] * len(images)
        if isinstance(content, dict) and "shapes" in content:
            named = iter([_label_me(content, path)])
        elif isinstance(content, dict) and "annotations" in content:
            # LVIS states an image's address in place of its file name.
            dataset = "coco" if any("file_name" in image for image in content.get("images", ())) else "lvis"
            named = _regions_of(read_dataset(dataset, path.parent, "val", annotations=path))
        elif isinstance(first, dict) and "data" in first:
            named = _label_studio(content, path)
        else:
            named = _detections(path, images)
    return _by_image(path, images, named)


def _is_plain(content: Any) -> bool:
    """Whether these are boxes without an image: each is a list, and its first item is a number."""
    if isinstance(content, dict):
        return isinstance(content.get("boxes"), list) and "ids" not in content
    first = content[0] if isinstance(content, list) and content else []
    nested = isinstance(first, list) and any(isinstance(item, dict | list) for item in first)
    return isinstance(content, list) and not nested and not isinstance(first, dict)


def _by_image(path: Path, images: Sequence[Path], named: NamedBoxes) -> Sequence[Boxes]:
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    for name, of_image in named:
        boxes[name.replace("\\", "/")] += of_image
    known = _unique_keys({name: _keys(name) for name in boxes})
    rows = [next((known[key] for key in _keys(image.as_posix()) if key in known), None) for image in images]
    missing = [image for image, row in zip(images, rows, strict=True) if row is None]
    if len(missing) == len(images):
        examples = ", ".join(list(boxes)[:3]) or "no image"
        raise AnnotationError(f"{path}: has boxes of none of the {len(images):,} images; it has {examples}")
    if missing:
        log.warning(
            "%s: has no entry for %d of %d images, the first is %s", path, len(missing), len(images), missing[0]
        )
    return [box_table([] if row is None else boxes[row], str(path)) for row in rows]


def _keys(name: str) -> list[str]:
    """The path, the file name, its stem, and these two without the prefix of an upload."""
    file = PurePosixPath(name)
    original = _UPLOAD_PREFIX.sub("", file.name)
    return [name, file.name, file.stem, original, PurePosixPath(original).stem]


def _unique_keys(keys: Mapping[str, list[str]]) -> dict[str, str]:
    """The name of each key that belongs to one name only."""
    names: dict[str, set[str]] = defaultdict(set)
    for name, some in keys.items():
        for key in some:
            names[key].add(name)
    return {key: next(iter(owners)) for key, owners in names.items() if len(owners) == 1}


def _regions_of(manifest: Manifest) -> NamedBoxes:
    for row, name in enumerate(manifest.paths.tolist()):
        yield name, manifest.boxes_xyxy[manifest.regions(row)].tolist()


def _detections(path: Path, images: Sequence[Path]) -> NamedBoxes:
    """Boxes in a format of a detector. Its images are matched by the reader of proposals."""
    count, sides = len(images), np.full(len(images), _UNLIMITED)
    ids = -1 - np.arange(count)  # that no file has, so that its numbers are looked for in the file names
    any_label = (Category(1, "object"),)
    listed = manifest_of_images("images", "all", ids, [image.as_posix() for image in images], sides, sides, any_label)
    manifest = read_proposals(path, listed, allow_unknown=True)
    if not len(manifest.boxes_xyxy):
        raise AnnotationError(
            f"{path}: has usable boxes of none of the {count:,} images; are they known by other names?"
        )
    for name, boxes in _regions_of(manifest):
        if boxes:
            yield name, boxes


def _label_me_folder(folder: Path, images: Sequence[Path]) -> NamedBoxes:
    for image in images:
        path = folder / f"{image.stem}.json"
        if path.exists():
            yield image.as_posix(), _label_me(read_json(path), path)[1]


def _label_me(content: Any, path: Path) -> tuple[str, list[list[float]]]:
    """The boxes around the shapes of a LabelMe file; points and lines have none."""
    boxes = []
    try:
        for shape in content["shapes"]:
            kind, points = shape.get("shape_type", "polygon"), np.array(shape["points"], np.float64)
            if kind == "circle":  # its centre, and a point on it
                radius = math.dist(*points.tolist())
                points = np.concatenate([points[:1] - radius, points[:1] + radius])
            if kind not in ("point", "points", "line", "linestrip"):
                boxes.append([*points.min(axis=0).tolist(), *points.max(axis=0).tolist()])
        return str(content.get("imagePath") or path.stem), boxes
    except (KeyError, TypeError, ValueError, AttributeError):
        raise AnnotationError(
            f"{path}: shape {len(boxes) + 1} is not one of LabelMe's, which have a shape_type and points [[x, y], ...]"
        ) from None


def _label_studio(tasks: Any, path: Path) -> NamedBoxes:
    """The boxes around the regions of each task: those of its first annotation that was not cancelled."""
    for number, task in enumerate(tasks):
        try:
            url = next(str(value) for value in task["data"].values() if isinstance(value, str) and "." in value)
            done = [item for item in task.get("annotations", ()) if not item.get("was_cancelled")]
            regions = done[0]["result"] if done else []
            boxes = [box for region in regions if (box := _label_studio_box(region)) is not None]
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
            raise AnnotationError(
                f"{path}: task {number} is not one of Label Studio's JSON export, with data, annotations and results"
            ) from None
        yield unquote(url.partition("?d=")[2] or url.partition("?")[0]), boxes


def _label_studio_box(region: Mapping[str, Any]) -> list[float] | None:
    """The box in pixels; None for a region that is neither a rectangle nor a polygon."""
    value, size = region.get("value", {}), np.array([region.get("original_width"), region.get("original_height")])
    if "points" in value:
        points = np.array(value["points"], np.float64) / 100 * size
    elif {"x", "y", "width", "height"} <= value.keys() and "brushlabels" not in value:
        corner = np.array([value["x"], value["y"]], np.float64) / 100 * size
        sides = np.array([value["width"], value["height"]], np.float64) / 100 * size
        # Turned clockwise around its first corner, in pixels.
        angle = math.radians(value.get("rotation") or 0)
        along, down = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
        points = corner + np.array([i * sides[0] * along + j * sides[1] * down for i in (0, 1) for j in (0, 1)])
    else:
        return None
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]
