"""The commands of docs/scaling.md, run as they stand there: each fills a cache with what one process writes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.tools.verify import verify
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.extract import extract
from regionspot.pipeline.toy.world import make_toy_world

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
WHO_AND_WHEN = ("parts/", "claims/", "runs/", "summary.md")


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def content(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(WHO_AND_WHEN)}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_toy_world(tmp_path_factory.mktemp("world"), 40)


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("one") / "c.zarr"
    backbones = Backbones.load("toy", device="cpu")
    cache = open_or_create(path, read_dataset("toy", world, "train"), backbones.feature_sets(), 4)
    extract(cache, image_folder_of("toy", world), backbones)
    return content(path)


def must_run(block: str, folder: Path) -> subprocess.CompletedProcess:
    # -m: jobs of their own, so that `kill %1` works as in a terminal.
    command = ["bash", "-e", "-m", "-c", block]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def must_equal(path: Path, one_process: dict[str, bytes]) -> None:
    report = verify(path)
    assert report.sound, report.text()
    assert not report.pending
    assert content(path) == one_process


def test_the_commands_for_one_machine_write_what_one_process_writes(tmp_path, one_process):
    done = must_run(BLOCKS[0], tmp_path)
    must_equal(tmp_path / "toy.zarr", one_process)
    assert "images" in done.stdout
    assert "2 workers" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_the_other_local_commands_write_what_one_process_writes(number, world, tmp_path, one_process):
    (tmp_path / "world").symlink_to(world)
    must_run(BLOCKS[number], tmp_path)
    (cache,) = tmp_path.glob("*.zarr")
    must_equal(cache, one_process)


@pytest.mark.slow
def test_an_interrupt_lets_workers_end_what_they_hold_and_the_same_command_goes_on(world, tmp_path, one_process):
    command = ["regionspot", "extract", "toy", "--data", str(world), "--cache", "c.zarr", "--preset", "toy"]
    command += ["--part-size", "4", "--scheduler", "local:1"]
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while run.poll() is None and not list(tmp_path.glob("c.zarr/parts/toy_clip/*.json")):
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the command and to its workers
    words = run.communicate()[1]
    assert run.returncode == 130, words
    assert "Traceback" not in words, words
    assert verify(tmp_path / "c.zarr").sound
    assert subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True).returncode == 0
    must_equal(tmp_path / "c.zarr", one_process)
