"""The doctor's look at where features are to be written and where images are read from."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from regionspot.cache.errors import RegionSpotError
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.info import size_text
from regionspot.pipeline.doctor.run import Asked, Finding

_BLOCK = 8 << 20  # bytes
_MOST = 32 * _BLOCK
_SECONDS = 3.0  # of writing at most
_LITTLE = 2 * 10**9  # bytes: a part of 512 images with CLIP L/14 maps is 0.27 GB, and several are under way at once


def cache_place(asked: Asked) -> Iterator[Finding]:
    """What is there, room, and a file written and flushed."""
    if asked.cache is None:
        return
    storage = open_storage(asked.cache)
    if storage.exists("zarr.json"):
        yield from _cache_there(asked.cache)
    if isinstance(storage, LocalStorage):
        folder = next(each for each in (storage.folder, *storage.folder.absolute().parents) if each.is_dir())
        storage = LocalStorage(folder)
        free = shutil.disk_usage(folder).free
        if free > _LITTLE:
            yield Finding("disk", "ok", f"{folder}: {size_text(free)} free")
        else:
            mend = "make room: `extract --dry-run` says how much it takes"
            yield Finding("disk", "warn", f"{folder}: {size_text(free)} free", mend)
    try:
        rate = _write_rate(storage)
    except (OSError, RegionSpotError) as error:
        reason = getattr(error, "strerror", None) or error
        mend = "give a place with space where you may write; of an object store, check its keys"
        yield Finding("write rate", "fail", f"{storage.address}: cannot be written ({reason})", mend)
    else:
        yield Finding("write rate", "ok", f"{storage.address}: {size_text(rate)}/s, flushed")


def _cache_there(address: str) -> Iterator[Finding]:
    try:
        cache = FeatureCache.open(address)
        pending = len(cache.pending_parts())
    except (RegionSpotError, OSError) as error:
        yield Finding("cache", "fail", str(error), "")
    else:
        held = ", ".join(cache.feature_sets)
        yield Finding("cache", "ok", f"{address}: {held}; {cache.n_parts:,} parts, {pending:,} of them to be written")


def _write_rate(storage: Storage) -> float:
    """Bytes a second of one file, with the flush at its end; it is removed again."""
    name, block, written = f"doctor-{uuid.uuid4().hex[:8]}", memoryview(bytearray(range(256)) * (_BLOCK >> 8)), 0
    begin = time.perf_counter()
    file = storage.create(name)
    try:
        while written < _MOST and time.perf_counter() - begin < _SECONDS:
            file.write(block)
            written += _BLOCK
        file.finish()
        if not storage.on_disk:  # an object store may take everything and then refuse the name
            file.publish()
        return written / (time.perf_counter() - begin)
    finally:
        file.discard()
        if not storage.on_disk:
            storage.remove(name)


def dataset(asked: Asked) -> Iterator[Finding]:
    """The annotations read, the images looked for, and one of them opened; without a folder, the annotations alone."""
    if asked.data is None and asked.annotations is None:
        return
    from regionspot.pipeline.datasets.registry import describe, image_folder_of, read_dataset, require_regions
    from regionspot.pipeline.images.decode import read_image

    data = Path(asked.annotations or "").parent if asked.data is None else Path(asked.data)
    try:
        manifest = read_dataset(asked.dataset, data, asked.split, asked.annotations)
        folder = image_folder_of(asked.dataset, data, asked.split, manifest)
        require_regions(replace(manifest, remarks=()))
    except (RegionSpotError, OSError) as error:
        yield Finding("data", "fail", str(error))
        return
    for remark in manifest.remarks:
        yield Finding("data", "warn", remark)
    report = describe(manifest, folder, check_images=asked.data is not None)
    missing = report.missing_images or 0
    text = f"{asked.dataset} {asked.split}: {len(manifest):,} images, {report.regions:,} regions"
    if asked.data is None:
        yield Finding("data", "ok", f"{text} in {asked.annotations}; its images were not looked for", "give --data")
        return
    if missing:
        none = missing == len(manifest)
        yield Finding(
            "data", "fail" if none else "warn", f"{text}; {report.images_text()}", "check --data, or fetch them"
        )
        if none:
            return
    else:
        yield Finding("data", "ok", f"{text}; {report.images_text()}")
    path = next(folder / name for name in map(str, manifest.paths) if (folder / name).is_file())
    try:
        image = read_image(path)
    except RegionSpotError as error:
        yield Finding("data", "warn", str(error), "`extract` lists such images and goes on")
    else:
        yield Finding("data", "ok", f"{path.name} opens: {image.width} x {image.height} pixels")
