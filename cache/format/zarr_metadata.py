"""The zarr.json files of a cache's groups and arrays: what they have to say, and whether one says it.

Other programs may write them again without harm: Zarr libraries do when somebody adds attributes or consolidates the
metadata, formatters change the order and the white space. So what counts is what a document says of the data: its
shape, type, chunks, codecs and fill value.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.cache.format.header import Header
from regionspot.cache.format.manifest import Manifest, Ragged
from regionspot.cache.storage.atomic_files import from_json
from regionspot.cache.storage.base import Storage

ROOT = {"zarr_format": 3, "node_type": "group"}  # of the root's zarr.json, beside its attributes

# What others may add, and what may be left out, without a change for whoever reads the data.
_NO_MATTER: dict[str, Any] = {
    "attributes": {},
    "consolidated_metadata": None,
    "dimension_names": None,
    "storage_transformers": [],
}


def damaged_files(storage: Storage, header: Header, threads: int) -> tuple[dict[str, str | OSError], list[str]]:
    """What is wrong with the files that were made with the cache, by name; OSError where one cannot be read.

    And, apart, each zarr.json that another program has written again and that says the same of the data.
    """

    def damage(name: str) -> str | OSError | None:
        try:
            return header.damage(storage, name)
        except OSError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(header.files, pool.map(damage, header.files), strict=True))
    damaged = {name: what for name, what in found.items() if what}
    written_again = []
    if any(name.endswith("/zarr.json") for name in damaged):
        expected = expected_metadata(header)
        for name in damaged.keys() & expected.keys():
            with suppress(OSError):  # missing, or it cannot be read: that is known already
                if difference := metadata_difference(storage.read(name), expected[name]):
                    damaged[name] = f"{damaged[name]}: {difference}"
                else:
                    del damaged[name]
                    written_again.append(name)
    return damaged, sorted(written_again)


def expected_metadata(header: Header) -> dict[str, bytes]:
    """Every zarr.json of a cache but the root's, as the installed Zarr library writes it, by its path in the cache.

    Not those of the federated lists (`images/negative_category` and the like), whose length the header does not hold.
    """
    from regionspot.cache.format.create import build_cache  # zarr takes a second to import

    with tempfile.TemporaryDirectory() as folder:
        build_cache(Path(folder), _blank_manifest(header), header)
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*/zarr.json")]
        lists = {f"images/{name}_category/zarr.json" for name in ("negative", "not_exhaustive")}
        return {name: Path(folder, name).read_bytes() for name in names if name not in lists}


def metadata_difference(stored: bytes, expected: bytes) -> str | None:
    """What a zarr.json says otherwise than it should, in words that follow on its name; None where nothing matters."""
    try:
        found = from_json(stored)
    except ValueError:
        return "is not JSON"
    if not isinstance(found, dict):
        return "is not a Zarr v3 group's or array's metadata"
    return document_difference(found, from_json(expected))


def document_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """As `metadata_difference`, of documents."""
    for name in dict.fromkeys([*expected, *found]):
        if name not in _NO_MATTER and _normal(found.get(name)) != _normal(expected.get(name)):
            return f"{name} is {_short(found.get(name))}, expected {_short(expected.get(name))}"
    if found.get("storage_transformers"):
        return f"storage_transformers is {_short(found['storage_transformers'])}, expected none"
    ours, theirs = expected.get("attributes", {}), found.get("attributes", {})
    for name, value in ours.items():
        if not isinstance(theirs, dict) or theirs.get(name) != value:
            return f"attribute {name} is not {_short(value)}"
    return None


def out_of_date(consolidated: Any, documents: Mapping[str, Any]) -> list[str]:
    """Groups and arrays of which consolidated metadata in the root does not say what their own zarr.json does.

    documents   what each zarr.json holds, by the path of its group or array
    """
    entries = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    entries = entries if isinstance(entries, dict) else {}
    return [
        name
        for name in sorted(entries.keys() | documents.keys())
        if not isinstance(entry := entries.get(name), dict)
        or not isinstance(document := documents.get(name), dict)
        or document_difference(entry, document)
    ]


def _normal(value: Any) -> Any:
    """A value of a document in the form that Zarr libraries agree on: without empty configurations."""
    if isinstance(value, dict):
        return {key: _normal(inner) for key, inner in value.items() if not (key == "configuration" and inner == {})}
    return [_normal(inner) for inner in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _blank_manifest(header: Header) -> Manifest:
    """As many images as the header says, without a region: its arrays' metadata are those of the real one."""
    images = header.geometry.images
    zeros = np.zeros(images, np.int64)
    none = Ragged(np.zeros(images + 1, np.int64), np.zeros(0, np.int32))
    return Manifest(
        dataset=header.dataset,
        split=header.split,
        image_ids=zeros,
        paths=np.full(images, "", dtype=np.dtypes.StringDType()),
        heights=zeros.astype(np.int32),
        widths=zeros.astype(np.int32),
        offsets=none.offsets,
        boxes_xyxy=np.zeros((0, 4), np.float32),
        category_index=np.zeros(0, np.int32),
        annotation_ids=np.zeros(0, np.int64),
        categories=header.categories,
        scores=np.zeros(0, np.float32) if "regions/score/zarr.json" in header.files else None,
        negatives=none if "images/negative_count/zarr.json" in header.files else None,
        not_exhaustive=none if "images/not_exhaustive_count/zarr.json" in header.files else None,
    )
