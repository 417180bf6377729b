"""The list `images` of a COCO annotation file as columns: ids, sizes, paths and LVIS's category lists."""

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
    """How the files of one dataset differ from COCO's.

    path_field   an image's field with its path, or with a URL that ends with the path
    path_parts   how many of the last components form the path inside the image folder; None: all
    federated    whether each image lists its negative and its not exhaustively annotated categories (LVIS)
    spelling     corrections of category names
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
    """The usable images as columns in the file's order. `skipped_ids`: ids of the other images."""

    def __init__(self, file: AnnotationFile, variant: CocoVariant, categories: tuple[Category, ...]) -> None:
        self._file, self._variant, self._categories = file, variant, categories
        self._index = {category.id: index for index, category in enumerate(categories)}
        self._columns: dict[str, list[Ints]] = {"id": [], "height": [], "width": []}
        self._paths: list[str] = []
        self._lists: dict[str, list[list[int]]] = {name: [] for name in _LISTS if variant.federated}
        self._named = 0  # images whose id is a name
        self.skipped_ids: set[int] = set()

    def read(self, raw: msgspec.Raw, skipped: SkippedRecords) -> None:
        for part in self._file.slices("images", raw, _Image, self._read_record, skipped):
            usable = []
            for index, image in zip(part.indices, part.items, strict=True):
                try:
                    self._add(image)
                except FieldError as error:
                    skipped.add("images", f"images[{index}]{error}")
                    self.skipped_ids.add(image.id)
                else:
                    usable.append(image)
            skipped.add_usable("images", len(usable))
            for name, chunks in self._columns.items():
                chunks.append(column(usable, name, np.int64))

    def manifest(self, dataset: str, split: str) -> Manifest:
        """The images, without regions. Raises AnnotationError if there are none, or if two have the same id."""
        if not self._paths:
            raise self._file.error("`images` is empty")
        ids, heights, widths = (np.concatenate(chunks) for chunks in self._columns.values())
        if len(repeated := Lookup(ids).repeated()):
            first, second = (self._paths[row] for row in np.flatnonzero(ids == repeated[0])[:2])
            raise self._file.error(
                f"`images` has {len(repeated)} ids more than once, the first is {repeated[0]} (of {first} and of "
                f"{second}); give each image its own id"
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

    def _add(self, image: _Image) -> None:
        """Raises FieldError, before it adds anything, if the path or the category lists are unusable."""
        path = path_of(self._variant, image.file_name, image.coco_url)
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
        raw_id = parse.required(record, "id")
        image_id = parse.image_id("id", raw_id)
        try:
            image = self._read_fields(image_id, record)
        except FieldError:
            self.skipped_ids.add(image_id)
            raise
        self._named += parse.integer_or_none(raw_id) is None
        return image

    def _read_fields(self, image_id: int, record: Mapping[str, Any]) -> _Image:
        def side(name: str) -> int:
            return parse.integer(name, parse.required(record, name), 1, 2**31 - 1, "pixels, a whole number from 1")

        def ids(name: str) -> list[int] | None:
            values = record.get(name)
            if values is None:
                return None
            if not isinstance(values, list):
                raise parse.wrong_value(name, values, "a list of category ids")
            return [parse.integer(name, value) for value in values]

        def path(name: str) -> str | None:
            value = record.get(name)
            return None if value is None else parse.text(name, value)

        return _Image(
            id=image_id,
            height=side("height"),
            width=side("width"),
            file_name=path("file_name"),
            # If the path is in file_name, coco_url may be anything.
            coco_url=path("coco_url") if self._variant.path_field == "coco_url" else None,
            neg_category_ids=ids(_NEGATIVE) if self._lists else None,
            not_exhaustive_category_ids=ids(_NOT_EXHAUSTIVE) if self._lists else None,
        )


def path_of(variant: CocoVariant, file_name: str | None, coco_url: str | None) -> str:
    """An image's path relative to the image folder. Raises FieldError for a path that may lead outside of it."""
    name, value = "file_name", file_name
    if variant.path_field == "coco_url" and coco_url:  # LVIS before v1 has file names only
        name, value = "coco_url", coco_url
        if "?" in value or "#" in value or "%" in value:  # query, fragment or escapes of the URL
            value = unquote(re.split("[?#]", value)[0])
    if not value:
        raise FieldError(f" has no `{variant.path_field}`")
    parts = value.replace("\\", "/").split("/")  # Windows separators
    if "://" in value and name == "file_name":
        raise parse.wrong_value(name, value, "a path inside the image folder, not a URL; download the image into it")
    if not parts[0] or parts[0][1:] == ":":
        raise parse.wrong_value(name, value, "a path relative to the image folder, not an absolute one")
    if ".." in parts or "\0" in value:
        raise parse.wrong_value(name, value, "a path inside the image folder; this one leaves it")
    return "/".join(parts if variant.path_parts is None else parts[-variant.path_parts :])
