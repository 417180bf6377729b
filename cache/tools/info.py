"""Describes a cache and lists its images, from the header and the part records only.

Other processes may write the cache meanwhile; the result is its current state.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

from regionspot.cache.errors import InputError
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.format.schema import SCHEMA_VERSION, Failure, FeatureSet
from regionspot.cache.progress import duration
from regionspot.cache.storage.atomic_files import IMAGES_KEY, from_json, rename_key
from regionspot.cache.store import FeatureCache

SUMMARY = (
    "summary.md"  # of the last run of `extract`; RUNS is the folder with one file per run. No checksum covers them
)
RUNS = "runs"
_MAX_WRITERS = 4  # the busiest writers are listed
State = Literal["done", "failed", "pending"]
STATES: tuple[State, ...] = ("done", "failed", "pending")

_PATH_WIDTH = 60  # longer paths shift only their own line
_DIGEST_DIGITS = 12  # of a SHA-256 in the text; the JSON has all 64


@dataclass(frozen=True)
class SetInfo:
    """One feature set and its progress.

    encoding                 "float16"; "int8, zstd"
    parts, images, regions   written so far
    pending                  number of parts not written yet
    bytes                    on disk, with indexes, scales and checksums
    bytes_as_float16         size of the same features as plain float16
    seconds                  sum over parts of the time from first to last image; concurrent parts, and feature sets of
                             one part, count separately
    writers                  number of parts by worker, busiest first
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    encoding: str
    provenance: dict[str, Any]
    parts: int
    pending: int
    images: int
    regions: int
    bytes: int
    bytes_as_float16: int
    seconds: float
    writers: dict[str, int]


@dataclass(frozen=True)
class RunInfo:
    """The latest run of `extract` that wrote anything, from its record in runs/.

    started    UTC, ISO 8601
    worker     host:process
    seconds    from its start to its end
    """

    started: str
    worker: str
    images: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class CacheInfo:
    """The result of `describe_cache`.

    failed     number of images that could not be read
    failures   their number by reason, most frequent first; digits are replaced by N to group equal reasons
    last_run   None if no run has left a record, such as for imported features
    """

    path: str
    schema: int
    dataset: str
    split: str
    images: int
    regions: int
    classes: int
    parts: int
    part_size: int
    source: dict[str, Any]
    report: dict[str, int]
    feature_sets: tuple[SetInfo, ...]
    failed: int
    failures: dict[str, int]
    last_run: RunInfo | None = None

    @property
    def rate(self) -> float:
        """Images per second of the last run; 0 if there is none."""
        return self.last_run.rate if self.last_run else 0.0

    def as_json(self) -> dict[str, Any]:
        """All fields, for json.dumps. `rate` of a feature set is the rate of the last run, which wrote all sets."""
        rate = round(self.rate, 3)
        sets = [_as_json(one) | {"rate": rate if one.parts else 0.0} for one in self.feature_sets]
        last_run = self.last_run and _as_json(self.last_run)
        return _as_json(self) | {"feature_sets": sets, "last_run": last_run, "rate": rate}

    def text(self) -> str:
        """A readable description."""
        blocks = [_head(self), *(_set_lines(one, self) for one in self.feature_sets)]
        if self.failed:
            blocks.append(_failure_lines(self))
        return "\n\n".join("\n".join(lines) for lines in blocks)


def _as_json(part: CacheInfo | SetInfo | RunInfo) -> dict[str, Any]:
    return rename_key(asdict(part), "images", IMAGES_KEY)


def describe_cache(cache: FeatureCache) -> CacheInfo:
    """Describe a cache. Raises CorruptPartError if a part record is damaged."""
    manifest = cache.manifest
    records = {name: list(part_records(cache, name)) for name in cache.feature_sets}
    failures = {failure.row: failure for parts in records.values() for record in parts for failure in record.failures}
    causes = Counter(re.sub(r"\d+", "N", cause(failure)) for failure in failures.values())
    return CacheInfo(
        path=str(cache.path),
        schema=SCHEMA_VERSION,
        dataset=manifest.dataset,
        split=manifest.split,
        images=len(manifest),
        regions=len(manifest.boxes_xyxy),
        classes=len(cache.categories),
        parts=cache.n_parts,
        part_size=cache.part_size,
        source=manifest.source,
        report=manifest.report,
        feature_sets=tuple(_set_info(one, records[one.name], cache.n_parts) for one in cache.feature_sets.values()),
        failed=len(failures),
        failures=dict(causes.most_common()),
        last_run=_last_run(cache),
    )


