"""The feature cache: one Zarr group, one shard a part, one inner chunk an image.

An image's record lies in one piece, so it is read with one request. A part is the only unit that is ever written, so a
killed run leaves whole parts or none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import CacheError, CacheExistsError, InputError, NotACacheError, NotExtractedError
from regionspot.cache.format.header import (
    Header,
    load_header,
    require_same_manifest,
    require_same_sets,
)
from regionspot.cache.format.manifest import Category, Manifest
from regionspot.cache.format.manifest_diff import as_stored, grows_to, is_part_of
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.format.schema import (
    PART_SIZE,
    Failure,
    FeatureSet,
    Geometry,
    ImageFeatures,
    record_file,
)
from regionspot.cache.readable_cache import ReadableCache
from regionspot.cache.reading.feature_reader import Check, FeatureReader, open_reader
from regionspot.cache.storage.base import Access, Storage
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.writing.claims import Claims
from regionspot.cache.writing.part_writer import PartWriter

if TYPE_CHECKING:
    from dask.array import Array

log = logging.getLogger(__name__)

Mode = Literal["r", "a"]


class FeatureCache(ReadableCache):
    """Features of one dataset split; `len(cache)` is its number of images.

    path          the folder, or the URL of one in an object store
    storage       its files
    manifest      images and regions, as they were given when the cache was made
    categories    what a category index stands for
    feature_sets  by name
    part_size     images of a part; n_parts is the number of parts
    """

    def __init__(
        self, storage: Storage, header: Header, manifest: Manifest, mode: Mode, check: Check, access: Access
    ) -> None:
        self.storage, self.manifest, self.mode, self.check, self.access = storage, manifest, mode, check, access
        self.path = storage.folder if isinstance(storage, LocalStorage) else storage.address
        self._threads = 1 if storage.on_disk else storage.readers
        self._adopt(header)

    def _adopt(self, header: Header) -> None:
        self._header, self._geometry = header, header.geometry
        self.categories: tuple[Category, ...] = header.categories
        self.feature_sets: dict[str, FeatureSet] = header.feature_sets
        self._readers: dict[str, FeatureReader] = {
            name: open_reader(self.storage, feature_set, self.manifest, self._geometry, self.check, self.access)
            for name, feature_set in header.feature_sets.items()
        }

    @classmethod
    def create(
        cls,
        path: str | Path,
        manifest: Manifest,
        feature_sets: Iterable[FeatureSet],
        part_size: int = PART_SIZE,
    ) -> FeatureCache:
        """Make an empty cache for a manifest and open it for extraction.

        Raises CacheError when `path` exists or cannot be written; nothing of it is left then.
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
    ) -> FeatureCache:
        """Open a cache: "r" to read, which never writes; "a" to extract into.

        check   when to compare a record with its checksum: "first" (the first time this process reads it; of a record
                that comes over a network every time, since its file may have been replaced), "always" or "never"
        access  how local features are read: "map" (the fastest for what stays in memory), "pread" (which gives an
                error where a map kills the process: a file cut short that very moment, a failing disk), "auto" (maps
                for what fits into half of the free memory)
        local_copy, local_limit
                of a remote cache: a folder that keeps what was read of it, and how much that may be, in bytes or as
                "500GB"; what was not used for longest goes first

        Raises NotACacheError, SchemaVersionError, and CacheError when "a" is asked for without permission to write.
        """
        from regionspot.cache.format.manifest_arrays import load_manifest  # zarr takes a second to import

        for name, value, known in (("mode", mode, Mode), ("check", check, Check), ("access", access, Access)):
            if value not in get_args(known):
                raise InputError(f"{path}: {name} is {value!r}, expected {'|'.join(get_args(known))}")
        storage = _with_local_copy(open_storage(path), local_copy, local_limit)
        if isinstance(storage, LocalStorage):
            storage.pin()
        header = load_header(storage)
        _require_arrays(storage, header)
        if mode == "a":
            _prepare_for_writing(storage, header)
        return cls(storage, header, load_manifest(storage, header), mode, check, access)

    @classmethod
    def open_or_create(
        cls,
        path: str | Path,
        manifest: Manifest,
        feature_sets: Iterable[FeatureSet],
        part_size: int = PART_SIZE,
        may_grow: bool = True,
    ) -> FeatureCache:
        """Go on with a cache, or make it. Feature sets that it does not hold yet are added and touch nothing else.

        An existing cache keeps its own part size, which is said in the log where another one is asked for, and its
        order: annotations may list its images in another one, and for one that was cut out of another cache those of
        the whole will do. A limit is a choice of the run: of the same annotation files, a cache may hold more images
        than asked for, and one that holds fewer grows, if it `may_grow`; its full parts stay as they are.

        Raises ProvenanceMismatchError, saying what differs, when it was made from other annotations or backbones than
        asked for, and what `growth.extend` raises.
        """
        storage, asked = open_storage(path), Header.of(manifest, feature_sets, part_size)
        if not storage.exists(""):
            try:
                return cls.create(path, manifest, asked.feature_sets.values(), part_size)
            except CacheExistsError:
                log.info("%s: another run made it a moment ago; joining that run", path)
        stored = load_header(storage)
        if stored.digest != asked.digest:
            fitting, grows = _fitting(storage, stored, manifest)
            asked = Header.of(fitting, asked.feature_sets.values(), part_size)
            if grows and may_grow:
                from regionspot.cache.tools.extend import extend_to  # imports this module

                require_same_sets(storage.address, stored, asked)  # first: for another one's features it must not grow
                extend_to(path, manifest, part_size)
                stored = load_header(storage)
                asked = Header.of(manifest, asked.feature_sets.values(), part_size)
        require_same_manifest(storage.address, stored, asked)
        require_same_sets(storage.address, stored, asked)
        _tell_part_size(storage.address, stored.geometry, part_size)
        cache = cls.open(path, "a")
        if asked.feature_sets.keys() - stored.feature_sets.keys():
            with Claims(storage) as claims:
                claims.wait_for("header")  # the header is read, changed and written: by one run at a time
                cache._add(asked)
        return cache

    def _add(self, asked: Header) -> None:
        """Add the feature sets that the cache lacks. Another run may have added some a moment ago."""
        from regionspot.cache.format.create import add_feature_set  # zarr takes a second to import

        header = load_header(self.storage)
        require_same_sets(self.storage.address, header, asked)
        new = {name: asked.feature_sets[name] for name in asked.feature_sets if name not in header.feature_sets}
        try:
            files: dict[str, int] = {}
            for feature_set in new.values():
                files |= add_feature_set(self.storage, feature_set, self._geometry)
            header = header.adding(new.values(), files)
            header.save(self.storage)
        except OSError as error:
            raise CacheError(
                f"{self.path}: feature sets {', '.join(new)} could not be added: {error.strerror or error}; "
                "the cache is as it was: mend that and run the same command again"
            ) from error
        self._adopt(header)

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}, {len(self)} images, {', '.join(self.feature_sets) or 'no features'})"

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process opens the folder anew instead of being sent a manifest of gigabytes.
        return FeatureCache.open, (self.storage, self.mode, self.check, self.access)

    @property
    def geometry(self) -> Geometry:
        """The numbers that place every record."""
        return self._geometry

    @property
    def part_size(self) -> int:
        return self._geometry.part_size

    @property
    def n_parts(self) -> int:
        return self._geometry.n_parts

    def part_rows(self, part: int) -> range:
        """Rows of the manifest that make up a part."""
        return self._geometry.rows(part)

    def missing_sets(self, part: int, feature_sets: Sequence[str] | None = None) -> list[str]:
        """Those of the feature sets (default: all) of which this part is not written yet."""
        self.part_rows(part)  # refuses a part that is none
        return [name for name in self._names(feature_sets) if not self.storage.exists(record_file(name, part))]

    def pending_parts(self, feature_sets: Sequence[str] | None = None) -> list[int]:
        """Parts of which at least one of the feature sets (default: all) is not written yet."""
        done = [self._written_parts(name) for name in self._names(feature_sets)]
        return [part for part in range(self.n_parts) if not all(part in parts for parts in done)]

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

        `images` is consumed one by one, so memory does not grow with the part. Features of sets that are written
        already are left aside. Whatever is raised, also by the iterator, leaves this part unwritten and others as
        they are. `before_publish` is called behind the last image, before anything of the part can be seen; what
        `account` holds then is kept in the part's records.

        Raises InputError for features that do not fit the image, CacheError when the disk refuses them or the part
        is written already.
        """
        if self.mode != "a":
            raise CacheError(f"{self.path}: is open for reading; open it with mode 'a' to write a part")
        missing = self.missing_sets(part, feature_sets)
        if not missing:
            raise CacheError(f"{self.path}: part {part} is written already; write only pending_parts()")
        sets = [self.feature_sets[name] for name in missing]
        with PartWriter(self.storage, self.manifest, self._geometry, part, sets) as writer:
            for image in images:
                writer.append(image)
            return writer.commit(worker, before_publish, account)

    def valid_rows(self, feature_sets: Sequence[str] | None = None) -> NDArray[np.int64]:
        """int64, rising: rows written in all of the feature sets (default: all), without images that failed."""
        names = self._names(feature_sets)
        valid = np.full(len(self), bool(names))
        for name in names:
            written = np.zeros(len(self), dtype=bool)
            for record in self._records(name):
                written[self.part_rows(record.part)] = True
                written[[failure.row for failure in record.failures]] = False
            valid &= written
        return np.flatnonzero(valid)

    def record(self, part: int, feature_set: str) -> PartRecord:
        """What was written of a part. Raises NotExtractedError where nothing was, CorruptPartError where damaged."""
        try:
            return self._readers[feature_set].record(part)
        except FileNotFoundError:
            raise NotExtractedError(f"{self.path}: part {part} of {feature_set} is not written yet") from None

    def dask(self, name: str) -> Array:
        """A feature set as a dask array with a chunk a part; `dask_arrays.dask_array` says what is in it."""
        from regionspot.cache.reading.dask_arrays import dask_array  # dask takes half a second to import

        return dask_array(self, name)

    def failures(self) -> list[Failure]:
        """Images that could not be read, by row, once each however many feature sets lack them."""
        found = {
            failure.row: failure
            for name in self._readers
            for record in self._records(name)
            for failure in record.failures
        }
        return [found[row] for row in sorted(found)]

    def _names(self, feature_sets: Sequence[str] | None) -> list[str]:
        names = list(self.feature_sets) if feature_sets is None else list(feature_sets)
        for name in names:
            if name not in self.feature_sets:
                held = ", ".join(self.feature_sets) or "none"
                raise InputError(f"{self.path}: there is no feature set {name!r}; it has {held}")
        return names

    def _records(self, name: str) -> list[PartRecord]:
        # Several at once, for each of thousands takes an object store 20 ms.
        with ThreadPoolExecutor(self.storage.readers) as pool:
            return list(pool.map(self._readers[name].record, self._written_parts(name)))

    def _written_parts(self, name: str) -> set[int]:
        # Listed anew each time: other processes may be writing parts just now.
        files = self.storage.list_files(f"parts/{name}")
        stems = (file.removesuffix(".json") for file in files if file.endswith(".json"))
        return {int(stem) for stem in stems if stem.isdigit() and int(stem) < self.n_parts}


def _with_local_copy(storage: Storage, folder: str | Path | None, limit: str | int | None) -> Storage:
    if folder is None and limit is None:
        return storage
    if folder is None:
        raise InputError(
            f"{storage.address}: a local limit of {limit} without a folder; name one with local_copy (--local-copy)"
        )
    from regionspot.cache.storage.local_mirror import (  # only remote caches need it
        NO_LIMIT,
        parse_bytes,
        with_local_mirror,
    )

    return with_local_mirror(storage, folder, NO_LIMIT if limit is None else parse_bytes(str(limit)))


def _tell_part_size(address: str, geometry: Geometry, asked: int) -> None:
    # The default is not told from nothing asked for.
    if asked != PART_SIZE and min(asked, geometry.images) != geometry.part_size:
        log.warning(
            "%s: keeps its parts of %d images; a part size of %d is for new caches", address, geometry.part_size, asked
        )


def _fitting(storage: Storage, header: Header, asked: Manifest) -> tuple[Manifest, bool]:
    """The asked images as the cache has them, where it has them, otherwise as they came; and whether it has to grow.

    Of annotations that a limit cuts elsewhere than the cache's, that is what the cache has.
    """
    from regionspot.cache.format.manifest_arrays import load_manifest  # zarr takes a second to import

    stored = load_manifest(storage, header)
    fitting = as_stored(stored, asked)
    if fitting.digest() != header.digest:
        grows = grows_to(stored, asked)
        if grows or is_part_of(asked, stored):
            return stored, grows
    return fitting, False


def _require_arrays(storage: Storage, header: Header) -> None:
    """Raises NotACacheError when an array that the header speaks of is not there."""
    for feature_set in header.feature_sets.values():
        for needed in (f"{feature_set.array}/zarr.json", f"{feature_set.checksums}/zarr.json"):
            if not storage.exists(needed):
                raise NotACacheError(
                    f"{storage.address}: {needed} is missing; restore the folder, or extract into another one"
                )


def _prepare_for_writing(storage: Storage, header: Header) -> None:
    storage.check_writable()
    folders = ["", "features"]
    for feature_set in header.feature_sets.values():
        folders += [feature_set.array, feature_set.scales, feature_set.checksums, f"parts/{feature_set.name}"]
    for folder in folders:
        storage.remove_abandoned(folder)
