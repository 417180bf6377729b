"""Whole epochs from the disk: what the page cache held of the files is dropped before each.

The table shows the kernel's count of bytes read from disk during the epoch beside the rate. A file that somebody maps
cannot be dropped: worker processes are started anew each time, and the cache is read by positioned reads, as it is by
itself where it does not fit into memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks.bench_cache_data import BATCH, Features, bytes_from_disk, drop, write_cache
from benchmarks.bench_cache_loaders import CacheDataLoader, MemmapDataLoader
from benchmarks.goals import Samples, interleaved, say, seconds
from regionspot.cache import FeatureCache

_READ_BYTES = 8 << 20


def measure_cold(features: Features, folder: Path, rounds: int) -> tuple[Samples, dict[str, float]]:
    """GB/s of each way to read all records in every round, and the share of their bytes that came from disk."""
    folder.mkdir(parents=True)
    path, raw = folder / "cache.zarr", folder / "raw.bin"
    write_cache(path, features)
    cache = FeatureCache.open(path, access="pread")
    memmap = MemmapDataLoader(raw, features, keep_workers=False)
    epochs = {
        "one raw file, in order (the disk)": _Cold(features, raw, lambda: _in_order(raw)),
        "cache.loader, shuffle full": _Cold(features, path, lambda: iter(cache.loader(BATCH, shuffle="full"))),
        "cache.loader, shuffle block": _Cold(features, path, lambda: iter(cache.loader(BATCH, shuffle="block"))),
        "DataLoader over cache.read, 2 workers": _Cold(
            features, path, lambda: CacheDataLoader(path, keep_workers=False, access="pread").epoch(0)
        ),
        "DataLoader over a raw memmap, 2 workers": _Cold(features, raw, lambda: memmap.epoch(0)),
    }
    say(f"cold: {features.name}, {features.gigabytes:.2f} GB, {rounds} rounds")
    samples = interleaved(epochs, rounds)
    shutil.rmtree(folder)
    return samples, {name: median(epoch.from_disk) for name, epoch in epochs.items()}


class _Cold:
    """One way of reading everything; a call gives its GB/s from the disk."""

    def __init__(self, features: Features, path: Path, epoch: Callable[[], Iterator[object]]) -> None:
        self._features, self._path, self._epoch = features, path, epoch
        self.from_disk: list[float] = []

    def __call__(self) -> float:
        drop(self._path)
        before = bytes_from_disk()
        taken = seconds(self._read)
        self.from_disk.append((bytes_from_disk() - before) / 1e9 / self._features.gigabytes)
        return self._features.gigabytes / taken

    def _read(self) -> None:
        for _ in self._epoch():
            pass


def _in_order(path: Path) -> Iterator[int]:
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            yield read
