"""The feature cache: one Zarr group, one shard per part, one inner chunk per image.

An image's record is contiguous, so one request reads it. A part is the only unit that is ever written, so a killed run
leaves whole parts or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regionspot.cache.errors import CacheError, InputError, NotExtractedError
from regionspot.cache.format.header import Header, load_header, require_arrays
from regionspot.cache.format.manifest import Category, Manifest
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.format.schema import PART_SIZE, Failure, FeatureSet, Geometry, ImageFeatures, record_file
from regionspot.cache.reading.batch import Batch
from regionspot.cache.reading.batch_reader import BatchReader, FeatureSource, InMemoryTokens
from regionspot.cache.reading.feature_reader import Check, FeatureReader, open_reader
from regionspot.cache.reading.loader import Loader
from regionspot.cache.reading.prefetch import AHEAD, dataloader_worker
from regionspot.cache.reading.sampling import Sampling, Shuffle
from regionspot.cache.storage.base import Access, Storage
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.writing.part_writer import PartWriter

if TYPE_CHECKING:
    from dask.array import Array

Mode = Literal["r", "a"]


class FeatureCache:
    """Features of one dataset split; `len(cache)` is its number of images.

    path          the folder, or the URL in an object store
    storage       its files
    manifest      images and regions, as given when the cache was created
    categories    what each category index means
    feature_sets  by name
    geometry      number of images, part size, capacity
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        manifest: Manifest,
        mode: Mode,
        check: Check,
        access: Access,
        manifest_on_disk: bool = False,
    ) -> None:
        self.storage, self.manifest, self.mode, self.check, self.access = storage, manifest, mode, check, access
        self._manifest_on_disk = manifest_on_disk
        self.path = storage.folder if isinstance(storage, LocalStorage) else storage.address
        self.geometry: Geometry = header.geometry
        self.categories: tuple[Category, ...] = header.categories
        self.feature_sets: dict[str, FeatureSet] = header.feature_sets
        self._readers: dict[str, FeatureReader] = {
            name: open_reader(self.storage, feature_set, self.manifest, self.geometry, self.check, self.access)
            for name, feature_set in header.feature_sets.items()
        }

    @classmethod
    def create(
        cls, path: str | Path, manifest: Manifest, feature_sets: Iterable[FeatureSet], part_size: int = PART_SIZE
    ) -> FeatureCache:
        """Create an empty cache for a manifest and open it for writing.

        Raises CacheError, leaving nothing behind, when `path` exists or cannot be written.
        """
        from regionspot.cache.format.create import create_cache  # zarr takes a second to import

        create_cache(open_storage(path), manifest, Header.of(manifest, feature_sets, part_size))
        return cls.open(path, "a")

    @classmethod
    def open(
        cls,
        path: str | Path | Storage,
        mode: Mode = "r",
        check: Check = "first",
        access: Access = "auto",
        *,
        local_copy: str | Path | None = None,
        local_limit: str | int | None = None,
        manifest_on_disk: bool = False,
    ) -> FeatureCache:
        """Open a cache: "r" to read, which never writes; "a" to extract into.

        check   when to verify a record's checksum: "first" (the first time this process reads it; on a network every
                time, because its file may have been replaced), "always" or "never"
        access  how local features are read: "map" (memory-mapped: fastest for data that stays in memory), "pread"
                (raises an error where a map kills the process: a file truncated while it is read, a failing disk),
                "auto" (maps feature sets that fit into half of the free memory)
        local_copy, local_limit
                for a remote cache: a folder that keeps the files read so far, and its maximum size, in bytes or as
                "500GB"; the least recently used files are removed first
        manifest_on_disk
                keep the large columns of the manifest, 28 bytes a region, in temporary files (of TMPDIR) instead of
                memory: the kernel drops what it needs the space of. Paths are then read when they are first used

        Raises NotACacheError, SchemaVersionError, and CacheError for "a" without write permission.
        """
        from regionspot.cache.format.manifest_arrays import load_manifest  # zarr takes a second to import

        for name, value, known in (("mode", mode, Mode), ("check", check, Check), ("access", access, Access)):
            if value not in get_args(known):
                raise InputError(f"{path}: {name} is {value!r}, expected {'|'.join(get_args(known))}")
        storage = open_storage(path)
        if local_copy is not None or local_limit is not None:
            from regionspot.cache.storage.local_mirror import with_local_mirror  # only remote caches need it

            storage = with_local_mirror(storage, local_copy, local_limit)
        if isinstance(storage, LocalStorage):
            storage.pin()
        header = load_header(storage)
        require_arrays(storage, header)
        if mode == "a":
            storage.check_writable()
            for folder in header.folders():
                storage.remove_abandoned(folder)
        manifest = load_manifest(storage, header, manifest_on_disk)
        return cls(storage, header, manifest, mode, check, access, manifest_on_disk)

    def __len__(self) -> int:
        return len(self.manifest)

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}, {len(self)} images, {', '.join(self.feature_sets) or 'no features'})"

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process reopens the cache by its address: the manifest may hold gigabytes.
        reopen = partial(FeatureCache.open, manifest_on_disk=self._manifest_on_disk)
        return reopen, (self.storage, self.mode, self.check, self.access)

    @property
    def part_size(self) -> int:
        """Images per part; the last part may have fewer."""
        return self.geometry.part_size

    @property
    def n_parts(self) -> int:
        return self.geometry.n_parts

    def part_rows(self, part: int) -> range:
        """Manifest rows of a part."""
        return self.geometry.rows(part)

    def missing_sets(self, part: int, feature_sets: Sequence[str] | None = None) -> list[str]:
        """Those of the feature sets (default: all) for which this part is not written yet."""
        self.part_rows(part)  # raises for a part that does not exist
        return [name for name in self._names(feature_sets) if not self.storage.exists(record_file(name, part))]

    def pending_parts(self, feature_sets: Sequence[str] | None = None) -> list[int]:
        """Parts for which at least one of the feature sets (default: all) is not written yet."""
        written = [self._readers[name].written_parts() for name in self._names(feature_sets)]
        return [part for part in range(self.n_parts) if not all(part in parts for parts in written)]

    def write_part(
        self,
        part: int,
        images: Iterable[ImageFeatures],
        feature_sets: Sequence[str] | None = None,
        worker: str = "",
        before_publish: Callable[[], None] | None = None,
        account: Mapping[str, Any] | None = None,
    ) -> PartRecord:
        """Write those of the feature sets (default: all) that this part lacks, from its images in row order.

        `images` is consumed one at a time, so memory does not grow with the part. Features of sets that are already
        written are ignored. Any exception, also from the iterator, leaves this part unwritten and the others unchanged.
        `before_publish` is called after the last image, before any file of the part becomes visible; the content of
        `account` at that moment is stored in the part's records.

        Raises InputError for features that do not fit the image, CacheError when the storage refuses or the part is
        already written.
        """
        if self.mode != "a":
            raise CacheError(f"{self.path}: is open for reading; open it with mode 'a' to write a part")
        missing = self.missing_sets(part, feature_sets)
        if not missing:
            raise CacheError(f"{self.path}: part {part} is already written; write only pending_parts()")
        sets = [self.feature_sets[name] for name in missing]
        with PartWriter(self.storage, self.manifest, self.geometry, part, sets) as writer:
            for image in images:
                writer.append(image)
            return writer.commit(worker, before_publish, account)

    def valid_rows(self, feature_sets: Sequence[str] | None = None) -> NDArray[np.int64]:
        """int64, ascending: rows written in all of the feature sets (default: all), without images that failed."""
        names = self._names(feature_sets)
        valid = np.full(len(self), bool(names))
        for name in names:
            written = np.zeros(len(self), dtype=bool)
            for record in self._readers[name].records():
                written[self.part_rows(record.part)] = True
                written[[failure.row for failure in record.failures]] = False
            valid &= written
        return np.flatnonzero(valid)

    def failures(self) -> list[Failure]:
        """Images that could not be read, by row; each once, however many feature sets lack it."""
        by_row = {
            failure.row: failure
            for reader in self._readers.values()
            for record in reader.records()
            for failure in record.failures
        }
        return [by_row[row] for row in sorted(by_row)]

    def record(self, part: int, feature_set: str) -> PartRecord:
        """The record of a written part. Raises NotExtractedError when it is not written, CorruptPartError."""
        try:
            return self._readers[feature_set].record(part)
        except FileNotFoundError:
            raise NotExtractedError(f"{self.path}: part {part} of {feature_set} is not written yet") from None

    def reader(self, name: str) -> FeatureReader:
        """The reader of one feature set. Raises InputError for an unknown name."""
        return self._readers[self._names([name])[0]]

    def read(
        self, rows: ArrayLike, *, map_set: str | None = None, token_set: str | None = None, out: Batch | None = None
    ) -> Batch:
        """Read the images at `rows`, in that order (repetitions allowed), into one padded batch.

        map_set, token_set   feature sets to read (default: the only one of that kind, if any)
        out                  a batch to reuse: it is overwritten and returned. Not in the workers of a torch DataLoader,
                             which send a batch some time after it was returned

        Raises InputError for rows that do not exist, NotExtractedError for a row whose part is not committed or whose
        image could not be read, CorruptPartError for bytes that do not match their checksum.
        """
        if out is not None and dataloader_worker() is not None:
            raise InputError(
                f"{self.path}: read(out=) in a DataLoader worker would overwrite batches that are not sent yet; "
                "omit `out` there"
            )
        reader = self.batch_reader(map_set, token_set)
        threads = 1 if self.storage.on_disk else self.storage.readers
        return reader.read(self._checked_rows(rows), Batch() if out is None else out, threads)

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: Shuffle = Sampling.shuffle,
        seed: int = 0,
        epoch: int = 0,
        rows: ArrayLike | None = None,
        map_set: str | None = None,
        token_set: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        pack: bool = False,
        share_batches: bool = False,
        threads: int | None = None,
        ahead: int = AHEAD,
        block_parts: int = Sampling.block_parts,
        tokens_in_memory: bool = False,
        pin_memory: bool | None = None,
    ) -> Loader:
        """Batches for a training loop, prefetched by threads; each is valid until the next one is requested.

        shuffle     full: any order; block: parts in random order, rows mixed over `block_parts` of them, for disks and
                    networks with slow random access; none: the order of `rows`
        seed, epoch decide the order; the epoch advances by itself at the end of each pass
        rows        images to load (default: the valid ones)
        rank, world_size   this process's share: over all ranks an epoch gives every row exactly once, in the same
                    number of batches per rank (details in sampling.py)
        drop_last   drop the rows that do not fill a whole batch on every rank
        pack        batches of images with similar numbers of regions: less padding
        share_batches   `batch_size` is that of all ranks together, and each rank gets a part of every batch
        threads     that read (default: by the storage); ahead: batches that are prefetched
        tokens_in_memory   read the tokens of all `rows` now and keep them
        pin_memory  page-locked batches, for copies to a GPU (default: if this process already uses one). A copy with
                    non_blocking=True must be finished before the next batch is requested

        Raises InputError for invalid options and for a cache without images to read.
        """
        sampling = Sampling(
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            pack=pack,
            share_batches=share_batches,
            block_parts=block_parts,
        )
        sets = [self._only_set("map", map_set), self._only_set("token", token_set)]
        if rows is None:
            rows = self.valid_rows([feature_set.name for feature_set in sets if feature_set])
        rows = self._checked_rows(rows)
        if not len(rows):
            raise InputError(f"{self.path}: there is no image to load; run `regionspot extract`, or give other rows")
        return Loader(
            self,
            sampling,
            rows,
            map_set=map_set,
            token_set=token_set,
            epoch=epoch,
            threads=threads,
            ahead=ahead,
            tokens_in_memory=tokens_in_memory,
            pin_memory=pin_memory,
        )

    def batch_reader(
        self, map_set: str | None = None, token_set: str | None = None, preload: NDArray[np.int64] | None = None
    ) -> BatchReader:
        """The reader of batches of two feature sets. Tokens of the rows `preload` are read now and kept in memory."""
        maps, tokens = self._only_set("map", map_set), self._only_set("token", token_set)
        token_reader: FeatureSource | None = None if tokens is None else self._readers[tokens.name]
        if token_reader is not None and preload is not None:
            token_reader = InMemoryTokens(token_reader, self.manifest, preload)
        return BatchReader(self.manifest, None if maps is None else self._readers[maps.name], token_reader)

    def dask(self, name: str) -> Array:
        """A feature set as a dask array with one chunk per part; see `dask_arrays.dask_array`."""
        from regionspot.cache.reading.dask_arrays import dask_array  # dask takes half a second to import

        return dask_array(self, name)

    def _checked_rows(self, rows: ArrayLike) -> NDArray[np.int64]:
        array = np.asarray(rows)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise InputError(f"{self.path}: rows are {array.dtype} of shape {array.shape}, expected a list of integers")
        if len(outside := array[(array < 0) | (array >= len(self))]):
            raise InputError(f"{self.path}: there is no row {outside[0]}: this cache has rows 0 to {len(self) - 1}")
        return array.astype(np.int64)

    def _names(self, feature_sets: Sequence[str] | None) -> list[str]:
        names = list(self.feature_sets) if feature_sets is None else list(feature_sets)
        for name in names:
            if name not in self.feature_sets:
                raise InputError(
                    f"{self.path}: there is no feature set {name!r}; it has {', '.join(self.feature_sets) or 'none'}"
                )
        return names

    def _only_set(self, kind: str, name: str | None) -> FeatureSet | None:
        """The set of that name, by default the only one of its kind; None if there is none of that kind."""
        of_kind = {each.name: each for each in self.feature_sets.values() if each.kind == kind}
        if name is None and len(of_kind) <= 1:
            return next(iter(of_kind.values()), None)
        if name not in of_kind:
            problem = f"{name!r} is not one of them" if name else "name one"
            raise InputError(f"{self.path}: its {kind} feature sets are {', '.join(of_kind) or 'none'}; {problem}")
        return of_kind[name]
