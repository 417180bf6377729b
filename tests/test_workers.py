"""Real worker processes killed, frozen and starved while they fill a cache: it ends complete, with the same bytes.

The GPU is simulated by sleeping (benchmarks/simulated.py), so that workers start in a second; claims, files, dask and
all that is sent are the real thing.
"""

import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from regionspot.cache import FeatureCache
from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.verify import verify
from regionspot.pipeline import part_worker
from regionspot.pipeline.clusters import check_scheduler, connected, worker_environment
from regionspot.pipeline.schedule import Totals, on_one_worker, run_parts, worker_threads

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # workers are started with the same path, so that they can import the job, too
simulated = importlib.import_module("benchmarks.simulated")

PICTURES, PART_SIZE = 40, 4
PARTS = dict.fromkeys(range(PICTURES // PART_SIZE), PART_SIZE)


@pytest.fixture(scope="module")
def client():
    with connected("local:3") as found:
        while len(worker_threads(found)) < 3:
            time.sleep(0.01)
        yield found


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return simulated.make_cache(tmp_path / "c.zarr", PICTURES, PART_SIZE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """What a run in one process writes."""
    path = tmp_path_factory.mktemp("undisturbed") / "c.zarr"
    simulated.make_cache(path, PICTURES, PART_SIZE)
    job = simulated.SimulatedJob(str(path))
    assert {part_worker.do_part(job, part, False).outcome for part in PARTS} == {"done"}
    part_worker.close_all()
    return content(path)


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes but those of claims; of the part records all but who wrote them and how long that took."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("claims/"):
            data = path.read_bytes()
            if name.startswith("parts/"):
                data = json.dumps(
                    {k: v for k, v in json.loads(data).items() if k not in ("worker", "seconds", "crc32c")}
                ).encode()
            found[name] = data
    return found


class Run:
    """`run_parts` in a thread, so that the test can get in its way."""

    def __init__(self, client, cache, seconds) -> None:
        self.cache, self.totals, self.error = cache, Totals(), None
        self.job = simulated.SimulatedJob(str(cache.path), seconds)
        self._thread = threading.Thread(target=self._run, args=(client,), daemon=True)
        self._thread.start()

    def _run(self, client) -> None:
        try:
            run_parts(client, self.job, PARTS, self.totals)
        except CacheError as error:
            self.error = error

    def has_written(self, parts: int) -> None:
        """Wait until so many are done, whatever that takes."""
        while self._thread.is_alive() and len(PARTS) - len(self.cache.pending_parts()) < parts:
            time.sleep(0.002)

    def end(self) -> Totals:
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.totals


def pids(client) -> dict[str, int]:
    return client.run(os.getpid)


def must_equal(cache, undisturbed) -> None:
    report = verify(cache.path)
    assert report.sound, report.text()
    assert not report.pending
    FeatureCache.open(cache.path, "a")  # removes what killed writers left of files, as every run does
    assert content(cache.path) == undisturbed


def test_workers_share_the_parts_and_write_what_one_process_writes(client, cache, undisturbed):
    totals = Run(client, cache, 0.005).end()
    assert (totals.parts, totals.pictures, totals.failed, totals.others) == (len(PARTS), PICTURES, 0, 0)
    assert totals.bytes > 0
    assert sum(totals.shares().values()) == pytest.approx(1)
    must_equal(cache, undisturbed)


def test_a_killed_worker_has_its_parts_done_by_the_others(client, cache, undisturbed):
    run = Run(client, cache, 0.02)
    run.has_written(2)
    os.kill(next(iter(pids(client).values())), signal.SIGKILL)
    assert run.end().parts == len(PARTS)
    must_equal(cache, undisturbed)


def test_a_frozen_worker_holds_nothing_up_and_when_it_wakes_it_leaves_what_was_taken_over(client, cache, undisturbed):
    while len(found := pids(client)) < 3:  # one is being started again after the test before
        time.sleep(0.01)
    run = Run(client, cache, 0.02)
    run.has_written(3)
    frozen = next(iter(found.values()))
    os.kill(frozen, signal.SIGSTOP)
    try:
        run.end()
        must_equal(cache, undisturbed)
    finally:
        os.kill(frozen, signal.SIGCONT)
    # Woken, it drops its parts and lets go of them: then no claim is left but those of runs that hold nothing.
    while any(path.name[0].isdigit() for path in (cache.path / "claims").iterdir()):
        time.sleep(0.01)
    must_equal(cache, undisturbed)


def test_a_worker_with_a_full_disk_is_set_aside_and_when_all_disks_are_full_the_run_says_so(
    client, cache, undisturbed, caplog
):
    while len(found := pids(client)) < 3:
        time.sleep(0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(workers, size):
        client.run(resource.setrlimit, resource.RLIMIT_FSIZE, (size, hard), workers=workers)

    first, *others = found
    try:
        limit([first], 600)  # more than a claim takes, less than a part
        run = Run(client, cache, 0.005)
        assert run.end().parts == len(PARTS)
        assert f"{first} gets no more parts" in caplog.text
        must_equal(cache, undisturbed)
        limit(others, 600)
        for record in (cache.path / "parts/sam").iterdir():
            record.unlink()
        with pytest.raises(CacheError, match=r"part . could not be written: File too large") as error:
            Run(client, cache, 0.005).end()
        assert "\n" not in str(error.value)
    finally:
        limit(list(found), soft)
    Run(client, cache, 0.0).end()
    must_equal(cache, undisturbed)


def test_a_function_is_run_by_one_worker_and_what_it_cannot_begin_is_said_in_one_line(client, monkeypatch):
    assert on_one_worker(client, "counts", len, "abc") == 3

    def fails(future):
        raise ModuleNotFoundError("No module named 'regionspot'")

    with pytest.raises(CacheError, match=r"ModuleNotFoundError: No module .* need the same regionspot") as error:
        on_one_worker(client, "fails", fails, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "locals", "local:", "local:0", "local:-1", "host:8786", "tcp://", "3"])
def test_what_is_no_scheduler_is_refused_in_one_line(text):
    with pytest.raises(InputError, match="expected none, local, local:8"):
        check_scheduler(text)


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("regionspot.pipeline.clusters.CONNECT_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"tcp://127.0.0.1:9: no scheduler answers"), connected("tcp://127.0.0.1:9"):
        pass


def test_local_workers_get_a_gpu_each_and_their_share_of_the_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    assert check_scheduler("local") == "local"
    found = [worker_environment(number, 3) for number in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["4", "GPU-5", "4"]
    assert {each["OMP_NUM_THREADS"] for each in found} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(0, 1)