def _last_run(cache: FeatureCache) -> RunInfo | None:
    for name in sorted(cache.storage.list_files(RUNS), reverse=True):  # names begin with the start time
        try:
            document = from_json(cache.storage.read(f"{RUNS}/{name}"))
            summary = document["summary"]
            run = RunInfo(
                str(document["started"]), str(document["worker"]), int(summary[IMAGES_KEY]), summary["seconds"]
            )
            if run.rate > 0:
                return run
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of another program or a later version
    return None


def part_records(cache: FeatureCache, name: str) -> Iterator[PartRecord]:
    """Part records of a feature set, in order. Raises CorruptPartError at a damaged one."""
    pending = set(cache.pending_parts([name]))
    written = [part for part in range(cache.n_parts) if part not in pending]
    with ThreadPoolExecutor(cache.storage.readers) as pool:
        yield from pool.map(lambda part: cache.record(part, name), written)


def cause(failure: Failure) -> str:
    """Reason of a failure without the image's path."""
    return failure.reason.partition(f"{failure.path}: ")[2] or failure.reason


def _set_info(feature_set: FeatureSet, records: list[PartRecord], n_parts: int) -> SetInfo:
    images = sum(record.images - len(record.failures) for record in records)
    regions = sum(record.regions for record in records)
    writers = Counter(record.worker or "unnamed" for record in records)
    return SetInfo(
        name=feature_set.name,
        kind=feature_set.kind,
        shape=feature_set.shape,
        encoding=feature_set.dtype + (f", {feature_set.compression}" if feature_set.compression else ""),
        provenance=feature_set.provenance,
        parts=len(records),
        pending=n_parts - len(records),
        images=images,
        regions=regions,
        bytes=sum(sum(record.files.values()) for record in records),
        bytes_as_float16=2 * math.prod(feature_set.shape) * (images if feature_set.kind == "map" else regions),
        seconds=round(sum(record.seconds for record in records), 3),
        writers=dict(writers.most_common()),
    )


