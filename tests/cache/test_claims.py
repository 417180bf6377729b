"""A part has one owner at a time, also when runs are killed or suspended or clocks are wrong."""

import errno
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
from makers import fork

from regionspot.cache import CacheError
from regionspot.cache.process import this_process
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.writing import claim_files, claims
from regionspot.cache.writing.claims import Claims

BEAT = 0.02  # seconds


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a busy disk must not delay heartbeats
    return LocalStorage(tmp_path)


@pytest.fixture
def elsewhere(monkeypatch):
    """Processes started from now on look like those of another machine."""
    there = replace(this_process(), host="elsewhere", boot="another")
    monkeypatch.setattr(claims, "this_process", lambda: replace(there, pid=os.getpid()))


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of this process; only the test moves it, so a slow machine kills no run."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(claims, "time", clock)
    return clock


def claims_of(storage, **settings):
    return Claims(storage, heartbeat_seconds=BEAT, **settings)


def files(storage):
    return sorted(name for name in storage.list_files("claims") if not name.endswith(".partial"))


@contextmanager
def child(function):
    """Run `function(say)` in a child process; yields its pid and a function that reads its next byte."""
    read_end, write_end = os.pipe()
    pid = fork(lambda: function(lambda byte: os.write(write_end, byte)))
    os.close(write_end)
    try:
        yield pid, lambda: os.read(read_end, 1)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read_end)


@contextmanager
def often_switching():
    """Switch threads as often as possible, to expose race conditions."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def holds_part_0(storage):
    """In a child: claim part 0 and wait to be killed."""

    def run(say):
        with claims_of(storage) as ours:
            say(b"y" if ours.claim(0) else b"n")
            time.sleep(60)

    return run


def wait_for_a_beat(storage, run=None):
    """Wait for the next heartbeat of a run (default: the owner of part 0)."""
    file = f"run-{run or json.loads(storage.read('claims/00000.json'))['run']}.json"

    def counter():
        return storage.read(f"claims/{file}") if file in files(storage) else None

    before = counter()
    while counter() in (None, before):
        time.sleep(BEAT / 4)


def kill(pid):
    """Kill a child without waiting for it, so that it stays a zombie."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_claimed_part_is_refused_to_other_runs_until_its_release(storage):
    with claims_of(storage) as one, claims_of(storage) as other:
        assert one.claim(3)
        assert not other.claim(3)
        assert other.claim(4)
        assert other.owner(3) == this_process()
        one.release(3)
        assert other.claim(3)
        assert other.is_owned(3)
        assert not one.is_owned(3)
    assert files(storage) == []


