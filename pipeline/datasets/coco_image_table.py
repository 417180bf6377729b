"""The `images` of an annotation file in COCO's form: ids, sizes, paths, and LVIS's lists of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import unquote

import msgspec
import numpy as np

from regionspot.cache.format.manifest import Category, Manifest
from regionspot.pipeline.datasets import field_parsing as parse
from regionspot.pipeline.datasets.failure_limit import SkippedRecords
from regionspot.pipeline.datasets.field_parsing import FieldError
from regionspot.pipeline.datasets.json_stream import AnnotationFile
from regionspot.pipeline.datasets.region_table import Ints, Lookup, column, manifest_of_images, ragged

Id: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Pixels: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

_NEGATIVE, _NOT_EXHAUSTIVE = _LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True)
class CocoVariant:
    """What one dataset's files do in their own way.

    path_field   the image's field that states its path, or an address that ends with it
    path_parts   how many of the last parts of that are the path inside the image folder; None: all
    federated    whether each image lists its negative and its not exhaustively annotated categories (LVIS)
    spelling     category names that are corrected, as found and as they should be
    """

    path_field: Literal["file_name", "coco_url"] = "file_name"
    path_parts: int | None = None
    federated: bool = False
    spelling: Mapping[str, str] = field(default_factory=dict)


class _Image(msgspec.Struct, gc=False):
    id: Id
    height: Pixels
    width: Pixels
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[Id] | None = None
    not_exhaustive_category_ids: list[Id] | None = None


class CocoImageTable:
    """The images that can be used, as columns in the file's order; the others are skipped.

    left_out   ids of skipped images
    """

    def __init__(self, file: AnnotationFile, form: CocoVariant, categories: tuple[Category, ...]) -> None:
        self._file, self._form, self._categories = file, form, categories
        self._index = {category.id: index for index, category in enumerate(categories)}
        self._columns: dict[str, list[Ints]] = {"id": [], "height": [], "width": []}
        self._paths: list[str] = []
        self._lists: dict[str, list[list[int]]] = {name: [] for name in _LISTS if form.federated}
        self._named = 0
        self.left_out: set[int] = set()

    def read(self, raw: msgspec.Raw, skipped: SkippedRecords) -> None:
        for piece in self._file.slices("images", raw, _Image, self._read_record, skipped):
            kept = []
            for place, image in zip(piece.places, piece.items, strict=True):
                try:
                    self._take(image)
                except FieldError as error:
                    skipped.add("images", f"images[{place}]{error}")
                    self.left_out.add(image.id)
                else:
                    kept.append(image)
            skipped.add_usable("images", len(kept))
            for name, pieces in self._columns.items():
                pieces.append(column(kept, name, np.int64))

    def manifest(self, dataset: str, split: str) -> Manifest:
        """The images without regions yet. Raises AnnotationError where there are none, or two of one id."""
        if not self._paths:
            raise self._file.refuse("`images` is empty")
        ids, heights, widths = (np.concatenate(pieces) for pieces in self._columns.values())
        if len(repeated := Lookup(ids).repeated()):
            first, other = (self._paths[row] for row in np.flatnonzero(ids == repeated[0])[:2])
            raise self._file.refuse(
                f"`images` holds {len(repeated)} ids more than once, the first is {repeated[0]} (of {first} and of "
                f"{other}); give each image an id of its own"
            )
        return manifest_of_images(
            dataset,
            split,
            ids,
            self._paths,
            heights,
            widths,
            self._categories,
            negatives=ragged(self._lists[_NEGATIVE]) if self._lists else None,
            not_exhaustive=ragged(self._lists[_NOT_EXHAUSTIVE]) if self._lists else None,
            source=self._file.source,
            report={"image_ids_that_are_names": self._named} if self._named else {},
        )

    def _take(self, image: _Image) -> None:
        """Raises FieldError, with nothing taken, where path or lists cannot be used."""
        path = path_of(self._form, image.file_name, image.coco_url)
        lists = {name: self._indices(name, getattr(image, name)) for name in self._lists}
        self._paths.append(path)
        for name, indices in lists.items():
            self._lists[name].append(indices)

    def _indices(self, name: str, ids: list[int] | None) -> list[int]:
        if ids is None:
            raise FieldError(f" has no `{name}`, which LVIS's images have")
        try:
            return [self._index[category] for category in ids]
        except KeyError as error:
            raise FieldError(f".{name} names category {error}, which `categories` lacks") from None

    def _read_record(self, value: Any) -> _Image:
        record = parse.json_object(value)
        stated = parse.required(record, "id")
        image_id = parse.image_id("id", stated)
        try:
            image = self._read_fields(image_id, record)
        except FieldError:
            self.left_out.add(image_id)
            raise
        self._named += parse.integer_or_none(stated) is None
        return image

    def _read_fields(self, image_id: int, record: Mapping[str, Any]) -> _Image:
        def side(name: str) -> int:
            what = "pixels, a whole number from 1"
            return parse.integer(name, parse.required(record, name), least=1, most=2**31 - 1, expected=what)

        def ids(name: str) -> list[int] | None:
            listed = record.get(name)
            if listed is None:
                return None
            if not isinstance(listed, list):
                raise parse.wrong_value(name, listed, "a list of category ids")
            return [parse.integer(name, each) for each in listed]

        def path(name: str) -> str | None:
            stated = record.get(name)
            return None if stated is None else parse.text(name, stated)

        return _Image(
            id=image_id,
            height=side("height"),
            width=side("width"),
            file_name=path("file_name"),
            # Of forms that take the path from the file's name, the address may be anything.
            coco_url=path("coco_url") if self._form.path_field == "coco_url" else None,
            neg_category_ids=ids(_NEGATIVE) if self._lists else None,
            not_exhaustive_category_ids=ids(_NOT_EXHAUSTIVE) if self._lists else None,
        )


def path_of(form: CocoVariant, file_name: str | None, coco_url: str | None) -> str:
    """Where an image lies inside the image folder. Raises FieldError for what could lie outside of it."""
    name, stated = "file_name", file_name
    if form.path_field == "coco_url" and coco_url:  # LVIS before v1 has names alone
        name, stated = "coco_url", coco_url
        if "?" in stated or "#" in stated or "%" in stated:  # what an address has beside the path
            stated = unquote(re.split("[?#]", stated)[0])
    if not stated:
        raise FieldError(f" has no `{form.path_field}`")
    parts = stated.replace("\\", "/").split("/")  # Windows' separators
    if "://" in stated and name == "file_name":
        raise parse.wrong_value(name, stated, "a path inside the image folder, not an address; fetch the image there")
    if not parts[0] or parts[0][1:] == ":":
        raise parse.wrong_value(name, stated, "a path relative to the image folder, not an absolute one")
    if ".." in parts or "\0" in stated:
        raise parse.wrong_value(name, stated, "a path inside the image folder; this one leaves it")
    return "/".join(parts if form.path_parts is None else parts[-form.path_parts :])