def size_text(size: float) -> str:
    """A size in decimal units: 512 B, 4.88 kB, 1.13 MB, 349 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def _head(info: CacheInfo) -> list[str]:
    files = [f"{name} ({digest[:_DIGEST_DIGITS]})" for name, digest in info.source.get("files", {}).items()]
    dropped = [f"{reason.replace('_', ' ')} {count:,}" for reason, count in info.report.items() if count]
    total = sum(one.bytes for one in info.feature_sets)
    lines = {
        "pictures": f"{info.images:,} in {info.parts:,} parts of {info.part_size:,}",
        "regions": f"{info.regions:,} of {info.classes:,} classes",
        "made from": ", ".join(files),
        "when read": ", ".join(dropped),
        "features": f"{size_text(total)} in {len(info.feature_sets)} sets; schema version {info.schema}",
        "last run": _run_text(info.last_run),
    }
    return [f"{info.path}: {info.dataset} {info.split}", *_labelled(lines)]


def _set_lines(one: SetInfo, info: CacheInfo) -> list[str]:
    what = "a map of {} x {} per image" if one.kind == "map" else "a token of {} numbers per region"
    provenance = dict(one.provenance)
    lines = {
        "parts": _parts_text(one, info),
        "size": _size_line(one),
        "model": _model_text(provenance),
        "input": _input_text(provenance),
        "software": ", ".join(f"{name} {number}" for name, number in provenance.pop("versions", {}).items()),
        "also": ", ".join(f"{name} {_value_text(value)}" for name, value in provenance.items()),
        "written by": _writers_text(one.writers),
    }
    return [f"{one.name}: {what.format(*one.shape)}, {one.encoding}", *_labelled(lines)]


def _labelled(lines: dict[str, str]) -> list[str]:
    return [f"  {label:<10}  {text}" for label, text in lines.items() if text]


def _parts_text(one: SetInfo, info: CacheInfo) -> str:
    if not one.pending:
        return f"all {one.parts:,}"
    pending = f"{one.parts:,} of {info.parts:,}; {one.pending:,} pending"
    if not info.rate:
        return pending
    return f"{pending}, {duration(one.pending * info.part_size / info.rate)} at the last run's rate"


def _run_text(run: RunInfo | None) -> str:
    if run is None:
        return ""
    done = f"{run.images:,} images in {duration(run.seconds)}, {run.rate:.3g} images/s"
    return f"{done}; by {run.worker}, started {run.started[:16].replace('T', ' ')} UTC"


def _size_line(one: SetInfo) -> str:
    share = one.bytes / one.bytes_as_float16 if one.bytes_as_float16 else 1
    ratio = f", {share:.2f} of float16's size" if share < 0.95 else ""
    units = one.images if one.kind == "map" else one.regions
    unit = "image" if one.kind == "map" else "region"
    return f"{size_text(one.bytes)}, {size_text(one.bytes / units)} per {unit}{ratio}" if units else ""


def _model_text(provenance: dict[str, Any]) -> str:
    """Removes the keys that it uses from the provenance, so that the rest can be listed."""
    model, sha256, origin = (provenance.pop(key, None) for key in ("model", "weights_sha256", "weights_origin"))
    dtype = provenance.pop("dtype", None)
    phrases = [str(model)] if model else []
    if sha256:
        phrases.append(f"weights {sha256[:_DIGEST_DIGITS]}" + (f" ({origin})" if origin and origin != sha256 else ""))
    return ", ".join([*phrases, *([f"computed in {dtype}"] if dtype else [])])


def _input_text(provenance: dict[str, Any]) -> str:
    pixels, resize, exif = (provenance.pop(key, None) for key in ("input_pixels", "resize", "exif"))
    size = resize or (f"{pixels} pixels" if pixels else "")
    return "; ".join(filter(None, (size, f"EXIF orientation {exif}" if exif else "")))


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_value_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _writers_text(writers: dict[str, int]) -> str:
    named = [f"{name} ({parts:,})" for name, parts in list(writers.items())[:_MAX_WRITERS]]
    others = len(writers) - len(named)
    return ", ".join(named) + (f" and {others:,} others" if others else "")


def _failure_lines(info: CacheInfo) -> list[str]:
    width = len(f"{max(info.failures.values()):,}")
    return [f"{info.failed:,} of {info.images:,} images could not be read:"] + [
        f"  {count:>{width},}  {reason}" for reason, count in info.failures.items()
    ]


def list_images(cache: FeatureCache, states: Sequence[State] = STATES, limit: int | None = None) -> Iterator[str]:
    """A line per image, streamed part by part: row, id, width x height, regions, path, and state.

    done      all feature sets have it
    failed    it could not be read; with the reason
    pending   its part is not written yet; with the feature sets that lack it

    Raises InputError for an unknown state or a limit below 1, CorruptPartError if a part record is damaged.
    """
    unknown = [state for state in states if state not in STATES]
    if unknown or not states:
        raise InputError(f"{cache.path}: state is {', '.join(unknown) or 'empty'}, expected {', '.join(STATES)}")
    if limit is not None and limit < 1:
        raise InputError(f"{cache.path}: limit is {limit}, expected at least 1")
    return islice(_image_lines(cache, states), limit and min(limit, len(cache.manifest)))


def _image_lines(cache: FeatureCache, states: Sequence[State]) -> Iterator[str]:
    manifest = cache.manifest
    row_width = len(str(len(manifest) - 1))
    id_width = max(len(str(manifest.image_ids.min())), len(str(manifest.image_ids.max())))
    path_width = min(_PATH_WIDTH, max(map(len, manifest.paths[:10_000].tolist())))
    regions_width = len(str(manifest.region_count.max()))
    for row, state, detail in _states(cache):
        if state in states:
            size = f"{manifest.widths[row]} x {manifest.heights[row]}"
            yield (
                f"{row:>{row_width}}  {manifest.image_ids[row]:>{id_width}}  {size:>11}  "
                f"{manifest.region_count[row]:>{regions_width}} regions  {manifest.paths[row]:<{path_width}}  "
                f"{state}{f': {detail}' if detail else ''}"
            )


def _states(cache: FeatureCache) -> Iterator[tuple[int, State, str]]:
    """Row, state and its detail, of every image."""
    for part in range(cache.n_parts):
        missing = cache.missing_sets(part)
        written = [name for name in cache.feature_sets if name not in missing]
        failed = {failure.row: cause(failure) for name in written for failure in cache.record(part, name).failures}
        for row in cache.part_rows(part):
            if row in failed:
                yield row, "failed", failed[row]
            elif missing or not written:
                yield row, "pending", ", ".join(missing)
            else:
                yield row, "done", ""
