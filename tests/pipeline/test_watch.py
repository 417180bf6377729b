"""A run as it is seen from outside: summary.md and the records behind it, and metrics over HTTP."""

import socket
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from regionspot.cache import FeatureCache
from regionspot.cache.errors import InputError
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.tools.verify import verify
from regionspot.commands import extract as cli_extract
from regionspot.pipeline.backbones import dtypes
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction import extract
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.reporting import bottleneck, summary_page
from regionspot.pipeline.reporting.bottleneck import find_bottleneck
from regionspot.pipeline.reporting.failure_kinds import FailureCount, kind_of
from regionspot.pipeline.reporting.run_monitor import RunMonitor
from regionspot.pipeline.reporting.run_summary import parse_run

IMAGES = 6


@pytest.fixture(scope="module")
def manifest(world):
    """Of 6 images, of which row 4 is not there and row 1 is no image."""
    found = read_dataset("toy", world, "train").head(IMAGES)
    paths = found.paths.copy()
    paths[4] = "train/not-there.jpg"
    paths[1] = "../toy_train.json"
    return replace(found, paths=paths)


@pytest.fixture(scope="module")
def backbones() -> Backbones:
    return Backbones.load("toy", device="cpu", encoders=("none",))


@pytest.fixture
def cache(tmp_path, manifest, backbones) -> FeatureCache:
    return open_or_create(tmp_path / "c.zarr", manifest, backbones.feature_sets(), 2)


def run(cache, world, backbones, watch=None, parts=None):
    config = ExtractConfig(batch_size=2, max_failures=FailureLimit(count=len(cache)), parts=parts)
    return extract.extract(cache, image_folder_of("toy", world), backbones, config, watch)


def test_a_run_leaves_a_summary_of_what_is_there_what_failed_and_how_fast_it_was(cache, world, backbones, manifest):
    did = run(cache, world, backbones)
    page = (cache.path / "summary.md").read_text()
    assert (did.images, did.failed, did.regions) == (IMAGES, 2, int(manifest.offsets[-1]))
    assert did.bytes == sum(sum(cache.record(part, "toy_sam").files.values()) for part in range(3))
    assert "**complete**" in page
    assert "| does not exist | 1 | train/not-there.jpg |" in page
    assert "| 0 | 1 |" in page
    assert "| 2 | 1 |" in page
    for words in ("# c.zarr", "## Runs", "cores", "torch 2", "weights of toy_sam | package", "| encode |"):
        assert words in page
    assert did.text().startswith("6 images with ")


def test_what_runs_tell_of_themselves_does_no_harm_to_verify_and_a_second_run_adds_nothing(cache, world, backbones):
    run(cache, world, backbones)
    before = (cache.path / "summary.md").read_bytes()
    run(cache, world, backbones)
    assert (cache.path / "summary.md").read_bytes() == before
    assert len(list((cache.path / "runs").iterdir())) == 1
    report = verify(cache)
    assert report.sound
    assert report.warnings == ()


