"""The zarr.json files of a cache's groups and arrays: their expected content, and how they differ from it.

Other programs may rewrite them without harm: Zarr libraries when attributes are added or metadata is consolidated,
formatters when they change order and white space. So only what describes the data is compared: shape, dtype, chunks,
codecs and fill value.
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

ROOT = {"zarr_format": 3, "node_type": "group"}  # the root's zarr.json, without attributes

# Fields that may be added or omitted without changing how the data is read, with their defaults.
_IRRELEVANT: dict[str, Any] = {
    "attributes": {},
    "consolidated_metadata": None,
    "dimension_names": None,
    "storage_transformers": [],
}


def damaged_files(storage: Storage, header: Header, threads: int) -> tuple[dict[str, str | OSError], list[str]]:
    """What is wrong with the files created with the cache, by name; an OSError if one cannot be read.

    Second result: the zarr.json files that another program has rewritten and that describe the data correctly.
    """

    def damage(name: str) -> str | OSError | None:
        try:
            return header.damage(storage, name)
        except OSError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        results = dict(zip(header.files, pool.map(damage, header.files), strict=True))
    damaged = {name: problem for name, problem in results.items() if problem}
    rewritten = []
    if any(name.endswith("/zarr.json") for name in damaged):
        expected = expected_metadata(header)
        for name in damaged.keys() & expected.keys():
            with suppress(OSError):  # missing or unreadable: already in `damaged`
                if difference := metadata_difference(storage.read(name), expected[name]):
                    damaged[name] = f"{damaged[name]}: {difference}"
                else:
                    del damaged[name]
                    rewritten.append(name)
    return damaged, sorted(rewritten)


def expected_metadata(header: Header) -> dict[str, bytes]:
    """Every zarr.json of a cache except the root's, as the installed Zarr library writes it, by its path in the cache.

    Without those of the federated lists (`images/negative_category` etc.), whose length the header does not record.
    """
    from regionspot.cache.format.create import build_cache  # zarr takes a second to import

    with tempfile.TemporaryDirectory() as folder:
        build_cache(Path(folder), _blank_manifest(header), header)
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*/zarr.json")]
        federated = {f"images/{name}_category/zarr.json" for name in ("negative", "not_exhaustive")}
        return {name: Path(folder, name).read_bytes() for name in names if name not in federated}


def metadata_difference(stored: bytes, expected: bytes) -> str | None:
    """How a zarr.json differs from the expected one, as text to put after its name; None if the data is unaffected."""
    try:
        document = from_json(stored)
    except ValueError:
        return "is not JSON"
    if not isinstance(document, dict):
        return "is not a Zarr v3 group's or array's metadata"
    return document_difference(document, from_json(expected))


def document_difference(document: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Like `metadata_difference`, for parsed documents."""
    for name in dict.fromkeys([*expected, *document]):
        if name not in _IRRELEVANT and _normal(document.get(name)) != _normal(expected.get(name)):
            return f"{name} is {_short(document.get(name))}, expected {_short(expected.get(name))}"
    if document.get("storage_transformers"):
        return f"storage_transformers is {_short(document['storage_transformers'])}, expected none"
    attributes = document.get("attributes", {})
    for name, value in expected.get("attributes", {}).items():
        if not isinstance(attributes, dict) or attributes.get(name) != value:
            return f"attribute {name} is not {_short(value)}"
    return None


def outdated_entries(consolidated: Any, documents: Mapping[str, Any]) -> list[str]:
    """Groups and arrays whose entry in the root's consolidated metadata differs from their own zarr.json.

    documents   the content of each zarr.json, by the path of its group or array
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
    """A value without empty configurations, which only some Zarr libraries write."""
    if isinstance(value, dict):
        return {key: _normal(inner) for key, inner in value.items() if not (key == "configuration" and inner == {})}
    return [_normal(inner) for inner in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _blank_manifest(header: Header) -> Manifest:
    """A manifest with the header's number of images and no regions: its arrays have the metadata of the real one."""
    images = header.geometry.images
    zeros = np.zeros(images, np.int64)
    empty = Ragged(np.zeros(images + 1, np.int64), np.zeros(0, np.int32))
    return Manifest(
        dataset=header.dataset,
        split=header.split,
        image_ids=zeros,
        paths=np.full(images, "", dtype=np.dtypes.StringDType()),
        heights=zeros.astype(np.int32),
        widths=zeros.astype(np.int32),
        offsets=empty.offsets,
        boxes_xyxy=np.zeros((0, 4), np.float32),
        category_index=np.zeros(0, np.int32),
        annotation_ids=np.zeros(0, np.int64),
        categories=header.categories,
        scores=np.zeros(0, np.float32) if "regions/score/zarr.json" in header.files else None,
        negatives=empty if "images/negative_count/zarr.json" in header.files else None,
        not_exhaustive=empty if "images/not_exhaustive_count/zarr.json" in header.files else None,
    )