def test_a_run_that_fails_releases_all_claims(storage):
    def claim_two_and_fail():
        with claims_of(storage) as ours:
            assert ours.claim(1)
            assert ours.claim(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        claim_two_and_fail()
    assert files(storage) == []


def test_threads_of_one_run_exclude_each_other(storage, elsewhere, clock, monkeypatch):
    with claims_of(storage) as ours, claims_of(storage) as other:
        assert ours.claim(0)
        assert not ours.claim(0)
        # Nor when its heartbeats are lost, so that other runs think it is dead.
        wait_for_a_beat(storage, ours.run)
        monkeypatch.setattr(storage, "write", lambda name, data: None)
        for _ in range(2):
            assert not ours.claim(0)
            clock.now += claims.CLAIM_SECONDS
        assert ours.is_owned(0)
        assert not other.claim(0)  # its heartbeat stops from now on
        clock.now += claims.CLAIM_SECONDS
        assert other.claim(0)
        assert not ours.claim(0), "its thread has not found out yet"
        ours.release(0)
        assert other.is_owned(0)


def test_of_many_threads_that_claim_a_part_at_once_one_gets_it(storage):
    parts, threads = range(100), 4
    together = threading.Barrier(threads)

    def reach(_):
        got = []
        for part in parts:
            together.wait(10)
            if ours.claim(part):
                got.append(part)
        return got

    with claims_of(storage) as ours, ThreadPoolExecutor(threads) as pool, often_switching():
        assert sorted(chain(*pool.map(reach, range(threads)))) == list(parts)
        assert all(ours.is_owned(part) for part in parts)


def test_claims_of_a_killed_process_of_this_machine_are_free_at_once(storage, clock):
    with child(holds_part_0(storage)) as (pid, hear), claims_of(storage) as ours:
        assert hear() == b"y"
        assert not ours.claim(0)
        kill(pid)
        assert ours.claim(0)
    assert files(storage) == []


def test_files_of_killed_processes_are_removed_by_the_next_run(storage):
    with child(holds_part_0(storage)) as (pid, hear):
        assert hear() == b"y"
        kill(pid)
        with claims_of(storage) as ours:
            assert set(files(storage)) <= {f"run-{ours.run}.json"}


def test_a_run_on_another_machine_is_dead_when_its_heartbeat_stops_and_not_before(storage, elsewhere, clock):
    with child(holds_part_0(storage)) as (pid, hear), claims_of(storage) as ours:
        assert hear() == b"y"
        for _ in range(10):
            assert not ours.claim(0)
            clock.now += 0.6 * claims.CLAIM_SECONDS
            wait_for_a_beat(storage)
        kill(pid)
        assert not ours.claim(0)  # sees the last heartbeat
        clock.now += claims.CLAIM_SECONDS - 1
        assert not ours.claim(0)
        clock.now += 1
        assert ours.claim(0)
        assert ours.is_owned(0)
    assert files(storage) == []


def test_setting_the_clock_changes_nothing_about_who_is_dead(storage, elsewhere, clock, monkeypatch):
    today = SimpleNamespace(now=1e9)
    monkeypatch.setattr(time, "time", lambda: today.now)
    with child(holds_part_0(storage)) as (pid, hear), claims_of(storage) as ours:
        assert hear() == b"y"
        for jump in (-1e8, 3e8, -1e9, 1e6):
            today.now += jump
            clock.now += 0.6 * claims.CLAIM_SECONDS
            wait_for_a_beat(storage)
            assert not ours.claim(0)
        kill(pid)
        today.now = 0.0
        assert not ours.claim(0)
        clock.now += claims.CLAIM_SECONDS
        assert ours.claim(0)


def test_a_suspended_run_detects_a_take_over_before_it_publishes(storage, clock):
    asked, ask = os.pipe()

    def works_and_publishes(say):
        with claims_of(storage) as ours:
            say(b"y" if ours.claim(0) and ours.is_owned(0) else b"n")
            os.read(asked, 1)
            try:
                ours.require_owned(0)
                say(b"p")
            except CacheError as error:
                say(b"l" if "part 0 was taken over by" in str(error) else b"?")
            ours.release(0)

    with child(works_and_publishes) as (pid, hear), claims_of(storage) as ours:
        assert hear() == b"y"
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        assert not ours.claim(0), "it is there, only asleep"
        clock.now += claims.CLAIM_SECONDS
        assert ours.claim(0)
        os.kill(pid, signal.SIGCONT)
        os.write(ask, b".")
        assert hear() == b"l"
        assert hear() == b"", "it ended by itself"
        assert ours.is_owned(0), "letting go of what was lost must not free it"
    assert files(storage) == []


def test_a_suspended_watcher_does_not_count_its_own_pause_against_others(storage, elsewhere, clock):
    class Drowsy(LocalStorage):
        def read(self, name):
            data = super().read(name)
            clock.now += 10 * claims.CLAIM_SECONDS if "run-" in name else 0
            return data

    with claims_of(storage) as other, claims_of(Drowsy(storage.folder)) as ours:
        assert other.claim(0)
        for _ in range(3):
            wait_for_a_beat(storage)
            assert not ours.claim(0)
        assert clock.now > 20 * claims.CLAIM_SECONDS


def no_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("claimed_by", ["nobody", "dead"])
def test_of_many_processes_that_claim_a_part_at_once_one_gets_it(storage, claimed_by, links, monkeypatch):
    parts, runs = range(20), 6
    gate, start = os.pipe()
    if not links:
        monkeypatch.setattr(os, "link", no_links)

    def reach(say):
        with claims_of(storage) as ours:
            say(b"r")
            os.read(gate, 1)
            for part in parts:
                if ours.claim(part):
                    say(bytes([part]))
            say(b"\xff")
            time.sleep(60)  # keeps its claims

    if claimed_by == "dead":
        dead = replace(this_process(), started=1)
        for part in parts:
            storage.write_new(f"claims/{part:05d}.json", claim_files.Claim(f"{part:x}", "dead", dead).to_json())
        # No clean-up before the race.
        monkeypatch.setattr(Claims, "_sweep", lambda *_: None)
    with ExitStack() as stack:
        racers = [stack.enter_context(child(reach)) for _ in range(runs)]
        assert [hear() for _, hear in racers] == [b"r"] * runs
        os.write(start, b"." * runs)
        got = [byte[0] for _, hear in racers for byte in iter(hear, b"\xff")]
    assert sorted(got) == list(parts)


def test_take_over_frees_existing_claims_and_no_later_ones(storage, elsewhere, clock):
    with claims_of(storage) as other:
        assert other.claim(0)
        with claims_of(storage, take_over=True) as ours:
            assert other.claim(1)
            assert ours.claim(0)
            assert not ours.claim(1)
            assert other.is_owned(1)
            with pytest.raises(CacheError, match=r"part 0 was taken over by elsewhere:\d+ while this run"):
                other.require_owned(0)


def test_a_damaged_claim_times_out(storage, clock):
    storage.write("claims/00000.json", b"{")
    with claims_of(storage) as ours, claims_of(storage) as other:
        assert not ours.claim(0)
        clock.now += claims.CLAIM_SECONDS
        assert ours.claim(0)
        assert not other.claim(0)
    assert files(storage) == []


@pytest.mark.parametrize("claimed_again", [False, True])
def test_two_threads_may_release_a_part_at_once(storage, claimed_again):
    """As a run that ends while one of its threads gives a part up, for example on a full disk."""

    class Meanwhile(LocalStorage):
        def remove(self, name):
            super().remove(name)
            if name.startswith("claims/00002") and not done:
                done.append(name)
                ThreadPoolExecutor(1).submit(other_thread).result()

    def other_thread():
        own.release(2)
        if claimed_again:
            assert own.claim(2)

    done = []
    with claims_of(Meanwhile(storage.folder)) as own:
        assert own.claim(2)
        own.release(2)
        assert done
        assert own.is_owned(2) == claimed_again
    assert files(storage) == []


def test_a_link_written_after_its_chain_was_released_owns_nothing(storage, monkeypatch):
    dead = claim_files.Claim("a1", "dead", replace(this_process(), started=1))
    with claims_of(storage) as slow, claims_of(storage) as quick, claims_of(storage) as third:
        storage.write_new("claims/00000.json", dead.to_json())
        write_new = storage.write_new

        def late(name, data):
            monkeypatch.undo()
            assert quick.claim(0)
            quick.release(0)
            assert third.claim(0)
            return write_new(name, data)

        monkeypatch.setattr(storage, "write_new", late)
        assert not slow.claim(0)
        assert third.is_owned(0)
        assert [name for name in files(storage) if not name.startswith("run-")] == ["00000.json"]


def test_a_lost_response_does_not_lose_the_claim(storage, monkeypatch):
    write_new = storage.write_new
    monkeypatch.setattr(storage, "write_new", lambda name, data: write_new(name, data) and False)
    with claims_of(storage) as ours:
        assert ours.claim(0)
        assert ours.is_owned(0)


def test_a_storage_error_is_reported_in_one_line(tmp_path):
    (tmp_path / "claims").write_text("a file")
    with pytest.raises(CacheError, match=r"claims/ cannot be used: .*fix the disk"), claims_of(LocalStorage(tmp_path)):
        pass


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("released", [False, True])
def test_a_claim_that_failed_with_the_storage_can_be_claimed_again_by_the_same_run(
    storage, monkeypatch, written, released
):
    """It may be on disk or not, and its release may fail as well; a run that waited for itself would never end."""
    write_new, remove = storage.write_new, storage.remove

    def failing_write(name, data):
        if written:
            write_new(name, data)
        raise OSError(errno.ENOENT, "No such file or directory")

    def failing_remove(name):
        raise OSError(errno.EIO, "Input/output error")

    with claims_of(storage) as ours, claims_of(storage) as other:
        monkeypatch.setattr(storage, "write_new", failing_write)
        if not released:
            monkeypatch.setattr(storage, "remove", failing_remove)
        with pytest.raises(CacheError, match="No such file or directory"):
            ours.claim(3)
        monkeypatch.setattr(storage, "write_new", write_new)
        monkeypatch.setattr(storage, "remove", remove)
        assert ours.claim(3)
        assert ours.is_owned(3)
        assert not other.claim(3)
        ours.release(3)
        assert other.claim(3)
    assert files(storage) == []
