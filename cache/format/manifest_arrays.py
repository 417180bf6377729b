"""The manifest as Zarr arrays: images/ with a row an image, regions/ with a row a part.

It is written when the cache is made and never again, so a column needs no file of its own a part: it lies in a few
compressed chunks with checksums, which any Zarr library checks as it reads. A region array's row `p` holds the
regions of part `p` one after another, padded to the largest part, as the tokens lie in features/.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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

# With "." a chunk is one file `c.42.0.0`; the default "/" would spend two folders on every one.
CHUNK_KEYS: Any = {"name": "default", "separator": "."}
_COLUMN_CHUNK = 65_536  # entries of an images/ column in one chunk, so that few files hold millions of images
_REGION_CHUNK_BYTES = 16 << 20  # of boxes; the other region arrays are smaller


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
            columns.append((f"{name}_category", ragged.values, "int32"))  # of all images, one after another
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
    """int64 (P + 1,): where each part's regions begin in the manifest's region columns."""
    firsts = np.arange(0, geometry.images, geometry.part_size)
    starts: NDArray[np.int64] = offsets[np.append(firsts, geometry.images)]
    return starts


def write_regions(group: zarr.Group, manifest: Manifest, geometry: Geometry) -> None:
    starts = _part_starts(manifest.offsets, geometry)
    for name, values, dtype, fill in _region_columns(manifest):
        row = (geometry.capacity, *values.shape[1:])
        step = _parts_in_chunk(geometry)
        array = _create_column(group, f"regions/{name}", (geometry.n_parts, *row), (step, *row), dtype, fill)
        for first in range(0, geometry.n_parts, step):
            parts = range(first, min(first + step, geometry.n_parts))
            block = np.full((len(parts), *row), fill, dtype=dtype)
            for part in parts:
                block[part - first, : starts[part + 1] - starts[part]] = values[starts[part] : starts[part + 1]]
            array[parts.start : parts.stop] = block


def _parts_in_chunk(geometry: Geometry) -> int:
    return min(max(_REGION_CHUNK_BYTES // (geometry.capacity * 16), 1), geometry.n_parts)


def load_manifest(storage: Storage, header: Header) -> Manifest:
    """The manifest as it was when the cache was made.

    Raises NotACacheError when its arrays are damaged or are not those that the header speaks of.
    """
    cache = storage.address
    written_again = _require_undamaged(storage, header)
    try:
        # Others may have consolidated the metadata, before an array came or changed; each array's own counts.
        group = zarr.open_group(storage.zarr_store(), mode="r", zarr_format=3, use_consolidated=False)
        manifest = _read_manifest(group, header)
        wrong = "" if manifest.digest() == header.digest else "do not match the digest in zarr.json"
    except Exception as error:  # each codec of zarr raises its own
        wrong = f"cannot be read ({' '.join(str(error).split()):.200})"
    if not wrong:
        return manifest
    if written_again:
        raise NotACacheError(
            f"{cache}/{written_again[0]}: was written again by another program, and by it images/ or regions/ {wrong}; "
            "`regionspot cache repair` makes it again, or put it back from a copy of the cache"
        )
    raise NotACacheError(f"{cache}: images/ or regions/ {wrong}; put them back from a copy of the cache")


def _require_undamaged(storage: Storage, header: Header) -> list[str]:
    """Raises NotACacheError for a file that is not as it was made; those are returned that may do no harm.

    A Zarr library takes a chunk that is missing, or is looked for under another name, for one of fill values. An
    array's metadata may have been written again by another program that added attributes: what is read by it is held
    against the manifest's digest, which covers all but the federated lists.
    """
    names = [name for name in header.files if name.startswith(("images/", "regions/"))]
    try:
        with ThreadPoolExecutor(storage.readers) as pool:
            damages = list(pool.map(lambda name: header.damage(storage, name), names))
        damaged = {name: damage for name, damage in zip(names, damages, strict=True) if damage}
        written_again = [name for name in damaged if _is_covered_by_the_digest(name) and storage.exists(name)]
    except OSError as error:
        raise NotACacheError(f"{storage.address}: cannot be read: {error}; mend the disk or its permissions") from None
    for name, damage in damaged.items():
        if name not in written_again:
            raise NotACacheError(f"{storage.address}/{name}: {damage}; put it back from a copy of the cache")
    return written_again


def _is_covered_by_the_digest(name: str) -> bool:
    """Whether a file is metadata of an array whose values the manifest's digest covers, or of a group of them."""
    return name.endswith("/zarr.json") and not name.startswith(("images/negative", "images/not_exhaustive"))


def _read_manifest(group: zarr.Group, header: Header) -> Manifest:
    offsets = _offsets(_column(group, "images/region_count"))
    return Manifest(
        dataset=header.dataset,
        split=header.split,
        image_ids=_column(group, "images/id"),
        paths=_column(group, "images/path").astype(np.dtypes.StringDType()),
        heights=_column(group, "images/height"),
        widths=_column(group, "images/width"),
        offsets=offsets,
        boxes_xyxy=_read_regions(group, "regions/box", offsets, header.geometry),
        category_index=_read_regions(group, "regions/category", offsets, header.geometry),
        annotation_ids=_read_regions(group, "regions/annotation_id", offsets, header.geometry),
        categories=header.categories,
        scores=_read_regions(group, "regions/score", offsets, header.geometry) if "regions/score" in group else None,
        negatives=_read_ragged(group, "negative"),
        not_exhaustive=_read_ragged(group, "not_exhaustive"),
        source=header.source,
        report=header.report,
    )


def _column(group: zarr.Group, name: str) -> NDArray[Any]:
    return np.asarray(_array(group, name)[:])


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{name} is not an array")
    return array


def _offsets(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _read_ragged(group: zarr.Group, name: str) -> Ragged | None:
    if f"images/{name}_count" not in group:
        return None
    return Ragged(_offsets(_column(group, f"images/{name}_count")), _column(group, f"images/{name}_category"))


def _read_regions(group: zarr.Group, name: str, offsets: NDArray[np.int64], geometry: Geometry) -> NDArray[Any]:
    """A region column without its padding, a few parts at a time: padded and whole it may be twice as large."""
    array = _array(group, name)
    if array.shape[0] != geometry.n_parts:  # what is not read would be whatever was in that memory before
        raise ValueError(f"{name} has {array.shape[0]} parts, expected {geometry.n_parts}")
    starts = _part_starts(offsets, geometry)
    values = np.empty((int(starts[-1]), *array.shape[2:]), dtype=array.dtype)
    step = array.chunks[0]
    for first in range(0, geometry.n_parts, step):
        block = np.asarray(array[first : first + step])
        for part, padded in enumerate(block, start=first):
            values[starts[part] : starts[part + 1]] = padded[: starts[part + 1] - starts[part]]
    return values
