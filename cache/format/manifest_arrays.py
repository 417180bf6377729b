"""The manifest as Zarr arrays: images/ with one row per image, regions/ with one row per part.

It is written once, when the cache is created, in a few compressed chunks with checksums that any Zarr library verifies.
Row `p` of a region array holds the regions of part `p`, padded to the largest part, like the tokens in features/.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from regionspot.cache.errors import NotACacheError
from regionspot.cache.format.header import Header
from regionspot.cache.format.manifest import NO_CATEGORY, Manifest, Ragged
from regionspot.cache.format.schema import Geometry
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.scratch_array import scratch_array

Allocate = Callable[[tuple[int, ...], Any], NDArray[Any]]  # an array of a shape and dtype, like np.empty

# With "." a chunk is one file `c.42.0.0`; the default "/" needs two folders for each.
CHUNK_KEYS: Any = {"name": "default", "separator": "."}
_COLUMN_CHUNK = 65_536  # entries per chunk of an images/ column: few files for millions of images
_REGION_CHUNK_BYTES = 16 << 20  # of the boxes; the other region arrays are smaller


def _create_column(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill: Any
) -> zarr.Array[Any]:
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=fill,
        filters=None,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        chunk_key_encoding=CHUNK_KEYS,
    )


def write_images(group: zarr.Group, manifest: Manifest) -> None:
    columns: list[tuple[str, NDArray[Any], str]] = [
        ("id", manifest.image_ids, "int64"),
        ("height", manifest.heights, "int32"),
        ("width", manifest.widths, "int32"),
        ("path", manifest.paths, "string"),
        ("region_count", manifest.region_count, "int32"),
    ]
    for name, ragged in (("negative", manifest.negatives), ("not_exhaustive", manifest.not_exhaustive)):
        if ragged is not None:
            columns.append((f"{name}_count", np.diff(ragged.offsets), "int32"))
            columns.append((f"{name}_category", ragged.values, "int32"))  # of all images, concatenated
    for name, values, dtype in columns:
        chunks = (min(max(len(values), 1), _COLUMN_CHUNK),)
        column = _create_column(group, f"images/{name}", (len(values),), chunks, dtype, "" if dtype == "string" else 0)
        column[:] = values


def _region_columns(manifest: Manifest) -> list[tuple[str, NDArray[Any], str, Any]]:
    """Name, values, dtype and padding of each region array."""
    columns: list[tuple[str, NDArray[Any], str, Any]] = [
        ("box", manifest.boxes_xyxy, "float32", 0),
        ("category", manifest.category_index, "int32", NO_CATEGORY),
        ("annotation_id", manifest.annotation_ids, "int64", 0),
    ]
    return columns if manifest.scores is None else [*columns, ("score", manifest.scores, "float32", 0)]


def _part_starts(offsets: NDArray[np.int64], geometry: Geometry) -> NDArray[np.int64]:
    """int64 (P + 1,): where each part's regions start in the manifest's region columns."""
    first_rows = np.arange(0, geometry.images, geometry.part_size)
    starts: NDArray[np.int64] = offsets[np.append(first_rows, geometry.images)]
    return starts


def write_regions(group: zarr.Group, manifest: Manifest, geometry: Geometry) -> None:
    starts = _part_starts(manifest.offsets, geometry)
    for name, values, dtype, fill in _region_columns(manifest):
        row_shape = (geometry.capacity, *values.shape[1:])
        step = _parts_per_chunk(geometry)
        shape, chunks = (geometry.n_parts, *row_shape), (step, *row_shape)
        array = _create_column(group, f"regions/{name}", shape, chunks, dtype, fill)
        for first in range(0, geometry.n_parts, step):
            parts = range(first, min(first + step, geometry.n_parts))
            block = np.full((len(parts), *row_shape), fill, dtype=dtype)
            for part in parts:
                block[part - first, : starts[part + 1] - starts[part]] = values[starts[part] : starts[part + 1]]
            array[parts.start : parts.stop] = block


def _parts_per_chunk(geometry: Geometry) -> int:
    return min(max(_REGION_CHUNK_BYTES // (geometry.capacity * 16), 1), geometry.n_parts)


def load_manifest(storage: Storage, header: Header, on_disk: bool = False) -> Manifest:
    """Read the manifest; with `on_disk`, its large columns are in temporary files and its paths are read on first use.

    Raises NotACacheError when its arrays are damaged or do not match the header.
    """
    cache = storage.address
    rewritten = _require_undamaged(storage, header)
    try:
        manifest = _read_manifest(storage, header, on_disk)
        if not rewritten:
            # Files that are unchanged hold what the digest was computed from; computing it takes as long as reading.
            vars(manifest)["_digest"] = header.digest
        problem = "" if manifest.digest() == header.digest else "do not match the digest in zarr.json"
    except Exception as error:  # each zarr codec raises its own kind
        problem = _unreadable(error)
    if not problem:
        return manifest
    if rewritten:
        raise NotACacheError(
            f"{cache}/{rewritten[0]}: was rewritten by another program, and with it images/ or regions/ {problem}; "
            "`regionspot cache repair` restores it, or restore it from a copy of the cache"
        )
    raise NotACacheError(f"{cache}: images/ or regions/ {problem}; restore them from a copy of the cache")


def _require_undamaged(storage: Storage, header: Header) -> list[str]:
    """Raises NotACacheError for a changed or missing file; returns the changed files that may be harmless.

    Zarr libraries read a missing chunk, and one under another key, as fill values. Array metadata may be harmless:
    another program may have added attributes. What is read with it is verified by the manifest's digest, which covers
    everything except the federated lists.
    """
    names = [name for name in header.files if name.startswith(("images/", "regions/"))]
    try:
        with ThreadPoolExecutor(storage.readers) as pool:
            problems = list(pool.map(lambda name: header.damage(storage, name), names))
        damaged = {name: problem for name, problem in zip(names, problems, strict=True) if problem}
        rewritten = [name for name in damaged if _is_verified_by_digest(name) and storage.exists(name)]
    except OSError as error:
        raise NotACacheError(f"{storage.address}: cannot be read: {error}; fix the disk or its permissions") from None
    for name, problem in damaged.items():
        if name not in rewritten:
            raise NotACacheError(f"{storage.address}/{name}: {problem}; restore it from a copy of the cache")
    return rewritten


def _is_verified_by_digest(name: str) -> bool:
    """Whether a file is metadata of an array or group whose values the manifest's digest covers."""
    return name.endswith("/zarr.json") and not name.startswith(("images/negative", "images/not_exhaustive"))


