"""The metrics of a run: lines, sums of an interval, and what a resumed run continues."""

import json

import pytest

from regionspot.fusion.training.metrics import Meter, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def add_steps(meter: Meter, count: int) -> None:
    for _ in range(count):
        meter.add(images=4, bytes=2_000_000, wait_seconds=0.0)


def test_a_line_holds_the_means_of_its_interval_and_the_rates_of_images_and_bytes(path):
    meter = Meter(path, 0, 100)
    add_steps(meter, 5)
    meter.write(5, 1e-3, loss_sum=10.0, grad_norm_sum=5.0)
    add_steps(meter, 1)
    meter.write(6, 1e-3, loss_sum=7.0, grad_norm_sum=3.0)
    first, second = read_metrics(path)
    assert (first["step"], first["loss"], first["grad_norm"], first["lr"]) == (5, 2.0, 1.0, 1e-3)
    assert (second["loss"], second["grad_norm"]) == (7.0, 3.0)
    # 4 images of half a megabyte each.
    assert first["mb_per_second"] == pytest.approx(first["pictures_per_second"] / 2, rel=1e-3)
    assert "validation" not in first


def test_a_resumed_run_continues_the_open_interval(path):
    meter = Meter(path, 0, 100)
    add_steps(meter, 5)
    meter.write(5, 1e-3, 10.0, 5.0)
    add_steps(meter, 2)
    interval = json.loads(json.dumps(meter.open_interval(loss_sum=3.0, grad_norm_sum=1.5)))
    add_steps(meter, 3)
    meter.write(10, 1e-3, 99.0, 99.0)  # after the checkpoint, lost

    resumed = Meter(path, 7, 100, interval)
    assert resumed.resumed_sums == (3.0, 1.5)
    assert [line["step"] for line in read_metrics(path)] == [5]
    add_steps(resumed, 3)
    resumed.write(10, 1e-3, 3.0 + 7.0, 1.5 + 1.0)
    line = read_metrics(path)[-1]
    assert (line["step"], line["loss"], line["grad_norm"]) == (10, 2.0, 0.5)
    assert line["seconds"] >= round(interval["seconds"], 3)


def test_validation_counts_for_the_seconds_but_not_for_the_rates(path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("regionspot.fusion.training.metrics.time.perf_counter", lambda: now)
    meter = Meter(path, 0, 100)
    add_steps(meter, 1)
    now = 1.0
    with meter.paused():
        now = 101.0
    meter.write(1, 1e-3, 1.0, 1.0, {"ap": 0.25, "apr": 0.1})
    (line,) = read_metrics(path)
    assert line["validation"] == {"ap": 0.25, "apr": 0.1}
    assert line["pictures_per_second"] == 4.0
    assert line["seconds"] == 101.0


def test_the_progress_line_shows_rates_time_left_waiting_and_the_validation(path, caplog):
    meter = Meter(path, 0, 1)
    meter.add(images=4, bytes=2_000_000, wait_seconds=0.0)
    with caplog.at_level("INFO"):
        meter.write(1, 1e-3, 0.5, 1.0, {"ap": 0.25})
    (line,) = caplog.messages
    for part in (
        "1/1 steps",
        "loss 0.5",
        "lr 0.001",
        "ap 0.25",
        " images/s",
        " MB/s",
        "0s left",
        "waiting for data 0%",
    ):
        assert part in line
