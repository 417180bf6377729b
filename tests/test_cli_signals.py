"""Ctrl-C and SIGTERM end a command with one line, which says how to resume where it can be resumed.

Each command is a process of its own that gets a real signal: on a terminal by the character, on pipes by `kill`.
"""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regionspot.cache import FeatureCache
from regionspot.pipeline.toy.world import make_toy_world

AGAIN = "run the same command again to resume"
WITH_RESUME = "run the same command with --resume to resume"
PATIENCE = 120.0


@pytest.fixture(scope="module")
def large_world(tmp_path_factory) -> Path:
    """With enough images that no command is done before it can be stopped."""
    return make_toy_world(tmp_path_factory.mktemp("world"), 300, seed=1)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "c.zarr"
    words = ["extract", "toy", "--data", str(world), "--cache", str(path), "--preset", "toy", "--limit", "8"]
    subprocess.run([sys.executable, "-m", "regionspot.cli", *words], check=True, capture_output=True)
    return path


class Command:
    """A running `regionspot` command; `stop` sends it a signal and gives its exit code and what it said at last."""

    def __init__(self, words, environment: dict[str, str]) -> None:
        self.words = [sys.executable, "-m", "regionspot.cli", *map(str, words)]
        self.environment = {**os.environ, **environment}
        self._begin()

    def wait_until(self, is_so) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert self.is_running(), "the command ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.01)


class OnPipes(Command):
    def _begin(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.words, stdout=pipe, stderr=pipe, text=True, env=self.environment)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: signal.Signals) -> tuple[int, list[str]]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err.splitlines()


class OnATerminal(Command):
    def _begin(self) -> None:
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.execve(sys.executable, self.words, self.environment)

    def is_running(self) -> bool:
        return os.waitpid(self.pid, os.WNOHANG) == (0, 0)

    def stop(self, number: signal.Signals) -> tuple[int, list[str]]:
        if number == signal.SIGINT:
            os.write(self.terminal, b"\x03")  # the terminal makes a signal of it
        else:
            os.kill(self.pid, number)
        written = b""
        try:
            while piece := os.read(self.terminal, 65536):
                written += piece
        except OSError:
            pass  # the terminal has no other end any more
        os.close(self.terminal)
        status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(status), written.decode().replace("\r\x1b[K", "\n").splitlines()


WAYS = {
    "ctrl-c on a terminal": (OnATerminal, signal.SIGINT),
    "ctrl-c on pipes": (OnPipes, signal.SIGINT),
    "sigterm": (OnPipes, signal.SIGTERM),
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture
def start(way, home):
    """`start("extract", ...)` begins a command."""
    return lambda *words: way[0](words, {"REGIONSPOT_HOME": str(home), "OMP_NUM_THREADS": "1"})


@pytest.fixture
def stopped(way):
    """`stopped(command, advice)` stops a command and looks at how it ended."""
    number = way[1]
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]

    def stop(command: Command, advice: str) -> None:
        code, lines = command.stop(number)
        assert code == 128 + number, lines
        assert lines[-1] == f"regionspot: stopped by {name}{'; ' * bool(advice)}{advice}"
        assert not [line for line in lines if "Traceback" in line or "Error" in line or "Exception" in line], lines

    return stop


def test_extract_says_that_the_same_command_resumes(start, stopped, large_world, tmp_path):
    path = tmp_path / "c.zarr"
    words = ("extract", "toy", "--data", large_world, "--cache", path, "--preset", "toy", "--part-size", 4)
    command = start(*words, "--device", "cpu", "--localizer", "none")
    command.wait_until(lambda: list(path.glob("parts/toy_clip/*.json")))
    stopped(command, AGAIN)
    cache = FeatureCache.open(path)
    assert 0 < len(cache.pending_parts()) < cache.n_parts


def test_eval_lvis_says_that_the_same_command_resumes(start, stopped, large_world, tmp_path):
    words = ("eval-lvis", "--dataset", "toy", "--data", large_world, "--preset", "toy", "--baseline", "pooled")
    command = start(*words, "--out", tmp_path / "eval", "--templates", "plain", "--device", "cpu")
    command.wait_until(lambda: list(tmp_path.glob("eval/parts/*/identity.json")))
    stopped(command, AGAIN)


def test_train_says_that_it_resumes_with_resume(start, stopped, cache, tmp_path):
    words = ("train", "--cache", cache, "--preset", "toy", "--schedule", "toy", "--templates", "plain")
    command = start(*words, "--out", tmp_path / "run", "--iterations", 100_000, "--device", "cpu")
    command.wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    stopped(command, WITH_RESUME)


@pytest.mark.parametrize("way", ["ctrl-c on pipes"], indirect=True)
def test_a_stopped_demo_begins_no_further_stage_and_says_that_it_resumes(start, stopped, tmp_path):
    command = start("demo", tmp_path / "demo", "--pictures", 60)
    command.wait_until((tmp_path / "demo" / "train.zarr" / "zarr.json").exists)
    stopped(command, AGAIN)
    assert not (tmp_path / "demo" / "run").exists()


@pytest.mark.parametrize("way", ["ctrl-c on pipes"], indirect=True)
def test_a_command_that_does_not_resume_does_not_say_so(start, stopped, world, tmp_path):
    image, names = next((world / "photos" / "val").glob("*.jpg")), tmp_path / "names"
    os.mkfifo(names)
    writers = []

    def waits_for_names() -> bool:
        try:
            writers.append(os.open(names, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads it yet
            return False
        return True

    command = start("predict", image, "--checkpoint", "none", "--boxes", "1,2,3,4", "--names-file", names)
    command.wait_until(waits_for_names)
    stopped(command, "")
    os.close(*writers)
