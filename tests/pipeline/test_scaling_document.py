"""The commands of docs/scaling.md, run as documented: each fills a cache with the bytes that one process writes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from makers import extracted_content

from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.tools.verify import verify
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.extract import extract
from regionspot.pipeline.toy.world import make_toy_world

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_toy_world(tmp_path_factory.mktemp("world"), 40)


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("one") / "c.zarr"
    backbones = Backbones.load("toy", device="cpu")
    cache = open_or_create(path, read_dataset("toy", world, "train"), backbones.feature_sets(), 4)
    extract(cache, image_folder_of("toy", world), backbones)
    return extracted_content(path)


def run_block(block: str, folder: Path) -> subprocess.CompletedProcess:
    # -m: job control, so that `kill %1` works as in a terminal.
    command = ["bash", "-e", "-m", "-c", block]
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result


def assert_complete(path: Path, one_process: dict[str, bytes]) -> None:
    report = verify(path)
    assert report.sound, report.text()
    assert not report.pending
    assert extracted_content(path) == one_process


@pytest.mark.slow
def test_the_commands_for_one_machine_write_what_one_process_writes(tmp_path, one_process):
    result = run_block(BLOCKS[0], tmp_path)
    assert_complete(tmp_path / "toy.zarr", one_process)
    assert "images" in result.stdout
    assert "2 workers" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_the_other_local_commands_write_what_one_process_writes(number, world, tmp_path, one_process):
    (tmp_path / "world").symlink_to(world)
    run_block(BLOCKS[number], tmp_path)
    (cache,) = tmp_path.glob("*.zarr")
    assert_complete(cache, one_process)


@pytest.mark.slow
def test_after_an_interrupt_workers_finish_their_parts_and_the_same_command_resumes(world, tmp_path, one_process):
    command = ["regionspot", "extract", "toy", "--data", str(world), "--cache", "c.zarr", "--preset", "toy"]
    command += ["--part-size", "4", "--scheduler", "local:1"]
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while run.poll() is None and not list(tmp_path.glob("c.zarr/parts/toy_clip/*.json")):
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # to the command and its workers, as a terminal does
    err = run.communicate()[1]
    assert run.returncode == 130, err
    assert "Traceback" not in err, err
    assert verify(tmp_path / "c.zarr").sound
    assert subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True).returncode == 0
    assert_complete(tmp_path / "c.zarr", one_process)