def test_runs_that_end_at_the_same_moment_are_all_in_the_summary(cache, world, backbones):
    run(cache, world, backbones, parts="0")
    record = parse_run(next((cache.path / "runs").iterdir()).read_bytes())
    runs = [replace(record, worker=f"host:{number}") for number in range(12)]
    threads = [threading.Thread(target=summary_page.publish, args=(cache, each)) for each in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page = (cache.path / "summary.md").read_text()
    assert all(f"| host:{number} |" in page for number in range(12))
    assert "2 parts are still to be written" in page


def test_a_file_of_somebody_else_among_the_runs_is_left_alone_and_passed_over(cache, world, backbones):
    (cache.path / "runs").mkdir()
    for name, data in (("a.json", b"[1]"), ("b.json", b'{"form": 99}'), ("c.txt", b"\xff half a")):
        (cache.path / "runs" / name).write_bytes(data)
    run(cache, world, backbones)
    assert "## Runs" in (cache.path / "summary.md").read_text()
    assert (cache.path / "runs" / "c.txt").read_bytes() == b"\xff half a"


def test_a_run_that_is_stopped_says_why_in_the_summary(cache, world, backbones):
    class Stopped(RunMonitor):
        def image(self, *args):
            super().image(*args)
            if self.progress.done == 3:
                raise InputError("the disk | was pulled out")

    with pytest.raises(InputError):
        run(cache, world, backbones, watch=Stopped())
    assert "stopped: the disk \\| was pulled out" in (cache.path / "summary.md").read_text()


def test_a_summary_that_cannot_be_written_costs_nothing_but_itself(cache, world, backbones, caplog):
    (cache.path / "summary.md").mkdir()
    run(cache, world, backbones)
    assert FeatureCache.open(cache.path).pending_parts() == []
    assert "summary.md could not be written" in caplog.text


def test_in_an_object_store_the_summary_lies_beside_the_cache_as_on_a_disk(s3, manifest, backbones, world):
    cache = open_or_create(f"{s3}/c.zarr", manifest, backbones.feature_sets(), 6)
    run(cache, world, backbones)
    assert cache.storage.read("summary.md").decode().startswith("# c.zarr\n")
    assert verify(cache).warnings == ()


def _scraped(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    assert "# HELP regionspot_pictures_total Images" in text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_prometheus_sees_a_run_while_it_is_at_work_and_no_more_when_it_ended(cache, world, backbones, free_port):
    seen = []

    class Scraped(RunMonitor):
        def image(self, *args):
            super().image(*args)
            if self.progress.done == 5:
                seen.append(_scraped(free_port))

    run(cache, world, backbones, watch=Scraped(metrics_port=free_port))
    (found,) = seen
    assert found["regionspot_pictures_total"] == 5
    assert found["regionspot_pictures_pending"] == 1
    assert found["regionspot_regions_total"] == int(cache.manifest.offsets[5])
    assert found['regionspot_failures_total{kind="does not exist"}'] == 1
    assert found["regionspot_parts_total"] + found["regionspot_parts_pending"] == 3
    assert found['regionspot_stage_seconds_total{stage="encode"}'] > 0
    assert found["regionspot_pictures_per_second"] > 0
    with pytest.raises(OSError, match="refused"):
        _scraped(free_port)


def test_a_port_in_use_is_said_in_one_line_before_anything_is_done(cache, world, backbones):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--metrics-port {port}: cannot be listened on .*give another port"):
            run(cache, world, backbones, watch=RunMonitor(metrics_port=port))
    assert len(cache.pending_parts()) == 3


def test_the_bottleneck_comes_with_what_to_change_and_options_that_there_are():
    options = Path(cli_extract.__file__).read_text()
    for stage, device in (
        ("decode", "cuda"),
        ("encode", "cuda"),
        ("encode", "cpu"),
        ("tokens", "cpu"),
        ("write", "cpu"),
    ):
        found = find_bottleneck(
            {stage: 0.8, "wait": 0.1}, device=device, regions_per_image=16, decode_threads=2, cores=8
        )
        assert (found.stage, found.share) == (stage, 0.8)
        assert found.advice
    words = (*bottleneck._ADVICE.values(), bottleneck._HALF)
    named = {word.strip("`(),;:") for each in words for word in each.split() if "--" in word}
    shared = Path(cli_extract.__file__).with_name("options.py").read_text()
    for option in {word for word in named if word.startswith("--")}:
        assert option in options + shared or option[2:].replace("-", "_") + ":" in options


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bfloat16_is_advised_only_where_it_is_not_in_use_and_faster(device):
    asked = {"device": device, "regions_per_image": 1, "decode_threads": 1, "cores": 1}
    assert "bfloat16" not in find_bottleneck({"encode": 0.9}, **asked).advice
    assert (
        "--dtype bfloat16 in place of float32" in find_bottleneck({"encode": 0.9}, **asked, half_is_faster=True).advice
    )


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_half_is_faster_than_float32_alone_and_where_there_are_instructions_for_it(monkeypatch, has_bfloat16):
    monkeypatch.setattr(dtypes, "cpu_supports", lambda dtype: has_bfloat16)
    cpu = torch.device("cpu")
    assert dtypes.half_is_faster(["float32"], cpu) == has_bfloat16
    assert dtypes.half_is_faster(["bfloat16", "float32"], cpu) == has_bfloat16
    assert not dtypes.half_is_faster(["bfloat16"], cpu)
    assert not dtypes.half_is_faster([], cpu)


def test_a_run_without_a_stage_that_stands_out_gets_no_advice():
    shares = {"decode": 0.1, "encode": 0.2}
    assert find_bottleneck(shares, device="cpu", regions_per_image=1, decode_threads=1, cores=1) is None


def test_failures_of_one_kind_are_counted_together_whatever_numbers_they_quote():
    size = "is {} x 7 pixels (width x height), its annotation states 8 x 9; boxes would not fit"
    reasons = [(f"val/{row}.jpg", f"/data/val/{row}.jpg: {size.format(row)}") for row in range(5)]
    kinds = FailureCount([*reasons, ("b.jpg", "/data/b.jpg: is not there")]).kinds()
    assert [(each.kind, each.count) for each in kinds] == [
        ("is N x N pixels, its annotation states N x N", 5),
        ("is not there", 1),
    ]
    assert kinds[0].examples == ["val/0.jpg", "val/1.jpg", "val/2.jpg"]


def test_however_many_kinds_of_failure_there_are_metrics_stay_few():
    count = FailureCount((f"{row}.jpg", f"{row}.jpg: {'x' * row}") for row in np.arange(200))
    assert len(count.kinds()) <= 31
    assert count.total == 200
    assert kind_of("a.jpg", "a.jpg: (17)") == "other"
