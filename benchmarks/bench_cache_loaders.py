"""Loaders, which choose the order themselves: ours, those of other projects, and torch's DataLoader as people use it.

Worker processes stay alive between epochs, so that none is charged for starting them. They fork before any library
with threads of its own is loaded, so these readers are set up first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks.bench_cache_data import BATCH, Features, write_raw
from benchmarks.bench_cache_peers import Reader
from regionspot.cache import FeatureCache
from regionspot.cache.storage.base import Access

WORKERS = 2


class Ours(Reader):
    """`cache.loader` with one way of checking."""

    how = "shuffle full"

    def __init__(self, path: Path, check: Literal["first", "always", "never"], **options: Any) -> None:
        self.path, self.name = path, f"cache.loader, check {check}"
        self._loader = FeatureCache.open(path, check=check).loader(BATCH, **options)

    def epoch(self, seed: int) -> Iterator[NDArray[Any]]:
        return (batch.feature_map for batch in self._loader)

    def close(self) -> None:
        """Its threads end with each epoch."""


class TorchLoader(Reader):
    """A DataLoader kept with its workers; it shuffles anew each epoch by itself."""

    _loader: Iterable[Any] | None

    def epoch(self, seed: int) -> Iterator[NDArray[Any]]:
        assert self._loader is not None
        return (batch.numpy() for batch in self._loader)

    def close(self) -> None:
        self._loader = None  # ends the workers


class LitData(TorchLoader):
    name, how = (
        "LitData",
        f"StreamingDataset of tensors, 64 MB chunks, shuffled; StreamingDataLoader, {WORKERS} workers",
    )

    def __init__(self, path: Path, features: Features) -> None:
        import litdata
        from litdata.streaming.writer import BinaryWriter

        self.path = path
        if not path.exists():
            path.mkdir()
            writer = BinaryWriter(str(path), chunk_bytes="64MB")
            for row, record in enumerate(features.all_records()):
                writer[row] = torch.from_numpy(record)  # four times as fast to read as a numpy array
            writer.done()
            writer.merge(1)
        data = litdata.StreamingDataset(str(path), shuffle=True)
        self._loader = litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)


class Mosaic(TorchLoader):
    name, how = "MosaicML Streaming", f"MDS of ndarrays, local, shuffled; DataLoader, {WORKERS} workers"

    def __init__(self, path: Path, features: Features) -> None:
        import streaming

        # It hands read-only arrays to torch. Said after the import, which sets filters of its own.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.path = path
        if not path.exists():
            shape = ",".join(map(str, features.shape))
            columns = {"x": f"ndarray:{features.stored.name}:{shape}"}
            with streaming.MDSWriter(out=str(path), columns=columns) as writer:
                for record in features.all_records():
                    writer.write({"x": record})
        data = streaming.StreamingDataset(local=str(path), shuffle=True, batch_size=BATCH)
        self._loader = DataLoader(data, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)

    def epoch(self, seed: int) -> Iterator[NDArray[Any]]:
        assert self._loader is not None
        return (batch["x"].numpy() for batch in self._loader)


class CacheBatches(Dataset[torch.Tensor]):
    """A batch an item, read in one call; without `out`, since a batch used again would change under its receiver."""

    def __init__(self, path: Path, access: Access) -> None:
        self._cache = FeatureCache.open(path, check="never", access=access)

    def __getitem__(self, rows: list[int]) -> torch.Tensor:
        return torch.from_numpy(self._cache.read(rows).feature_map)

    def __len__(self) -> int:
        return len(self._cache)


class MemmapRecords(Dataset[torch.Tensor]):
    """A record an item from one raw file, as people write it first. A worker maps the file when it needs it."""

    def __init__(self, path: Path, features: Features) -> None:
        self._path, self._features = path, features
        self._file: NDArray[Any] | None = None
        if not path.exists():
            write_raw(path, features)

    def __getitem__(self, row: int) -> torch.Tensor:
        if self._file is None:
            shape = (self._features.records, *self._features.shape)
            self._file = np.memmap(self._path, self._features.stored, "r", shape=shape)
        return torch.from_numpy(np.array(self._file[row]))

    def __len__(self) -> int:
        return self._features.records


class CacheDataLoader(TorchLoader):
    name, how = "DataLoader over cache.read", f"{WORKERS} workers, a batch an item, check never"

    def __init__(self, path: Path, keep_workers: bool = True, access: Access = "auto") -> None:
        self.path, data = path, CacheBatches(path, access)
        rows = BatchSampler(RandomSampler(data), BATCH, drop_last=False)
        self._loader = DataLoader(
            data, batch_size=None, sampler=rows, num_workers=WORKERS, persistent_workers=keep_workers
        )


class MemmapDataLoader(TorchLoader):
    name, how = "DataLoader over a raw memmap", f"{WORKERS} workers, a record an item, default collate"

    def __init__(self, path: Path, features: Features, keep_workers: bool = True) -> None:
        self.path, data = path, MemmapRecords(path, features)
        self._loader = DataLoader(
            data, batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=keep_workers
        )
