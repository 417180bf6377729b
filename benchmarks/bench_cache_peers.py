"""Readers that take rows: what the cache is measured against, each set up as fast as its own documentation allows.

All of them fill one batch that is used again, so that no reader pays for fresh memory which another does not need.
Where a library offers several ways to the same record, the one that was fastest here is taken; `how` says which.
tensorstore, zarrs and zarr-python read the cache's own files: they are Zarr.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench_cache_data import BATCH, MAPS, Features, write_raw
from regionspot.cache import Batch, FeatureCache


class Reader(ABC):
    """Something that reads a whole data set in batches, in an order drawn from a seed.

    name, how   as the table shows them
    path        what must be in the page cache
    """

    name: str
    how: str
    path: Path

    @abstractmethod
    def epoch(self, seed: int) -> Iterator[NDArray[Any]]:
        """Every record once, shuffled; a batch is valid until the next one is requested."""

    @abstractmethod
    def close(self) -> None:
        """End what was started for reading: processes, threads, open files."""


class RowReader(Reader):
    """A reader whose caller chooses the rows of a batch."""

    def __init__(self, path: Path, features: Features) -> None:
        self.path, self.features = path, features
        self.out = np.zeros((BATCH, *features.shape), features.stored)

    @abstractmethod
    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The records at those rows, in `out` or a view of it."""

    def epoch(self, seed: int) -> Iterator[NDArray[Any]]:
        order = np.random.default_rng(seed).permutation(self.features.records)
        for first in range(0, len(order), BATCH):
            yield self.read(order[first : first + BATCH])

    def close(self) -> None:
        """Nothing that would not end with the process; those that have more say so."""


class RawMemmap(RowReader):
    name, how = "raw memmap", "one file of records, np.take into the batch, one thread"

    def __init__(self, path: Path, features: Features) -> None:
        super().__init__(path, features)
        if not path.exists():
            write_raw(path, features)
        self._file = np.memmap(path, features.stored, "r", shape=(features.records, *features.shape))

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        # Any mode but "raise" writes into `out` directly.
        return np.take(self._file, rows, axis=0, out=self.out[: len(rows)], mode="clip")


class RawMemmapThreads(RawMemmap):
    name, how = "raw memmap, 2 threads", "the same, half of each batch a thread"

    def __init__(self, path: Path, features: Features) -> None:
        super().__init__(path, features)
        self._threads = ThreadPoolExecutor(2)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        middle = len(rows) // 2
        halves = (rows[:middle], self.out[:middle]), (rows[middle:], self.out[middle : len(rows)])
        list(self._threads.map(lambda half: np.take(self._file, half[0], axis=0, out=half[1], mode="clip"), halves))
        return self.out[: len(rows)]

    def close(self) -> None:
        self._threads.shutdown()


class CacheRead(RowReader):
    name, how = "cache.read", "one thread, the batch given as out=, check never"

    def __init__(self, path: Path, features: Features) -> None:
        super().__init__(path, features)
        self._cache, self._batch = FeatureCache.open(path, check="never"), Batch()

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self._cache.read(rows, out=self._batch).feature_map


class Tensorstore(RowReader):
    name, how = "tensorstore", "zarr3 on the same files, file_io_mode memmap, no cache, written into the batch"

    def __init__(self, path: Path, features: Features) -> None:
        import tensorstore  # its threads must not be there yet when the loaders fork

        super().__init__(path, features)
        memory, threads = {"total_bytes_limit": 0}, {"limit": 2}
        context = {"cache_pool": memory, "file_io_mode": {"mode": "memmap"}, "data_copy_concurrency": threads}
        store = {"driver": "file", "path": str(path / "features" / MAPS / "feature_map")}
        self._array = tensorstore.open(
            {"driver": "zarr3", "kvstore": store, "recheck_cached_data": False, "recheck_cached_metadata": False},
            context=tensorstore.Context(context),
            read=True,
        ).result()
        self._out = tensorstore.array(self.out)  # shares its memory

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        self._out[: len(rows)].write(self._array[rows]).result()
        return self.out[: len(rows)]


class ZarrPython(RowReader):
    """zarr-python's asynchronous array: all records of a batch requested at once."""

    name, how = "zarr-python, sharded", "the same files, one getitem a record, a batch gathered"
    pipeline = "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def __init__(self, path: Path, features: Features) -> None:
        import zarr

        super().__init__(path, features)
        self._loop = asyncio.Runner()
        with zarr.config.set({"codec_pipeline.path": self.pipeline}):
            self._array = self._loop.run(zarr.api.asynchronous.open_array(store=self.array_path(), mode="r"))

    def array_path(self) -> Path:
        return self.path / "features" / MAPS / "feature_map"

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        self._loop.run(self._gather(rows.tolist()))
        return self.out[: len(rows)]

    async def _gather(self, rows: list[int]) -> None:
        await asyncio.gather(*(self._fetch(place, row) for place, row in enumerate(rows)))

    async def _fetch(self, place: int, row: int) -> None:
        self.out[place] = await self._array.getitem(row)

    def close(self) -> None:
        self._loop.close()


class Zarrs(ZarrPython):
    name, how = "zarrs codec pipeline", "zarr-python with zarrs.ZarrsCodecPipeline, the same files, a batch gathered"
    pipeline = "zarrs.ZarrsCodecPipeline"


class ZarrFiles(ZarrPython):
    name, how = "zarr-python, a file a record", "uncompressed chunks of one record, a batch gathered"

    def __init__(self, path: Path, features: Features) -> None:
        import zarr

        if not path.exists():
            shape, chunks = (features.records, *features.shape), (1, *features.shape)
            array = zarr.create_array(path, shape=shape, chunks=chunks, dtype=features.stored, compressors=None)
            for row, record in enumerate(features.all_records()):
                array[row] = record
        super().__init__(path, features)

    def array_path(self) -> Path:
        return self.path


class Hdf5(RowReader):
    name, how = "h5py", "chunk = record, read_direct_chunk into the batch"

    def __init__(self, path: Path, features: Features) -> None:
        import h5py

        super().__init__(path, features)
        if not path.exists():
            with h5py.File(path, "w") as file:
                shape, chunks = (features.records, *features.shape), (1, *features.shape)
                made = file.create_dataset("x", shape, features.stored, chunks=chunks)
                for row, record in enumerate(features.all_records()):
                    made[row] = record
        self._file = h5py.File(path)
        self._chunks = self._file["x"].id
        self._bytes = self.out.reshape(BATCH, -1).view(np.uint8)

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        for place, row in enumerate(rows.tolist()):
            self._chunks.read_direct_chunk((row, 0, 0), out=self._bytes[place])
        return self.out[: len(rows)]

    def close(self) -> None:
        self._file.close()


class PthFiles(RowReader):
    name, how = ".pth an image", "torch.load(weights_only=True, mmap=True), copied into the batch"

    def __init__(self, path: Path, features: Features) -> None:
        import torch

        super().__init__(path, features)
        self._load = torch.load
        if not path.exists():
            path.mkdir()
            for row, record in enumerate(features.all_records()):
                torch.save(torch.from_numpy(record), path / f"{row}.pth")

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        for place, row in enumerate(rows.tolist()):
            self.out[place] = self._load(self.path / f"{row}.pth", weights_only=True, mmap=True).numpy()
        return self.out[: len(rows)]
