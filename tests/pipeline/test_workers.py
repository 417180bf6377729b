"""Worker processes are killed, frozen and cut off while they fill a cache: it ends complete, with the same bytes.

The GPU is simulated by sleeping (benchmarks/simulated.py), so that workers start in a second; claims, files and dask
are real.
"""

import importlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial, partialmethod
from pathlib import Path

import pytest
from distributed.nanny import WorkerProcess
from makers import extracted_content

from regionspot.cache import FeatureCache
from regionspot.cache.errors import CacheError, InputError
from regionspot.cache.tools.verify import verify
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.distributed import cluster as cluster_module
from regionspot.pipeline.distributed import run as run_module
from regionspot.pipeline.distributed.cluster import check_scheduler, connected, thread_counts
from regionspot.pipeline.distributed.run import WrittenFeatures, run_once, run_parts
from regionspot.pipeline.distributed.worker import PARTS_AT_ONCE, FeatureParts, PartMaker
from regionspot.pipeline.extraction.failure_check import FailureCheck
from regionspot.pipeline.reporting.run_monitor import RunMonitor
from regionspot.pipeline.reporting.run_stats import RunStats

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # workers are started with the same path, so that they can import the job, too
simulated = importlib.import_module("benchmarks.simulated")

IMAGES, PART_SIZE = 40, 4
PARTS = range(IMAGES // PART_SIZE)


@pytest.fixture(scope="module")
def connection():
    """Three workers on a machine of two GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
        with connected("local:3") as connection:
            connection.client.wait_for_workers(3)
            yield connection


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return simulated.make_cache(tmp_path / "c.zarr", IMAGES, PART_SIZE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """The content that one process writes, without dask."""
    path = tmp_path_factory.mktemp("undisturbed") / "c.zarr"
    simulated.make_cache(path, IMAGES, PART_SIZE)
    maker = simulated.SimulatedJob(str(path)).open()
    for part in PARTS:
        maker.make(part)
    maker.close()
    return extracted_content(path)


def written(job, cache, monitor, *check) -> WrittenFeatures:
    return WrittenFeatures(cache, list(cache.feature_sets), job.run, monitor, *check)


class Run:
    """`run_parts` in a thread, so that the test can disturb it."""

    def __init__(self, connection, cache, seconds, **options) -> None:
        self.cache, self.monitor, self.error = cache, RunMonitor(IMAGES, len(PARTS)), None
        self.job = simulated.SimulatedJob(str(cache.path), seconds, **options)
        self._thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
        self._thread.start()

    def _run(self, connection) -> None:
        try:
            run_parts(connection, self.job, written(self.job, self.cache, self.monitor), PARTS)
        except CacheError as error:
            self.error = error

    def wait_until_written(self, parts: int) -> None:
        """Wait until so many parts are written."""
        while self._thread.is_alive() and len(PARTS) - len(self.cache.pending_parts()) < parts:
            time.sleep(0.002)

    def end(self) -> RunStats:
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.monitor.stats


def pids(connection, count: int) -> list[int]:
    """Process ids of the workers, once there are `count`: one may be restarting."""
    while len(by_worker := connection.client.run(os.getpid)) < count:
        time.sleep(0.01)
    return list(by_worker.values())


def assert_complete(cache, undisturbed) -> None:
    report = verify(cache.path)
    assert report.sound, report.text()
    assert not report.pending
    assert extracted_content(cache.path) == undisturbed


def test_workers_share_the_parts_and_write_what_one_process_writes(connection, cache, undisturbed):
    stats = Run(connection, cache, 0.005).end()
    assert (stats.parts, stats.images, stats.failures.total, stats.parts_of_others) == (len(PARTS), IMAGES, 0, 0)
    assert stats.bytes > 0
    assert sum(stats.shares().values()) == pytest.approx(1)
    assert_complete(cache, undisturbed)


def test_the_other_workers_write_the_parts_of_a_killed_one(connection, cache, undisturbed):
    workers = pids(connection, 3)
    run = Run(connection, cache, 0.02)
    run.wait_until_written(2)
    os.kill(workers[0], signal.SIGKILL)
    assert run.end().parts == len(PARTS)
    assert_complete(cache, undisturbed)


def test_a_frozen_worker_is_replaced_and_the_others_write_its_parts(cache, undisturbed, monkeypatch):
    monkeypatch.setattr(cluster_module, "WORKER_TTL_SECONDS", 1.0)
    # Dask waits for ten heartbeats at least, and its nanny lets a worker end itself for 0.8 of the timeout.
    monkeypatch.setattr("distributed.scheduler.heartbeat_interval", lambda workers: 0.1)
    monkeypatch.setattr(WorkerProcess, "kill", partialmethod(WorkerProcess.kill, timeout=1))
    with connected("local:2") as connection:
        workers = pids(connection, 2)
        run = Run(connection, cache, 0.02)
        run.wait_until_written(2)
        os.kill(workers[0], signal.SIGSTOP)
        assert run.end().parts == len(PARTS)
        assert workers[0] not in pids(connection, 2)
    assert_complete(cache, undisturbed)


def test_the_other_workers_take_what_a_slow_one_has_not_started(connection, cache):
    slow = pids(connection, 3)[0]
    Run(connection, cache, 0.005, slow=slow).end()
    by_worker = Counter(cache.record(part, "clip").worker.rpartition(":")[2] for part in PARTS)
    assert by_worker[str(slow)] <= PARTS_AT_ONCE


def test_a_part_that_is_assigned_twice_at_the_same_time_is_written_once(cache, undisturbed):
    started, resume = threading.Event(), threading.Event()

    def wait_and_encode(rows, names, stats):
        started.set()
        resume.wait()
        yield from simulated.SimulatedEncoder(cache, simulated.SimulatedJob(""))(rows, names, stats)

    maker = PartMaker(FeatureParts(cache, list(cache.feature_sets), wait_and_encode, "a run"))
    first = threading.Thread(target=maker.make, args=(3,))
    first.start()
    started.wait()
    maker.make(3)
    assert cache.missing_sets(3)
    resume.set()
    first.join()
    maker.close()
    assert not cache.missing_sets(3)
    assert not list(cache.path.rglob("*.partial"))


def test_parts_are_counted_for_the_run_that_their_records_name(connection, cache):
    job = simulated.SimulatedJob(str(cache.path), failing=5)
    for job_of, part in ((job, 1), (simulated.SimulatedJob(str(cache.path)), 2)):
        maker = job_of.open()
        maker.make(part)
        maker.close()
    none_may_fail = FailureCheck(cache, PARTS, FailureLimit(count=0), cache.path)
    with pytest.raises(InputError, match="1 of 40 images could not be read"):
        run_parts(connection, job, written(job, cache, RunMonitor(PART_SIZE, 1), none_may_fail), [1])
    monitor = RunMonitor(IMAGES, len(PARTS))
    run_parts(connection, job, written(job, cache, monitor), PARTS)
    stats = monitor.stats
    assert (stats.parts, stats.parts_of_others, stats.images) == (len(PARTS) - 1, 1, IMAGES - PART_SIZE)
    assert stats.failures.total == 1


def test_a_part_claimed_by_another_run_is_written_when_that_run_is_dead(
    connection, cache, undisturbed, monkeypatch, caplog
):
    monkeypatch.setattr(run_module, "CLAIMED_SECONDS", 0.05)
    caplog.set_level("INFO")
    with Claims(cache.storage) as others:
        others.claim(4)
        run = Run(connection, cache, 0)
        run.wait_until_written(len(PARTS) - 1)
        while "waiting for 1 parts" not in caplog.text:
            time.sleep(0.01)
    assert run.end().parts == len(PARTS)
    assert_complete(cache, undisturbed)


class Cable:
    """A proxy to a local port; `cut` breaks its connections."""

    def __init__(self, port: int) -> None:
        self._port, self._ends = port, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):  # already broken
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            near, far = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._port))
            self._ends += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def test_a_broken_connection_to_the_scheduler_is_renewed_and_every_part_counts_once(connection, cache, undisturbed):
    cable = Cable(int(connection.address.rpartition(":")[2]))
    with connected(f"tcp://127.0.0.1:{cable.port}") as through_cable:
        run = Run(through_cable, cache, 0.05)
        for parts in (1, 3, 5):
            run.wait_until_written(parts)
            cable.cut()
        stats = run.end()
    assert (stats.parts, stats.images, stats.parts_of_others) == (len(PARTS), IMAGES, 0)
    assert_complete(cache, undisturbed)


def test_a_worker_with_a_full_disk_is_retired_and_if_all_disks_are_full_the_run_fails(cache, undisturbed, caplog):
    with connected("local:3") as connection:
        connection.client.wait_for_workers(3)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(workers, size):
            connection.client.run(resource.setrlimit, resource.RLIMIT_FSIZE, (size, hard), workers=workers)

        first, *others = connection.client.nthreads()
        limit([first], 600)  # bytes: more than a claim, less than a part
        assert Run(connection, cache, 0.005).end().parts == len(PARTS)
        assert f"worker {first} is retired" in caplog.text
        assert_complete(cache, undisturbed)
        limit(others, 600)
        for record in (cache.path / "parts/sam").iterdir():
            record.unlink()
        with pytest.raises(CacheError, match=r"part . could not be written: File too large") as error:
            Run(connection, cache, 0.005).end()
        assert "\n" not in str(error.value)
        limit(None, soft)
        Run(connection, cache, 0.0).end()
    assert_complete(cache, undisturbed)


def test_a_function_runs_on_one_worker_and_a_failure_to_start_it_is_one_line(connection):
    assert run_once(connection, len, "abc") == 3

    def fails(task):
        raise ModuleNotFoundError("No module named 'regionspot'")

    with pytest.raises(
        CacheError, match=r"ModuleNotFoundError: No module .* need the same versions of regionspot"
    ) as error:
        run_once(connection, fails, 1)
    assert "\n" not in str(error.value)


def test_a_part_that_kills_workers_ends_the_run_and_is_named(connection, cache):
    with pytest.raises(CacheError, match=r"part (\d or )?4( or \d)?: 4 workers died while running it") as error:
        Run(connection, cache, 0, deadly=17).end()
    assert "\n" not in str(error.value)
    pids(connection, 3)


@pytest.mark.parametrize("text", ["", "locals", "local:", "local:0", "local:-1", "host:8786", "tcp://", "3"])
def test_an_invalid_scheduler_is_refused(text):
    with pytest.raises(InputError, match="expected none, local, local:8"):
        check_scheduler(text)


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("regionspot.pipeline.distributed.cluster.CONNECT_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"tcp://127.0.0.1:9: no scheduler answers"), connected("tcp://127.0.0.1:9"):
        pass


def test_each_local_worker_gets_a_gpu(connection):
    assert cluster_module.local_workers("local") == 2
    pids(connection, 3)
    by_worker = connection.client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    assert sorted(by_worker.values()) == ["4", "4", "GPU-5"]


@pytest.mark.parametrize(
    ("environment", "omp", "mkl"),
    [
        ({}, "2", "2"),
        ({"OMP_NUM_THREADS": "1"}, "1", "1"),  # MKL follows it, or features would be rounded differently
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "4"}, "3", "4"),
    ],
)
def test_local_workers_share_the_cores_unless_the_user_sets_threads(monkeypatch, environment, omp, mkl):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert thread_counts(3) == {"OMP_NUM_THREADS": omp, "MKL_NUM_THREADS": mkl}


class Cluster:
    """A dask scheduler and workers in processes of their own, as on other machines."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self._folder, self._host = folder, host
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "DASK_LOGGING__DISTRIBUTED": "critical"}
        self._environment |= {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s"}
        self.processes: list[subprocess.Popen] = []

    def _start(self, what: str, *options: str, inside: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [*inside, sys.executable, "-m", f"distributed.cli.dask_{what}", *options]
        log = (self._folder / "dask.log").open("ab")
        self.processes.append(subprocess.Popen(command, env=self._environment, stdout=log, stderr=log))
        return self.processes[-1]

    def scheduler(self, port: int = 0, silent_seconds: int = 300) -> subprocess.Popen:
        self._environment["DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL"] = f"{silent_seconds}s"
        file = self._folder / "scheduler.json"
        file.unlink(missing_ok=True)
        started = self._start(
            "scheduler", "--host", self._host, "--port", str(port), "--no-dashboard", "--scheduler-file", str(file)
        )
        while not file.exists() or not file.read_bytes():
            assert started.poll() is None, (self._folder / "dask.log").read_text()
            time.sleep(0.01)
        self.address = json.loads(file.read_bytes())["address"]
        return started

    def worker(self, inside: tuple[str, ...] = ()) -> subprocess.Popen:
        options = ("--nthreads", "2", "--memory-limit", "0", "--no-nanny", "--no-dashboard")
        return self._start("worker", self.address, *options, inside=inside)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    started = Cluster(tmp_path)
    yield started
    started.end()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_run_is_resumed_after_the_scheduler_was_killed(cluster, cache, undisturbed, seed, stress_result):
    rng, begun = random.Random(seed), time.monotonic()
    scheduler = cluster.scheduler()
    port = int(cluster.address.rpartition(":")[2])
    workers = [cluster.worker(), cluster.worker()]
    with connected(cluster.address) as connection:
        run = Run(connection, cache, 0.02)
        run.wait_until_written(rng.randrange(1, 6))
        scheduler.kill()
        with pytest.raises(CacheError, match=r"the scheduler is gone; .* run the same command again to resume"):
            run.end()
    if rng.random() < 0.5:
        for worker in workers:
            worker.kill()
    cluster.scheduler(port)
    cluster.worker()
    with connected(cluster.address) as connection:
        Run(connection, cache, 0.0).end()
    assert_complete(cache, undisturbed)
    stress_result(seeds=[seed], seconds=time.monotonic() - begun, schedulers=1, lost=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4))
def test_workers_are_killed_frozen_and_woken(tmp_path, undisturbed, monkeypatch, seed, stress_result):
    rng, counts, begun = random.Random(seed), Counter(), time.monotonic()
    monkeypatch.setattr(cluster_module, "WORKER_TTL_SECONDS", 2.0)
    with connected("local:4") as connection:
        for number in range(4):
            cache = simulated.make_cache(tmp_path / f"{number}.zarr", IMAGES, PART_SIZE)
            workers, frozen = pids(connection, 4), list[int]()
            run = Run(connection, cache, rng.choice((0.01, 0.03)))
            for moment in sorted(rng.sample(PARTS, 3)):
                run.wait_until_written(moment)
                victim = rng.choice(workers)
                workers.remove(victim)
                if rng.random() < 0.5 and len(frozen) < 2:
                    os.kill(victim, signal.SIGSTOP)
                    frozen.append(victim)
                    counts["frozen"] += 1
                else:
                    os.kill(victim, signal.SIGKILL)
                    counts["killed"] += 1
            if rng.random() < 0.5:
                wake(frozen)
            counts["parts"] += run.end().parts
            assert_complete(cache, undisturbed)
            wake(frozen)
            pids(connection, 4)
            while any(path.name[0].isdigit() for path in (cache.path / "claims").iterdir()):
                with Claims(cache.storage):
                    time.sleep(0.05)
            assert_complete(cache, undisturbed)
            FeatureCache.open(cache.path, "a")  # removes the partial files of killed writers, as every run does
            assert not list(cache.path.rglob("*.partial"))
            counts["caches"] += 1
    stress_result(seeds=[seed], seconds=time.monotonic() - begun, lost=0, **counts)


def wake(frozen: list[int]) -> None:
    for pid in frozen:
        with suppress(ProcessLookupError):  # its nanny has killed it
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_frozen_worker_without_a_nanny_loses_its_parts_and_leaves_them_alone_when_it_wakes(
    cluster, cache, undisturbed, monkeypatch, seed, stress_result
):
    begun = time.monotonic()
    monkeypatch.setattr(run_module, "Claims", partial(Claims, dead_after=3.0))
    cluster.scheduler(silent_seconds=3)
    workers = [cluster.worker() for _ in range(2)]
    with connected(cluster.address) as connection:
        connection.client.wait_for_workers(2)
        run = Run(connection, cache, 0.03)
        run.wait_until_written(2 + seed)
        workers[0].send_signal(signal.SIGSTOP)
        assert run.end().parts == len(PARTS)
    assert_complete(cache, undisturbed)
    workers[0].send_signal(signal.SIGCONT)
    while any(path.name[0].isdigit() for path in (cache.path / "claims").iterdir()) or list(
        cache.path.rglob("*.partial")
    ):
        time.sleep(0.01)
    assert_complete(cache, undisturbed)
    stress_result(seeds=[seed], seconds=time.monotonic() - begun, frozen=1, lost=0)


@pytest.fixture
def host():
    """A network namespace that acts as another machine: `ip netns exec NAME ...`, with a link that can be cut."""
    name = f"rs{os.getpid()}"
    try:
        for arguments in (
            f"netns add {name}",
            f"link add {name}a type veth peer name {name}b netns {name}",
            f"addr add 10.231.7.1/30 dev {name}a",
            f"link set {name}a up",
            f"-n {name} addr add 10.231.7.2/30 dev {name}b",
            f"-n {name} link set {name}b up",
            f"-n {name} link set lo up",
        ):
            subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not allow network namespaces: {getattr(error, 'stderr', error)}")
    yield name
    subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_worker_is_cut_off_from_the_network_and_connected_again(
    tmp_path, host, cache, undisturbed, seed, stress_result
):
    rng, begun = random.Random(seed), time.monotonic()
    cluster = Cluster(tmp_path, "10.231.7.1")
    try:
        cluster.scheduler()
        cluster.worker()
        away = cluster.worker(inside=("ip", "netns", "exec", host))
        with connected(cluster.address) as connection:
            connection.client.wait_for_workers(2)
            run = Run(connection, cache, 0.03)
            run.wait_until_written(rng.randrange(1, 5))
            subprocess.run(["ip", "link", "set", f"{host}a", "down"], check=True)
            if rng.random() < 0.5:
                run.wait_until_written(7)
                subprocess.run(["ip", "link", "set", f"{host}a", "up"], check=True)
            run.end()
            assert_complete(cache, undisturbed)
            subprocess.run(["ip", "link", "set", f"{host}a", "up"], check=True)
            # Either it joins again, or it gives up and exits, as a worker without a nanny does.
            while away.poll() is None and len(connection.client.nthreads()) < 2:
                time.sleep(0.05)
        assert_complete(cache, undisturbed)
    finally:
        cluster.end()
    stress_result(seeds=[seed], seconds=time.monotonic() - begun, cut=1, lost=0)
