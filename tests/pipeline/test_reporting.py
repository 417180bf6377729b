"""What users see of a run: summary.md, run records, metrics and advice."""

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
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import extract
from regionspot.pipeline.reporting import bottleneck, summary_page
from regionspot.pipeline.reporting.bottleneck import find_bottleneck
from regionspot.pipeline.reporting.failure_kinds import FailureCount, kind_of
from regionspot.pipeline.reporting.run_monitor import RunMonitor
from regionspot.pipeline.reporting.run_summary import parse_run

IMAGES = 6


@pytest.fixture(scope="module")
def manifest(world):
    """Of 6 images; row 4 does not exist and row 1 is not an image."""
    manifest = read_dataset("toy", world, "train").head(IMAGES)
    paths = manifest.paths.copy()
    paths[4] = "train/not-there.jpg"
    paths[1] = "../toy_train.json"
    return replace(manifest, paths=paths)


@pytest.fixture(scope="module")
def backbones() -> Backbones:
    return Backbones.load("toy", device="cpu", encoders=("none",))


@pytest.fixture
def cache(tmp_path, manifest, backbones) -> FeatureCache:
    return open_or_create(tmp_path / "c.zarr", manifest, backbones.feature_sets(), 2)


def run(cache, world, backbones, **fields):
    config = ExtractConfig(batch_size=2, max_failures=FailureLimit(count=len(cache)), **fields)
    return extract(cache, image_folder_of("toy", world), backbones, config)


@pytest.fixture
def after_images(monkeypatch):
    """`after_images(3, function)`: the run calls the function after its third image."""
    add_image = RunMonitor.add_image

    def install(count, function):
        def call(monitor, *args):
            add_image(monitor, *args)
            if monitor.progress.done == count:
                function()

        monkeypatch.setattr(RunMonitor, "add_image", call)

    return install


def test_a_run_writes_a_summary_of_parts_failures_and_throughput(cache, world, backbones, manifest):
    summary = run(cache, world, backbones)
    page = (cache.path / "summary.md").read_text()
    assert (summary.images, summary.failed, summary.regions) == (IMAGES, 2, int(manifest.offsets[-1]))
    assert summary.bytes == sum(sum(cache.record(part, "toy_sam").files.values()) for part in range(3))
    assert "**complete**" in page
    assert "| does not exist | 1 | train/not-there.jpg |" in page
    assert "| 0 | 1 |" in page
    assert "| 2 | 1 |" in page
    for text in ("# c.zarr", "## Runs", "cores", "torch 2", "weights of toy_sam | package", "| encode |"):
        assert text in page
    assert summary.text().startswith("6 images with ")


def test_verify_accepts_run_records_and_a_second_run_adds_none(cache, world, backbones):
    run(cache, world, backbones)
    before = (cache.path / "summary.md").read_bytes()
    run(cache, world, backbones)
    assert (cache.path / "summary.md").read_bytes() == before
    assert len(list((cache.path / "runs").iterdir())) == 1
    report = verify(cache)
    assert report.sound
    assert report.warnings == ()


