"""summary.md in a cache's root: what is in it, what could not be read, and how fast each run was.

Made of the records of the parts, which say what is there however many runs were killed on the way, and of the records
of the runs, which say how it went. Both are only ever added to, so the page is written again at each run's end.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from regionspot.cache.errors import CacheError
from regionspot.cache.format.part_record import PartRecord
from regionspot.cache.progress import duration
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.info import RUNS, SUMMARY, size_text
from regionspot.pipeline.reporting.failure_kinds import FailureCount
from regionspot.pipeline.reporting.run_summary import RunRecord, parse_run

log = logging.getLogger(__name__)

_SHOWN_RUNS = 20  # the latest
_SHOWN_PARTS = 20  # those with most failures

Parts = dict[str, list[PartRecord]]  # the records of all written parts, by feature set


def publish(cache: FeatureCache, run: RunRecord) -> None:
    """Add a run to those that the cache knows of, and write its summary.md anew.

    A store that refuses costs the page and not the run, whose features are safe: it is a warning.
    """
    stamp = run.started.translate(str.maketrans("", "", "-:"))[:15]
    try:
        cache.storage.write_new(f"{RUNS}/{stamp}-{uuid.uuid4().hex[:8]}.json", run.to_json())
        write_page(cache)
    except (OSError, CacheError) as error:
        log.warning("%s: %s could not be written: %s", cache.path, SUMMARY, error)


def write_page(cache: FeatureCache) -> None:
    """Write summary.md as the cache is now. Raises OSError and CacheError where the store refuses."""
    written: list[str] | None = None
    # Looked at again behind the write: of two runs that end together the later one may have put an older page over
    # the other's, but then it finds the other's record here.
    while (names := sorted(cache.storage.list_files(RUNS))) != written:
        page = summary_page(cache, list(_runs(cache, names)))
        cache.storage.write(SUMMARY, page.encode())
        written = names


def _runs(cache: FeatureCache, names: Sequence[str]) -> Iterator[RunRecord]:
    for name in names:
        try:
            yield parse_run(cache.storage.read(f"{RUNS}/{name}"))
        except (FileNotFoundError, ValueError):
            continue  # somebody else's file, one being written, or one of a later version: the page tells of the rest


def summary_page(cache: FeatureCache, runs: Sequence[RunRecord]) -> str:
    """The page in Markdown; `runs` in the order in which they began."""
    parts = _parts(cache)
    sections = [_head(cache, parts), _sets(cache, parts), _failures(parts), *_how_it_went(runs)]
    return "\n\n".join(filter(None, sections)) + "\n"


def _parts(cache: FeatureCache) -> Parts:
    found: Parts = {}
    with ThreadPoolExecutor(cache.storage.readers) as pool:  # each takes an object store 20 ms
        for name in cache.feature_sets:
            pending = set(cache.pending_parts([name]))
            written = [part for part in range(cache.n_parts) if part not in pending]
            found[name] = list(pool.map(partial(cache.record, feature_set=name), written))
    return found


def _head(cache: FeatureCache, parts: Parts) -> str:
    pending = len(cache.feature_sets) * cache.n_parts - sum(map(len, parts.values()))
    state = f"{pending:,} parts are still to be written" if pending else "complete"
    manifest = cache.manifest
    return "\n\n".join(
        [
            f"# {cache.storage.address.rstrip('/').rpartition('/')[2]}",
            f"Features of {manifest.dataset} {manifest.split}: {len(manifest):,} images with "
            f"{len(manifest.boxes_xyxy):,} regions in {cache.n_parts:,} parts of {cache.part_size:,}; **{state}**. "
            "Written by `regionspot extract`, anew at the end of each of its runs.",
        ]
    )


def _sets(cache: FeatureCache, parts: Parts) -> str:
    rows = [
        (
            name,
            cache.feature_sets[name].dtype,
            f"{len(records):,} of {cache.n_parts:,}",
            f"{sum(record.images for record in records):,}",
            f"{sum(record.regions for record in records):,}",
            size_text(sum(sum(record.files.values()) for record in records)),
            f"{sum(len(record.failures) for record in records):,}",
        )
        for name, records in parts.items()
    ]
    return _table("feature set|type|parts|images|regions|bytes|could not be read", rows)


def _failures(parts: Parts) -> str:
    failed = {
        each.row: (each, record.part) for records in parts.values() for record in records for each in record.failures
    }
    if not failed:
        return "Every image of the written parts could be read." if any(parts.values()) else ""
    kinds = FailureCount((each.path, each.reason) for each, _ in failed.values()).kinds()
    by_part = Counter(part for _, part in failed.values())
    left_out = f"\n\nFurther parts with failures: {len(by_part) - _SHOWN_PARTS:,}." * (len(by_part) > _SHOWN_PARTS)
    return "\n\n".join(
        [
            "## Images that could not be read",
            "Each part's record under `parts/` names its own, with reasons; `extract --retry-failed` tries them again.",
            _table(
                "what is wrong|images|for example",
                [(each.kind, f"{each.count:,}", ", ".join(each.examples)) for each in kinds],
            ),
            _table(
                "part|could not be read",
                [(str(part), f"{count:,}") for part, count in by_part.most_common(_SHOWN_PARTS)],
            )
            + left_out,
        ]
    )


def _how_it_went(runs: Sequence[RunRecord]) -> Iterator[str]:
    if not runs:
        return
    yield "## Runs"
    if len(runs) > _SHOWN_RUNS:
        done = sum(run.summary.images for run in runs)
        yield f"The latest {_SHOWN_RUNS} of {len(runs):,}, which did {done:,} images together."
    yield _table(
        "began (UTC)|worker|images|images/s|regions/s|written|took|could not be read|bottleneck|outcome",
        map(_run_row, reversed(runs[-_SHOWN_RUNS:])),
    )
    yield from _last_run(runs[-1])


def _run_row(run: RunRecord) -> tuple[str, ...]:
    did = run.summary
    seconds = max(did.seconds, 1e-9)
    return (
        run.started[:19].replace("T", " "),
        run.worker,
        f"{did.images:,}",
        f"{did.images / seconds:.3g}",
        f"{did.regions / seconds:.3g}",
        size_text(did.bytes),
        duration(did.seconds),
        f"{did.failed:,}",
        f"{did.bottleneck.stage} {did.bottleneck.share:.0%}" if did.bottleneck else "",
        run.outcome,
    )


def _last_run(run: RunRecord) -> Iterator[str]:
    did, machine = run.summary, run.machine
    yield "## The latest run"
    if slow := did.bottleneck:
        yield f"**Bottleneck: {slow.stage}, {slow.share:.0%} of the time.** {slow.advice[:1].upper()}{slow.advice[1:]}."
    rest = max(0.0, 1 - sum(did.shares.values()))
    stages = [*did.shares.items(), ("the rest", rest)]
    yield _table(
        "stage|seconds|share", [(name, f"{share * did.seconds:.1f}", f"{share:.1%}") for name, share in stages]
    )
    yield _table(
        "|",
        [
            ("machine", f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gb')} GB"),
            ("GPU", str(machine.get("gpu"))),
            ("system", f"{machine.get('system')}, Python {machine.get('python')}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
            *((f"weights of {name}", origin) for name, origin in run.models.items()),
        ],
    )


def _table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `head` holds the columns' names between bars."""
    columns = head.split("|")
    lines = [
        columns,
        ["---"] * len(columns),
        *([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
