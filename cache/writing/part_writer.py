"""Writes one part: every feature set's shard and checksums, streamed; its part record last.

    features/<set>/<array>/c.42.0.0    records and their index
    features/<set>/crc32c/c.42         crc32c of each record
    parts/<set>/00042.json             part record: sizes, counts, failures; written last

A killed run leaves only partial files and shards without a part record, which the next run writes again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.part_record import PartRecord, batches_of_sizes, part_identity, set_crc
from regionspot.cache.format.schema import EncodedFeatures, Failure, FeatureSet, Geometry, ImageFeatures, record_file
from regionspot.cache.storage.base import Storage
from regionspot.cache.writing.feature_set_writers import FeatureSetWriter, MapWriter, TokenWriter


class PartWriter:
    """Writes the given feature sets of one part, image by image in row order. A context manager.

    Leaving it without `commit` removes the files. Raises InputError for features that do not fit the image, CacheError
    when the storage fails.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, geometry: Geometry, part: int, sets: Sequence[FeatureSet]
    ) -> None:
        self._storage, self._manifest, self._part = storage, manifest, part
        self._rows = geometry.rows(part)
        self._count = 0
        self._failures: list[Failure] = []
        self._batch_sizes: list[dict[str, int]] = []  # by feature set, one dict per row
        self._started = time.monotonic()
        self._writers: list[FeatureSetWriter] = []
        try:
            with self._disk_errors():
                for feature_set in sets:
                    writer = MapWriter if feature_set.kind == "map" else TokenWriter
                    self._writers.append(writer(storage, feature_set, geometry, part))
        except BaseException:
            self._discard()
            raise

    def append(self, image: ImageFeatures) -> None:
        """Write the features of the next image."""
        row = self._rows.start + self._count
        if image.row != row or row not in self._rows:
            raise InputError(
                f"{self._storage.address}: part {self._part} holds rows {self._rows.start} to {self._rows.stop - 1} "
                f"in order; got row {image.row} after {self._count} images"
            )
        regions = int(self._manifest.offsets[row + 1] - self._manifest.offsets[row])
        if image.failure is not None:
            self._failures.append(Failure(row, str(self._manifest.paths[row]), image.failure))
        for writer in self._writers:
            with self._disk_errors():
                if image.failure is None:
                    writer.append(row, regions, _features_of(image, writer.feature_set))
                else:
                    writer.skip(regions)
        self._batch_sizes.append(image.batch_sizes)
        self._count += 1

    def commit(
        self,
        worker: str,
        before_publish: Callable[[], None] | None = None,
        account: Mapping[str, Any] | None = None,
    ) -> PartRecord:
        """Flush and publish all files, and the part record of each feature set last.

        before_publish   called after the flush, before the first rename; if it raises, the part stays unwritten
        account          JSON for the record, read after `before_publish` returned
        """
        if self._count != len(self._rows):
            raise InputError(
                f"{self._storage.address}: part {self._part} has {len(self._rows)} images, got only {self._count}; "
                "give one ImageFeatures for each, with `failure` set where it could not be read"
            )
        offsets = self._manifest.offsets
        record = PartRecord(
            part=self._part,
            first_row=self._rows.start,
            images=len(self._rows),
            regions=int(offsets[self._rows.stop] - offsets[self._rows.start]),
            files={},
            checksums={},
            failures=tuple(self._failures),
            worker=worker,
            seconds=0.0,
        )
        with self._disk_errors():
            written = [writer.finish() for writer in self._writers]
        if before_publish is not None:
            before_publish()
        with self._disk_errors():
            for writer in self._writers:
                writer.publish()
            record = replace(record, seconds=round(time.monotonic() - self._started, 3), account=dict(account or {}))
            # Last on purpose: a part is complete once its record exists, so a run killed before that writes it again.
            for writer, files in zip(self._writers, written, strict=True):
                name = writer.feature_set.name
                set_record = replace(
                    record,
                    files=files.files,
                    checksums=files.checksums,
                    identity=part_identity(self._rows, self._manifest, set_crc(writer.feature_set)),
                    batches=batches_of_sizes(sizes.get(name) for sizes in self._batch_sizes),
                )
                set_record.save(self._storage, record_file(name, self._part))
        return replace(
            record,
            files={name: size for one in written for name, size in one.files.items()},
            checksums={name: crc for one in written for name, crc in one.checksums.items()},
        )

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        for writer in self._writers:
            writer.discard()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn OSErrors of the storage into CacheErrors. The caller's iterator never runs inside."""
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self._storage.address}: part {self._part} could not be written: {error.strerror or error}; "
                "finished parts are safe: fix that and run the same command again"
            ) from error


def _features_of(image: ImageFeatures, feature_set: FeatureSet) -> NDArray[Any] | EncodedFeatures:
    if feature_set.name not in image.features:
        raise InputError(
            f"row {image.row}: no features of {feature_set.name}, only of {sorted(image.features) or 'nothing'}; "
            "give them, or set `failure` to the reason why there are none"
        )
    return image.features[feature_set.name]