def test_runs_that_end_at_the_same_time_are_all_in_the_summary(cache, world, backbones):
    run(cache, world, backbones, parts="0")
    record = parse_run(next((cache.path / "runs").iterdir()).read_bytes())
    runs = [replace(record, worker=f"host:{number}") for number in range(12)]
    threads = [threading.Thread(target=summary_page.publish, args=(cache, record)) for record in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page = (cache.path / "summary.md").read_text()
    assert all(f"| host:{number} |" in page for number in range(12))
    assert "2 parts are pending" in page


def test_unknown_files_among_the_run_records_are_ignored_and_kept(cache, world, backbones):
    (cache.path / "runs").mkdir()
    for name, data in (("a.json", b"[1]"), ("b.json", b'{"form": 99}'), ("c.txt", b"\xff half a")):
        (cache.path / "runs" / name).write_bytes(data)
    run(cache, world, backbones)
    assert "## Runs" in (cache.path / "summary.md").read_text()
    assert (cache.path / "runs" / "c.txt").read_bytes() == b"\xff half a"


def test_the_summary_says_why_a_run_stopped(cache, world, backbones, after_images):
    def fail():
        raise InputError("the disk | was pulled out")

    after_images(3, fail)
    with pytest.raises(InputError):
        run(cache, world, backbones)
    assert "stopped: the disk \\| was pulled out" in (cache.path / "summary.md").read_text()


def test_a_summary_that_cannot_be_written_is_only_a_warning(cache, world, backbones, caplog):
    (cache.path / "summary.md").mkdir()
    run(cache, world, backbones)
    assert FeatureCache.open(cache.path).pending_parts() == []
    assert "summary.md could not be written" in caplog.text


def test_an_object_store_gets_the_same_summary(s3, manifest, backbones, world):
    cache = open_or_create(f"{s3}/c.zarr", manifest, backbones.feature_sets(), 6)
    run(cache, world, backbones)
    assert cache.storage.read("summary.md").decode().startswith("# c.zarr\n")
    assert verify(cache).warnings == ()


def scrape(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    assert "# HELP regionspot_pictures_total Images" in text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_metrics_are_served_during_the_run_and_not_after_it(cache, world, backbones, free_port, after_images):
    scraped = []
    after_images(5, lambda: scraped.append(scrape(free_port)))
    run(cache, world, backbones, metrics_port=free_port)
    (metrics,) = scraped
    assert metrics["regionspot_pictures_total"] == 5
    assert metrics["regionspot_pictures_pending"] == 1
    assert metrics["regionspot_regions_total"] == int(cache.manifest.offsets[5])
    assert metrics['regionspot_failures_total{kind="does not exist"}'] == 1
    assert metrics["regionspot_parts_total"] + metrics["regionspot_parts_pending"] == 3
    assert metrics['regionspot_stage_seconds_total{stage="encode"}'] > 0
    assert metrics["regionspot_pictures_per_second"] > 0
    with pytest.raises(OSError, match="refused"):
        scrape(free_port)


def test_a_port_in_use_is_refused_before_the_first_image(cache, world, backbones):
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=rf"--metrics-port {port}: cannot listen .*give another port"):
            run(cache, world, backbones, metrics_port=port)
    assert len(cache.pending_parts()) == 3


def test_the_advice_about_a_bottleneck_names_only_existing_options():
    options = Path(cli_extract.__file__).read_text()
    for stage, device in (
        ("decode", "cuda"),
        ("encode", "cuda"),
        ("encode", "cpu"),
        ("tokens", "cpu"),
        ("write", "cpu"),
    ):
        shares = {stage: 0.8, "wait": 0.1}
        result = find_bottleneck(shares, device=device, regions_per_image=16, decode_threads=2, cores=8)
        assert (result.stage, result.share) == (stage, 0.8)
        assert result.advice
    templates = (*bottleneck._ADVICE.values(), bottleneck._HALF)
    named = {word.strip("`(),;:") for template in templates for word in template.split() if "--" in word}
    shared = Path(cli_extract.__file__).with_name("options.py").read_text()
    for option in {word for word in named if word.startswith("--")}:
        assert option in options + shared or option[2:].replace("-", "_") + ":" in options


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bfloat16_is_advised_only_if_it_is_not_used_yet_and_faster(device):
    arguments = {"device": device, "regions_per_image": 1, "decode_threads": 1, "cores": 1}
    assert "bfloat16" not in find_bottleneck({"encode": 0.9}, **arguments).advice
    assert (
        "--dtype bfloat16 instead of float32"
        in find_bottleneck({"encode": 0.9}, **arguments, half_is_faster=True).advice
    )


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_half_is_faster_than_float32_if_the_cpu_has_instructions_for_it(monkeypatch, has_bfloat16):
    monkeypatch.setattr(dtypes, "cpu_supports", lambda dtype: has_bfloat16)
    cpu = torch.device("cpu")
    assert dtypes.half_is_faster(["float32"], cpu) == has_bfloat16
    assert dtypes.half_is_faster(["bfloat16", "float32"], cpu) == has_bfloat16
    assert not dtypes.half_is_faster(["bfloat16"], cpu)
    assert not dtypes.half_is_faster([], cpu)


def test_without_a_dominant_stage_there_is_no_advice():
    shares = {"decode": 0.1, "encode": 0.2}
    assert find_bottleneck(shares, device="cpu", regions_per_image=1, decode_threads=1, cores=1) is None


def test_failures_of_one_kind_are_counted_together_whatever_numbers_they_contain():
    size = "is {} x 7 pixels (width x height), its annotation states 8 x 9; boxes would not fit"
    reasons = [(f"val/{row}.jpg", f"/data/val/{row}.jpg: {size.format(row)}") for row in range(5)]
    kinds = FailureCount([*reasons, ("b.jpg", "/data/b.jpg: is not there")]).kinds()
    assert [(kind.kind, kind.count) for kind in kinds] == [
        ("is N x N pixels, its annotation states N x N", 5),
        ("is not there", 1),
    ]
    assert kinds[0].examples == ["val/0.jpg", "val/1.jpg", "val/2.jpg"]


def test_the_number_of_failure_kinds_is_limited():
    count = FailureCount((f"{row}.jpg", f"{row}.jpg: {'x' * row}") for row in np.arange(200))
    assert len(count.kinds()) <= 31
    assert count.total == 200
    assert kind_of("a.jpg", "a.jpg: (17)") == "other"
