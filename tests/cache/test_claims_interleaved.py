"""Claims under random interleavings: runs take turns at each single call to the storage.

Between two calls a run may be killed, or suspended for longer than CLAIM_SECONDS. Not, however, between `require_owned`
and the publication of the part, which claims do not cover and checksums are for; nor inside `release`, between the same
check and the removal of its claim, where a run that took over would lose its claim and give the part up.
"""

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from regionspot.cache.process import Process
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.writing import claims
from regionspot.cache.writing.claim_files import heartbeat, heartbeat_file
from regionspot.cache.writing.claims import CLAIM_SECONDS, Claims

PARTS, RUNS, AT_ONCE = range(2), 8, 3


class Killed(BaseException):
    """Not caught by any run."""


class InMemory(LocalStorage):
    """Files in a dict; every call waits for its run's turn."""

    def __init__(self, world):
        super().__init__(Path("memory"))
        self.files, self.wait_for_turn = {}, world.wait_for_turn

    def read(self, name):
        self.wait_for_turn()
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def size(self, name):
        return len(self.read(name))

    def list_files(self, folder):
        self.wait_for_turn()
        return [name.removeprefix(f"{folder}/") for name in list(self.files)]

    def write(self, name, data):
        self.wait_for_turn()
        self.files[name] = data

    def write_new(self, name, data):
        self.wait_for_turn()
        return self.files.setdefault(name, data) is data

    def remove(self, name):
        self.wait_for_turn()
        self.files.pop(name, None)

    def remove_abandoned(self, folder):
        self.wait_for_turn()


@dataclass
class Run:
    """A run: its thread and its state. Times are of the world's clock."""

    number: int
    thread: threading.Thread
    id: str = ""
    parked: bool = False
    killed: bool = False
    ended: bool = False
    publishing: bool = False
    releasing: bool = False
    sleeps_until: float = 0.0
    holds: dict[int, float] = field(default_factory=dict)  # time of the claim, by part

    def slept_since(self, moment):
        return self.killed or self.sleeps_until >= moment


class World:
    def __init__(self, seed):
        self.random, self.clock, self.beat, self.takeovers = random.Random(seed), 0.0, 0, 0
        self.storage = InMemory(self)
        self.runs: list[Run] = []
        self.done: dict[int, int] = {}
        self.turn = threading.Condition()
        self.moving: Run | None = None
        self.failure: BaseException | None = None

    def me(self):
        return next((run for run in self.runs if run.thread is threading.current_thread()), None)

    def wait_for_turn(self):
        me = self.me()
        if me is None:
            return  # the test itself
        with self.turn:
            me.parked = True
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.moving is me)
            self.moving, me.parked = None, False
        if me.killed:
            raise Killed

    def start(self):
        run = Run(len(self.runs), threading.Thread(target=self.live, daemon=True))
        self.runs.append(run)
        with self.turn:
            run.thread.start()
            self.turn.wait_for(lambda: run.parked)

    def live(self):
        me = self.me()
        try:
            self.wait_for_turn()
            with Claims(self.storage) as ours:
                me.id = ours.run
                while len(self.done) < len(PARTS):
                    for part in PARTS:
                        self.work_on(part, me, ours)
                    self.wait_for_turn()
        except Killed:
            pass
        except BaseException as failure:
            self.failure = failure
        with self.turn:
            me.ended = True
            self.turn.notify_all()

    def work_on(self, part, me, ours):
        reached = self.clock
        if part in self.done or not ours.claim(part):
            return
        self.require_alone(part, me, reached)
        me.holds[part] = reached
        if part not in self.done and self.random.random() < 0.6:  # else like a failed run
            for _ in range(self.random.randrange(8)):
                self.wait_for_turn()
            me.publishing = True
            if ours.is_owned(part):
                assert part not in self.done, f"run {self.done[part]} did part {part}, and now run {me.number} does"
                self.done[part] = me.number
            me.publishing = False
        del me.holds[part]
        me.releasing = True
        ours.release(part)
        me.releasing = False

    def require_alone(self, part, me, reached):
        for other in self.runs:
            if part in other.holds:
                self.takeovers += 1
                at_fault = not (other.slept_since(other.holds[part]) or me.slept_since(reached))
                assert not at_fault, f"runs {other.number} and {me.number} have part {part} at once, both awake"

    def go(self):
        """Schedule the runs until every part is done and every run has ended."""
        for _ in range(AT_ONCE):
            self.start()
        while alive := [run for run in self.runs if not run.ended]:
            self.clock += self.random.uniform(0, 2)
            self.befall(self.random.choice(alive), sum(not run.killed for run in alive))
            awake = [run for run in alive if run.killed or run.sleeps_until <= self.clock]
            if awake:
                self.show_life(awake)
                self.give_turn(self.random.choice(awake))
            else:
                self.clock = min(run.sleeps_until for run in alive)
            if len(alive) < AT_ONCE and len(self.runs) < RUNS and len(self.done) < len(PARTS):
                self.start()

    def befall(self, run, others):
        fate = self.random.random()
        if run.publishing or run.killed or run.sleeps_until > self.clock:
            return
        if fate < 0.01 and others > 1:
            run.killed = True
        elif fate < 0.08 and not run.releasing:
            run.sleeps_until = self.clock + self.random.uniform(0.8, 1.5) * CLAIM_SECONDS

    def show_life(self, awake):
        self.beat += 1
        for run in awake:
            if run.id and not run.killed:
                self.storage.files[heartbeat_file(run.id)] = heartbeat(run.id, self.beat)

    def give_turn(self, run):
        with self.turn:
            self.moving = run
            run.parked = False
            self.turn.notify_all()
            self.turn.wait_for(lambda: run.parked or run.ended)
        if self.failure is not None:
            raise self.failure

    def this_process(self):
        me = self.me()
        number = -1 if me is None else me.number
        return Process("here" if number % 2 else "elsewhere", "", "", number, 0)

    def is_gone(self, process):
        return process.host == "here" and process.pid >= 0 and self.runs[process.pid].killed


def rounds(seeds, monkeypatch):
    """Run one world per seed; the number of take-overs."""
    takeovers = 0
    for seed in seeds:
        world = World(seed)
        monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=lambda world=world: world.clock))
        monkeypatch.setattr(claims, "this_process", world.this_process)
        monkeypatch.setattr(Process, "is_gone", lambda process, world=world: world.is_gone(process))
        monkeypatch.setattr(Claims, "_write_heartbeats", lambda _: None)  # the world writes all heartbeats
        try:
            world.go()
            assert world.done.keys() == set(PARTS)
            with Claims(world.storage):
                world.clock += CLAIM_SECONDS + 1  # plus one, because of rounding of float sums
            assert not world.storage.files
        except BaseException as failure:
            failure.add_note(f"seed {seed}")
            raise
        takeovers += world.takeovers
    return takeovers


def test_no_part_has_two_running_owners_and_each_is_done_once(monkeypatch):
    assert rounds(range(40), monkeypatch) > 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 5))
def test_no_part_has_two_running_owners_in_full(seed, monkeypatch, stress_result, stress_size):
    started, number = time.monotonic(), stress_size(2500)
    takeovers = rounds(range(seed * 10_000, seed * 10_000 + number), monkeypatch)
    assert takeovers
    stress_result(seeds=[seed], seconds=time.monotonic() - started, orders=number, takeovers=takeovers)
