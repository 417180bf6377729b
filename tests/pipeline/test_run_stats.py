"""RunStats: of a part, from its records, and of a run, merged from those of its parts."""

import threading

import pytest

from regionspot.pipeline.reporting.failure_kinds import EXAMPLES, FailureCount
from regionspot.pipeline.reporting.run_stats import RunStats


@pytest.fixture
def written(small, tmp_path):
    """A cache whose second part, with one failed image, was written by run "a"."""
    cache = small.create(tmp_path / "c.zarr")
    part = RunStats(seconds=10.0, stage_seconds={"decode": 1.0, "encode": 6.0}, ignored_orientations=3)
    images = (small.features(row) for row in cache.part_rows(1))
    cache.write_part(1, images, account=part.account("a"))
    return cache


def test_a_part_record_keeps_the_counts_of_its_worker(written, small):
    records = [written.record(1, name) for name in written.feature_sets]
    stats = RunStats.of_part(records, "a")
    assert (stats.parts, stats.parts_of_others, stats.images) == (1, 0, 4)
    assert stats.regions == int(small.manifest.region_count[4:8].sum())
    assert stats.bytes == sum(size for record in records for size in record.files.values())
    assert (stats.failures.total, stats.ignored_orientations) == (1, 3)
    assert stats.stage_seconds == {"decode": 1.0, "encode": 6.0, "write": 3.0}
    assert stats.shares() == {"decode": 0.1, "encode": 0.6, "write": 0.3}


def test_a_part_of_another_run_or_without_an_account_is_counted_as_of_others(written, small):
    written.write_part(0, (small.features(row) for row in written.part_rows(0)))
    for part in (0, 1):
        stats = RunStats.of_part([written.record(part, name) for name in written.feature_sets], "b")
        assert (stats.parts, stats.parts_of_others, stats.images, stats.bytes) == (0, 1, 0, 0)


def test_each_run_counts_only_the_feature_sets_that_it_wrote(small, tmp_path):
    cache = small.create(tmp_path / "c.zarr")
    for run, names in (("a", ["clip"]), ("b", ["sam"])):
        images = (small.features(row) for row in cache.part_rows(0))
        cache.write_part(0, images, names, account=RunStats().account(run))
    records = [cache.record(0, name) for name in ("clip", "sam")]
    assert RunStats.of_part(records, "b").bytes == sum(records[1].files.values())
    assert RunStats.of_part(records, "b").images == 4


def test_a_run_is_the_sum_of_its_parts():
    run = RunStats()
    for part in range(3):
        failures = FailureCount([(f"{part}.jpg", f"{part}.jpg: is not there")])
        run.merge(RunStats(4, 9, 1, 1, 0, 100, 2.0, {"encode": 1.0, "write": 0.5}, failures))
    run.merge(RunStats(parts_of_others=1))
    assert (run.images, run.regions, run.ignored_orientations, run.parts, run.parts_of_others) == (12, 27, 3, 3, 1)
    assert (run.bytes, run.shares()) == (300, {"encode": 0.5, "write": 0.25})
    (kind,) = run.failures.kinds()
    assert (kind.kind, kind.count, kind.examples) == ("is not there", 3, ["0.jpg", "1.jpg", "2.jpg"])


def test_merged_failures_keep_only_the_first_examples():
    many = FailureCount((f"{row}.jpg", f"{row}.jpg: is not there") for row in range(10))
    many.merge(FailureCount((f"{row}.jpg", f"{row}.jpg: is not there") for row in range(10, 20)))
    (kind,) = many.kinds()
    assert (kind.count, kind.examples) == (20, [f"{row}.jpg" for row in range(EXAMPLES)])


def test_several_threads_can_time_the_same_stage():
    stats, barrier = RunStats(), threading.Barrier(4)

    def work():
        for _ in range(1000):
            stats._add("encode", 1.0)
        barrier.wait(10)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.stage_seconds == {"encode": 4000.0}
