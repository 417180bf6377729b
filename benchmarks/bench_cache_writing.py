"""One part written and on disk: by the cache's own writer, as raw bytes, by zarr-python, and as `.pth` files.

The features are in memory before the clock starts, and each way ends with fsync of all that it wrote; what the others
leave out, files that appear whole or not at all and checksums of the records, they are not required to do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from benchmarks.bench_cache_data import MAPS, Features, manifest_of
from benchmarks.goals import Samples, interleaved, say, seconds
from regionspot.cache import FeatureCache, ImageFeatures
from regionspot.cache.storage.atomic_files import sync_tree


def measure_writing(features: Features, folder: Path, rounds: int) -> Samples:
    """GB/s of each way to write one part of all the features, in every round."""
    records = np.stack([features.values(row) for row in range(features.records)])
    ways = {
        "raw file, fsync": _write_raw,
        "cache.write_part": _write_ours,
        "zarr-python, sharded, fsync": _write_zarr,
        ".pth an image, fsync": _write_pth,
    }
    say(f"writing: {features.gigabytes:.2f} GB a part, {rounds} rounds")
    return interleaved({name: _rate(way, records, folder, features) for name, way in ways.items()}, rounds)


Way = Callable[[Path, NDArray[Any], Features], Callable[[], None]]  # prepares, and returns what is timed


def _rate(way: Way, records: NDArray[Any], folder: Path, features: Features) -> Callable[[], float]:
    def measured() -> float:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write = way(folder, records, features)
        os.sync()  # the disk is idle when the clock starts
        rate = features.gigabytes / seconds(write)
        shutil.rmtree(folder)
        return rate

    return measured


def _write_raw(folder: Path, records: NDArray[Any], features: Features) -> Callable[[], None]:
    def write() -> None:
        with (folder / "raw.bin").open("wb", buffering=0) as file:
            for record in records:
                file.write(record.data)
            os.fsync(file.fileno())

    return write


def _write_ours(folder: Path, records: NDArray[Any], features: Features) -> Callable[[], None]:
    sets = [features.feature_set]
    cache = FeatureCache.create(folder / "cache.zarr", manifest_of(features.records), sets, part_size=len(records))

    def write() -> None:
        cache.write_part(0, (ImageFeatures(row, {MAPS: record}) for row, record in enumerate(records)))

    return write


def _write_zarr(folder: Path, records: NDArray[Any], features: Features) -> Callable[[], None]:
    path = folder / "zarr-python.zarr"
    array = zarr.create_array(
        path,
        shape=records.shape,
        chunks=(1, *features.shape),
        shards=(len(records), *features.shape),
        dtype=records.dtype,
        compressors=None,
    )

    def write() -> None:
        array[:] = records  # a shard at once: one record at a time it reads and writes the whole shard for each
        sync_tree(path)

    return write


def _write_pth(folder: Path, records: NDArray[Any], features: Features) -> Callable[[], None]:
    def write() -> None:
        for row, record in enumerate(records):
            torch.save(torch.from_numpy(record), folder / f"{row}.pth")
        sync_tree(folder)

    return write
