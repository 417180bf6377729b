"""Images of a written part replaced: a new part is made beside the old one and takes its place.

The records are removed when all of the new part is flushed, before its first file gets its name. A run killed in
between leaves a part without records, which the next extract makes from the images; at no moment do records speak of
other files than those that lie there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.format.schema import FeatureSet, ImageFeatures, record_file
from regionspot.cache.reading.feature_reader import open_reader
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.copy_features import read_stored
from regionspot.cache.writing.part_writer import PartWriter


def rewrite_part(
    cache: FeatureCache,
    part: int,
    feature_set: str,
    images: Mapping[int, ImageFeatures],
    worker: str = "",
    before_publish: Callable[[], None] = lambda: None,
) -> PartRecord:
    """Write a part of a feature set anew with other features, or failures, of the images at these rows.

    All others are taken as they are stored, each compared with its checksum. Whatever is raised before the end leaves
    the part as it was. `before_publish` is called when all is flushed, before anything of the old part goes.

    Raises NotExtractedError for a part that is not written, CorruptPartError where it is damaged, InputError for
    features that do not fit or rows of another part, CacheError when the disk refuses them.
    """
    if cache.mode != "a":
        raise CacheError(f"{cache.path}: is open for reading; open it with mode 'a' to write a part")
    rows, record = cache.part_rows(part), cache.record(part, feature_set)
    if strays := sorted(set(images) - set(rows)):
        raise InputError(
            f"{cache.path}: row {strays[0]} is none of part {part}, which holds {rows.start} to {rows[-1]}"
        )

    def publish() -> None:
        before_publish()
        cache.storage.remove(record_file(feature_set, part))

    held = cache.feature_sets[feature_set]
    with PartWriter(cache.storage, cache.manifest, cache.geometry, part, [held]) as writer:
        for image in _with_changes(cache, held, record, images, rows):
            writer.append(image)
        return writer.commit(worker, publish)


def _with_changes(
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
            stored = read_stored(reader, cache.manifest, row)
            yield ImageFeatures(row, {feature_set.name: stored}, batch_sizes=sizes.get(row, {}))