def _read_manifest(storage: Storage, header: Header, on_disk: bool) -> Manifest:
    group, geometry = _open_group(storage), header.geometry
    allocate: Allocate = scratch_array if on_disk else np.empty
    offsets = _offsets(_column(group, "images/region_count"), allocate)
    regions = ["box", "category", "annotation_id", *(["score"] if "regions/score" in group else [])]
    # In parallel: each is decompressed by one thread, and millions of boxes take two seconds.
    with ThreadPoolExecutor(storage.readers) as pool:
        columns = {
            name: pool.submit(_read_regions, group, f"regions/{name}", offsets, geometry, allocate) for name in regions
        }
        columns |= {name: pool.submit(_column, group, f"images/{name}", allocate) for name in ("id", "height", "width")}
        if not on_disk:
            columns["path"] = pool.submit(_column, group, "images/path")
    return Manifest(
        dataset=header.dataset,
        split=header.split,
        image_ids=columns["id"].result(),
        paths=partial(_read_paths, storage, header) if on_disk else columns["path"].result(),
        heights=columns["height"].result(),
        widths=columns["width"].result(),
        offsets=offsets,
        boxes_xyxy=columns["box"].result(),
        category_index=columns["category"].result(),
        annotation_ids=columns["annotation_id"].result(),
        categories=header.categories,
        scores=columns["score"].result() if "score" in columns else None,
        negatives=_read_ragged(group, "negative", allocate),
        not_exhaustive=_read_ragged(group, "not_exhaustive", allocate),
        source=header.source,
        report=header.report,
    )


def _open_group(storage: Storage) -> zarr.Group:
    # Consolidated metadata by other programs may be out of date; each array's own metadata is not.
    return zarr.open_group(storage.zarr_store(), mode="r", zarr_format=3, use_consolidated=False)


def _read_paths(storage: Storage, header: Header) -> NDArray[Any]:
    """Raises NotACacheError if the paths cannot be read any more, or are not those of the cache that was opened."""
    try:
        for name in header.files:
            if name.startswith("images/path/c.") and (damage := header.damage(storage, name)):
                raise ValueError(f"{name} {damage}")
        return _column(_open_group(storage), "images/path")
    except Exception as error:  # each zarr codec raises its own kind
        raise NotACacheError(
            f"{storage.address}: images/path {_unreadable(error)}; the cache was changed while open: open it again"
        ) from None


def _unreadable(error: Exception) -> str:
    return f"cannot be read ({' '.join(str(error).split()):.200})"


def _column(group: zarr.Group, name: str, allocate: Allocate = np.empty) -> NDArray[Any]:
    array = _array(group, name)
    values = allocate(array.shape, array.dtype)
    for first in range(0, len(values), array.chunks[0]):
        values[first : first + array.chunks[0]] = array[first : first + array.chunks[0]]
    return values


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{name} is not an array")
    return array


def _offsets(counts: NDArray[np.int32], allocate: Allocate) -> NDArray[np.int64]:
    offsets: NDArray[np.int64] = allocate((len(counts) + 1,), np.int64)
    offsets[0] = 0
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _read_ragged(group: zarr.Group, name: str, allocate: Allocate) -> Ragged | None:
    if f"images/{name}_count" not in group:
        return None
    offsets = _offsets(_column(group, f"images/{name}_count"), allocate)
    return Ragged(offsets, _column(group, f"images/{name}_category", allocate))


def _read_regions(
    group: zarr.Group, name: str, offsets: NDArray[np.int64], geometry: Geometry, allocate: Allocate
) -> NDArray[Any]:
    """A region column without padding, read a few parts at a time: with padding it may be twice as large."""
    array = _array(group, name)
    if array.shape[0] != geometry.n_parts:  # otherwise the rest of `values` would stay uninitialised
        raise ValueError(f"{name} has {array.shape[0]} parts, expected {geometry.n_parts}")
    starts = _part_starts(offsets, geometry)
    values = allocate((int(starts[-1]), *array.shape[2:]), array.dtype)
    step = array.chunks[0]
    for first in range(0, geometry.n_parts, step):
        block = np.asarray(array[first : first + step])
        for part, padded in enumerate(block, start=first):
            values[starts[part] : starts[part + 1]] = padded[: starts[part + 1] - starts[part]]
    return values
