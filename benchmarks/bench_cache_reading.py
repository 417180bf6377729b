"""Shuffled epochs from a warm page cache: every reader over the same records, in turn, round by round."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench_cache_data import Features, require_all, warm, write_cache
from benchmarks.bench_cache_loaders import CacheDataLoader, LitData, MemmapDataLoader, Mosaic, Ours
from benchmarks.bench_cache_peers import (
    CacheRead,
    Hdf5,
    PthFiles,
    RawMemmap,
    RawMemmapThreads,
    Reader,
    Tensorstore,
    ZarrFiles,
    ZarrPython,
    Zarrs,
)
from benchmarks.goals import Samples, interleaved, say, seconds


def measure_reading(features: Features, folder: Path, rounds: int) -> tuple[dict[str, str], Samples]:
    """How each reader is set up, and its GB/s in every round, by its name.

    Raises ValueError when a reader does not return every record whole.
    """
    folder.mkdir(parents=True)
    write_cache(folder / "cache.zarr", features)
    readers = []
    for reader in _open_readers(folder, features):
        say(f"{features.name}: {reader.name}")
        require_all(reader.epoch(0), features, reader.name)
        readers.append(reader)
    samples = interleaved({reader.name: _Epochs(reader, features) for reader in readers}, rounds)
    for reader in readers:
        reader.close()
    shutil.rmtree(folder)
    return {reader.name: reader.how for reader in readers}, samples


class _Epochs:
    """One reader's epochs, each in an order of its own; a call gives the GB/s of the next."""

    def __init__(self, reader: Reader, features: Features) -> None:
        self._reader, self._features, self._seed = reader, features, 0

    def __call__(self) -> float:
        warm(self._reader.path)
        self._seed += 1
        return self._features.gigabytes / seconds(self._read)

    def _read(self) -> None:
        for _ in self._reader.epoch(self._seed):
            pass


def _open_readers(folder: Path, features: Features) -> Iterator[Reader]:
    """One after another, for each is tried at once; those that fork come before those that bring threads."""
    cache, raw = folder / "cache.zarr", folder / "raw.bin"
    yield CacheDataLoader(cache)
    yield MemmapDataLoader(raw, features)
    yield LitData(folder / "litdata", features)
    yield Mosaic(folder / "mds", features)
    yield RawMemmap(raw, features)
    yield RawMemmapThreads(raw, features)
    yield Ours(cache, "never")
    yield Ours(cache, "first")
    yield Ours(cache, "always")
    yield CacheRead(cache, features)
    yield Hdf5(folder / "x.h5", features)
    yield PthFiles(folder / "pth", features)
    yield ZarrPython(cache, features)
    yield ZarrFiles(folder / "files.zarr", features)
    yield Zarrs(cache, features)
    yield Tensorstore(cache, features)
