"""Ctrl-C and SIGTERM end a command with one line, which says how to resume if it can be resumed.

Each command is a process that gets a real signal: on a terminal by the character, otherwise by `kill`.
"""

import os
import signal
from pathlib import Path

import pytest
from forked import ForkedCommand

from regionspot.cache import FeatureCache
from regionspot.pipeline.toy.world import make_toy_world

AGAIN = "run the same command again to resume"
WITH_RESUME = "run the same command with --resume to resume"
WAYS = {
    "ctrl-c on a terminal": (True, signal.SIGINT),
    "ctrl-c on pipes": (False, signal.SIGINT),
    "sigterm": (False, signal.SIGTERM),
}


@pytest.fixture(scope="module")
def large_world(tmp_path_factory) -> Path:
    """With enough images that no command finishes before it is stopped."""
    return make_toy_world(tmp_path_factory.mktemp("world"), 200, seed=1)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "c.zarr"
    arguments = ["extract", "toy", "--data", world, "--cache", path, "--preset", "toy", "--limit", "8"]
    assert ForkedCommand(*arguments).end()[0] == 0
    return path


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture
def start(way, home):
    """`start("extract", ...)` starts a command."""
    return lambda *arguments: ForkedCommand(*arguments, terminal=way[0], environment={"REGIONSPOT_HOME": str(home)})


@pytest.fixture
def stopped(way):
    """`stopped(command, advice)` stops a command and checks how it ended."""
    number = way[1]
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]

    def stop(command: ForkedCommand, advice: str) -> None:
        code, lines = command.stop(number)
        assert code == 128 + number, lines
        assert lines[-1] == f"regionspot: stopped by {name}{'; ' * bool(advice)}{advice}"
        assert not [line for line in lines if "Traceback" in line or "Error" in line or "Exception" in line], lines

    return stop


def test_a_stopped_extract_says_that_the_same_command_resumes(start, stopped, large_world, tmp_path):
    path = tmp_path / "c.zarr"
    arguments = ("extract", "toy", "--data", large_world, "--cache", path, "--preset", "toy", "--part-size", 4)
    command = start(*arguments, "--device", "cpu", "--localizer", "none")
    command.wait_until(lambda: list(path.glob("parts/toy_clip/*.json")))
    stopped(command, AGAIN)
    cache = FeatureCache.open(path)
    assert 0 < len(cache.pending_parts()) < cache.n_parts


def test_a_stopped_eval_lvis_says_that_the_same_command_resumes(start, stopped, large_world, tmp_path):
    arguments = ("eval-lvis", "--dataset", "toy", "--data", large_world, "--preset", "toy", "--baseline", "pooled")
    command = start(*arguments, "--out", tmp_path / "eval", "--templates", "plain", "--device", "cpu")
    command.wait_until(lambda: list(tmp_path.glob("eval/parts/*/identity.json")))
    stopped(command, AGAIN)


def test_a_stopped_train_says_that_resume_resumes(start, stopped, cache, tmp_path):
    arguments = ("train", "--cache", cache, "--preset", "toy", "--schedule", "toy", "--templates", "plain")
    command = start(*arguments, "--out", tmp_path / "run", "--iterations", 100_000, "--device", "cpu")
    command.wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    stopped(command, WITH_RESUME)


@pytest.mark.parametrize("way", ["ctrl-c on pipes"], indirect=True)
def test_a_stopped_demo_starts_no_further_stage_and_says_that_it_resumes(start, stopped, tmp_path):
    command = start("demo", tmp_path / "demo", "--pictures", 60)
    command.wait_until((tmp_path / "demo" / "train.zarr" / "zarr.json").exists)
    stopped(command, AGAIN)
    assert not (tmp_path / "demo" / "run").exists()


@pytest.mark.parametrize("way", ["ctrl-c on pipes"], indirect=True)
def test_a_command_that_cannot_be_resumed_does_not_say_so(start, stopped, world, tmp_path):
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
