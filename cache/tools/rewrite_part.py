"""Rewrites a part with new features of some of its images.

The old part record is removed after the new files are flushed and before the first one is renamed into place. A run
killed in between leaves a part without a record, which the next `extract` writes again; a record never describes other
files than those present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.format.schema import FeatureSet, ImageFeatures, record_file
from regionspot.cache.reading.feature_reader import open_reader
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.copy_features import read_encoded
from regionspot.cache.writing.part_writer import PartWriter


def rewrite_part(
    cache: FeatureCache,
    part: int,
    feature_set: str,
    images: Mapping[int, ImageFeatures],
    worker: str = "",
    before_publish: Callable[[], None] = lambda: None,
) -> PartRecord:
    """Rewrite a part of a feature set with new features or failures of the images at these rows.

    The other images are copied without decoding, each compared with its checksum. An error leaves the part unchanged.
    `before_publish` is called after the flush, before any old file is removed.

    Raises NotExtractedError for a part that is not written, CorruptPartError if it is damaged, InputError for features
    that do not fit or rows of another part, CacheError when the storage fails.
    """
    if cache.mode != "a":
        raise CacheError(f"{cache.path}: is open for reading; open it with mode 'a' to write a part")
    rows, record = cache.part_rows(part), cache.record(part, feature_set)
    if outside := sorted(set(images) - set(rows)):
        raise InputError(
            f"{cache.path}: row {outside[0]} is not in part {part}, which holds {rows.start} to {rows[-1]}"
        )

    def publish() -> None:
        before_publish()
        cache.storage.remove(record_file(feature_set, part))

    target = cache.feature_sets[feature_set]
    with PartWriter(cache.storage, cache.manifest, cache.geometry, part, [target]) as writer:
        for image in _merge_images(cache, target, record, images, rows):
            writer.append(image)
        return writer.commit(worker, publish)


def _merge_images(
    cache: FeatureCache,
    feature_set: FeatureSet,
    record: PartRecord,
    images: Mapping[int, ImageFeatures],
    rows: Sequence[int],
) -> Iterator[ImageFeatures]:
    reader = open_reader(cache.storage, feature_set, cache.manifest, cache.geometry, "always")
    failures = {failure.row: failure.reason for failure in record.failures}
    sizes = {row: {feature_set.name: len(batch)} for batch in record.batch_rows() for row in batch}
    for row in rows:
        if row in images:
            yield images[row]
        elif row in failures:
            yield ImageFeatures(row, {}, failures[row], sizes.get(row, {}))
        else:
            features = read_encoded(reader, cache.manifest, row)
            yield ImageFeatures(row, {feature_set.name: features}, batch_sizes=sizes.get(row, {}))
