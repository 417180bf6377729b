"""The doctor's checks of where features will be written and images are read."""

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
from regionspot.pipeline.doctor.report import DoctorOptions, Finding

_BLOCK = 8 << 20  # bytes
_MAX_BYTES = 32 * _BLOCK
_MAX_SECONDS = 3.0
_LOW_SPACE = 2 * 10**9  # bytes: a part of 512 images with CLIP L/14 maps is 0.27 GB, and several are in progress


def check_cache(options: DoctorOptions) -> Iterator[Finding]:
    """Check an existing cache, the free space, and write and flush a file."""
    if options.cache is None:
        return
    storage = open_storage(options.cache)
    if storage.exists("zarr.json"):
        yield _check_existing_cache(options.cache)
    if isinstance(storage, LocalStorage):
        folder = next(path for path in (storage.folder, *storage.folder.absolute().parents) if path.is_dir())
        storage = LocalStorage(folder)
        free = shutil.disk_usage(folder).free
        if free > _LOW_SPACE:
            yield Finding("disk", "ok", f"{folder}: {size_text(free)} free")
        else:
            mend = "free some space: `extract --dry-run` says how much it needs"
            yield Finding("disk", "warn", f"{folder}: {size_text(free)} free", mend)
    try:
        rate = _write_rate(storage)
    except (OSError, RegionSpotError) as error:
        reason = getattr(error, "strerror", None) or error
        mend = "give a writable path with free space; for an object store, check its keys"
        yield Finding("write rate", "fail", f"{storage.address}: cannot be written ({reason})", mend)
    else:
        yield Finding("write rate", "ok", f"{storage.address}: {size_text(rate)}/s, flushed")


def _check_existing_cache(address: str) -> Finding:
    try:
        cache = FeatureCache.open(address)
        pending = len(cache.pending_parts())
    except (RegionSpotError, OSError) as error:
        return Finding("cache", "fail", str(error))
    names = ", ".join(cache.feature_sets)
    return Finding("cache", "ok", f"{address}: {names}; {cache.n_parts:,} parts, {pending:,} of them pending")


def _write_rate(storage: Storage) -> float:
    """Write throughput of one file in bytes per second, including the flush; the file is removed again."""
    name, block, written = f"doctor-{uuid.uuid4().hex[:8]}", memoryview(bytearray(range(256)) * (_BLOCK >> 8)), 0
    begin = time.perf_counter()
    file = storage.create(name)
    try:
        while written < _MAX_BYTES and time.perf_counter() - begin < _MAX_SECONDS:
            file.write(block)
            written += _BLOCK
        file.finish()
        if not storage.on_disk:  # an object store may accept the bytes and then refuse the name
            file.publish()
        return written / (time.perf_counter() - begin)
    finally:
        file.discard()
        if not storage.on_disk:
            storage.remove(name)


def check_dataset(options: DoctorOptions) -> Iterator[Finding]:
    """Read the annotations, look for the images and open one; without an image folder, the annotations only."""
    if options.data is None and options.annotations is None:
        return
    from regionspot.pipeline.datasets.registry import describe, image_folder_of, read_dataset, require_regions
    from regionspot.pipeline.images.decode import read_image

    data = Path(options.annotations or "").parent if options.data is None else Path(options.data)
    try:
        manifest = read_dataset(options.dataset, data, options.split, options.annotations)
        folder = image_folder_of(options.dataset, data, options.split, manifest)
        require_regions(replace(manifest, remarks=()))
    except (RegionSpotError, OSError) as error:
        yield Finding("data", "fail", str(error))
        return
    for remark in manifest.remarks:
        yield Finding("data", "warn", remark)
    report = describe(manifest, folder, check_images=options.data is not None)
    missing = report.missing_images or 0
    text = f"{options.dataset} {options.split}: {len(manifest):,} images, {report.regions:,} regions"
    if options.data is None:
        yield Finding("data", "ok", f"{text} in {options.annotations}; images were not checked", "give --data")
        return
    text = f"{text}; {report.images_text()}"
    if missing == len(manifest):
        yield Finding("data", "fail", text, "check --data, or download the images")
        return
    yield Finding("data", "warn", text, "check --data, or download them") if missing else Finding("data", "ok", text)
    path = next(folder / name for name in map(str, manifest.paths) if (folder / name).is_file())
    try:
        image = read_image(path)
    except RegionSpotError as error:
        yield Finding("data", "warn", str(error), "`extract` lists such images and continues")
    else:
        yield Finding("data", "ok", f"{path.name} can be opened: {image.width} x {image.height} pixels")
