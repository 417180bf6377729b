"""Annotation files in COCO's form: one JSON object with `images`, `annotations` and `categories`.

Objects365, V3Det, LVIS and COCO itself differ only in where a picture's path stands and in a few extra fields, which
a `Form` states as data. Pictures keep the file's order, so do the regions of a picture; categories are sorted by id,
because Objects365 lists them in another order for each split.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from regionspot.cache.manifest import Category, Manifest
from regionspot.pipeline.annotation_file import AnnotationFile
from regionspot.pipeline.columns import Floats, Ints, Lookup, RegionTable, manifest_of_pictures, ragged

log = logging.getLogger(__name__)

Id: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Pixels: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Number: TypeAlias = float | None  # null: a coordinate that is not finite


@dataclass(frozen=True)
class Form:
    """What one dataset's files do in their own way.

    path_field   the picture's field that states its path, or an address that ends with it
    path_parts   how many of the last parts of that are the path inside the photo folder; None: all
    federated    whether each picture lists its negative and its not exhaustively annotated categories (LVIS)
    spelling     category names that are corrected, as found and as they should be
    """

    path_field: Literal["file_name", "coco_url"] = "file_name"
    path_parts: int | None = None
    federated: bool = False
    spelling: Mapping[str, str] = field(default_factory=dict)


class _Top(msgspec.Struct):
    images: msgspec.Raw
    annotations: msgspec.Raw
    categories: msgspec.Raw


class _Image(msgspec.Struct, gc=False):
    id: Id
    height: Pixels
    width: Pixels
    file_name: str = ""
    coco_url: str = ""
    neg_category_ids: list[Id] | None = None
    not_exhaustive_category_ids: list[Id] | None = None


class _Annotation(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: tuple[Number, Number, Number, Number]  # x, y, width, height
    id: Id = -1
    iscrowd: int | bool = False
    isfake: int | bool = False


class _Category(msgspec.Struct):
    id: Id
    name: str
    synset: str | None = None
    frequency: Literal["r", "c", "f"] | None = None
    synonyms: list[str] = []
    definition: str | None = msgspec.field(name="def", default=None)
    cat_info: Any = None  # V3Det's definition


class _ImageId(msgspec.Struct):
    id: Id


class _ImageList(msgspec.Struct):
    images: list[_ImageId]


def read_coco_form(path: Path, dataset: str, split: str, form: Form) -> Manifest:
    """Read one file. Raises AnnotationError, one line, where it is not what it should be."""
    file = AnnotationFile(path)
    top = file.decode(_Top)
    categories, corrected = _categories(file, top.categories, form)
    category_of = Lookup(np.array([category.id for category in categories], np.int64))
    pictures = _pictures(file, top.images, form, dataset, split, categories)
    picture_of = Lookup(pictures.image_ids)
    if len(repeated := picture_of.repeated()):
        raise file.refuse(f"`images` holds {len(repeated)} ids more than once, the first is {repeated[0]}")
    table = RegionTable(replace(pictures, report={"corrected_names": corrected} if corrected else {}))
    for piece in file.slices("annotations", top.annotations, _Annotation):
        _add(file, table, piece, picture_of, category_of)
    return table.finish()


def cut_to_images(manifest: Manifest, path: Path, split: str) -> Manifest:
    """The pictures of `manifest` that the COCO-form file at `path` lists, in the manifest's order.

    The report still counts what reading the whole of `manifest` dropped.
    """
    file = AnnotationFile(path)
    listed = np.unique(np.array([image.id for image in file.decode(_ImageList).images], np.int64))
    rows = Lookup(manifest.image_ids).find(listed)
    if len(unknown := listed[rows < 0]):
        whole = " and ".join(manifest.source["files"])
        raise file.refuse(f"{len(unknown)} of its pictures are not in {whole}, the first has id {unknown[0]}")
    files = {**manifest.source["files"], **file.source["files"]}
    return replace(manifest.select(np.sort(rows)), split=split, source={"files": files})


def xyxy(boxes_xywh: Floats) -> Floats:
    """Corners of boxes (M, 4) given as x, y, width, height."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, and dropped as such
        return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def column(items: Sequence[Any], name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """One field of decoded objects as an array."""
    return np.fromiter(map(attrgetter(name), items), dtype, len(items))


def boxes_of(items: Sequence[Any]) -> Floats:
    """float64 (M, 4): the field `bbox` of decoded objects, NaN where it is null."""
    return np.array([item.bbox for item in items], np.float64).reshape(-1, 4)


def _categories(file: AnnotationFile, raw: msgspec.Raw, form: Form) -> tuple[tuple[Category, ...], int]:
    """The categories by rising id, and how many names were corrected."""
    found = [category for piece in file.slices("categories", raw, _Category) for category in piece]
    found.sort(key=attrgetter("id"))
    for one, other in pairwise(found):
        if one.id == other.id:
            raise file.refuse(f"`categories` holds id {one.id} more than once")
    wrong = [name for category in found if (name := category.name.strip()) in form.spelling]
    if wrong:
        log.info("%s: corrected the spelling of %s", file.path.name, ", ".join(wrong))
    return tuple(_category(category, form) for category in found), len(wrong)


def _category(category: _Category, form: Form) -> Category:
    name = category.name.strip()
    explained = category.cat_info if isinstance(category.cat_info, str) else None
    return Category(
        id=category.id,
        name=form.spelling.get(name, name),
        synset=category.synset,
        frequency=category.frequency,
        synonyms=tuple(category.synonyms),
        definition=category.definition or explained,
    )


def _pictures(
    file: AnnotationFile, raw: msgspec.Raw, form: Form, dataset: str, split: str, categories: tuple[Category, ...]
) -> Manifest:
    """The manifest's picture columns, in the file's order."""
    ids, heights, widths = [], [], []
    paths: list[str] = []
    federated = _FederatedLists(file, categories)
    for images in file.slices("images", raw, _Image):
        if form.federated:
            federated.add(images, len(paths))
        ids.append(column(images, "id", np.int64))
        heights.append(column(images, "height", np.int64))
        widths.append(column(images, "width", np.int64))
        paths.extend(_path(file, form, image, at) for at, image in enumerate(images, len(paths)))
    if not paths:
        raise file.refuse("`images` is empty")
    return manifest_of_pictures(
        dataset,
        split,
        np.concatenate(ids),
        paths,
        np.concatenate(heights),
        np.concatenate(widths),
        categories,
        negatives=ragged(federated.negatives) if form.federated else None,
        not_exhaustive=ragged(federated.not_exhaustive) if form.federated else None,
        source=file.source,
    )


class _FederatedLists:
    """LVIS's two lists of every picture, category ids turned into indices."""

    def __init__(self, file: AnnotationFile, categories: tuple[Category, ...]) -> None:
        self.negatives: list[list[int]] = []
        self.not_exhaustive: list[list[int]] = []
        self._file = file
        self._index = {category.id: index for index, category in enumerate(categories)}

    def add(self, images: list[_Image], first: int) -> None:
        for at, image in enumerate(images, first):
            self.negatives.append(self._indices(image, at, "neg_category_ids"))
            self.not_exhaustive.append(self._indices(image, at, "not_exhaustive_category_ids"))

    def _indices(self, image: _Image, at: int, name: str) -> list[int]:
        ids = getattr(image, name)
        if ids is None:
            raise self._file.refuse(f"LVIS's field `{name}` is missing - at `$.images[{at}]`")
        try:
            return [self._index[category] for category in ids]
        except KeyError as error:
            raise self._file.refuse(
                f"`{name}` names category {error}, which `categories` lacks - at `$.images[{at}]`"
            ) from None


def _path(file: AnnotationFile, form: Form, image: _Image, at: int) -> str:
    """Where the picture lies inside the photo folder; nothing that could lie outside of it."""
    stated: str = getattr(image, form.path_field)
    parts = stated.split("/")
    where = f"at `$.images[{at}].{form.path_field}`"
    if not stated:
        raise file.refuse(f"the picture's `{form.path_field}` is missing or empty - {where}")
    if ".." in parts or not parts[0] or "\\" in stated or "\0" in stated or parts[0][1:] == ":":
        raise file.refuse(f"{stated!r} leaves the photo folder, where every picture must lie - {where}")
    return "/".join(parts if form.path_parts is None else parts[-form.path_parts :])


def _add(
    file: AnnotationFile, table: RegionTable, piece: list[_Annotation], picture_of: Lookup, category_of: Lookup
) -> None:
    """One slice of annotations into the table."""
    rows = _known(file, picture_of, column(piece, "image_id", np.int64), "image_id", "images")
    categories = _known(file, category_of, column(piece, "category_id", np.int64), "category_id", "categories")
    drop = {
        "dropped_crowd": column(piece, "iscrowd", np.bool_),
        "dropped_fake": column(piece, "isfake", np.bool_),
    }
    table.add(rows, xyxy(boxes_of(piece)), categories, column(piece, "id", np.int64), drop=drop)


def _known(file: AnnotationFile, lookup: Lookup, ids: Ints, name: str, field_name: str) -> Ints:
    found = lookup.find(ids)
    if (found < 0).any():
        unknown = ids[found < 0][0]
        raise file.refuse(f"an annotation has {name} {unknown}, which `{field_name}` lacks")
    return found
