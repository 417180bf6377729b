"""Metrics in TensorBoard's event files, and in a tracker: here a module that the test writes."""

import importlib.util
import json
import sys

import pytest

from regionspot.cache.errors import InputError
from regionspot.fusion.training.metrics import Meter, draw_curves, read_metrics
from regionspot.fusion.training.trackers import open_trackers, require_tracker

FAKE_TRACKIO = """
import json
from pathlib import Path
FILE = Path(__file__).with_name("calls.jsonl")

def write(*call):
    with FILE.open("a") as file:
        file.write(json.dumps(call) + "\\n")

def init(**options):
    print("a banner")
    write("init", options)
    return Run()

class Run:
    def log(self, values, step):
        write("log", step, values)
        if step == 13:
            raise ConnectionError("no route to host")
    def finish(self):
        write("finish")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Installs a tracker named trackio; returns a function that reads its calls."""
    folder = tmp_path / "installed"
    folder.mkdir()
    (folder / "trackio.py").write_text(FAKE_TRACKIO)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    yield lambda: [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    sys.modules.pop("trackio", None)


def meter_at(path, first_step: int, tracker: str | None = None) -> Meter:
    trackers = open_trackers(path.parent, tracker, "run-1", {"preset": "toy"})
    return Meter(path, first_step, 100, trackers=trackers)


def write(meter: Meter, *steps: int, **scores: float) -> None:
    for step in steps:
        meter.add(images=4, bytes=2_000_000, wait_seconds=0.0)
        meter.write(step, 1e-3, float(step), 1.0, scores)


def test_a_tracker_gets_every_line_and_the_runs_configuration(tmp_path, calls, capsys):
    meter = meter_at(tmp_path / "metrics.jsonl", 0, "trackio")
    write(meter, 5)
    write(meter, 10, ap=0.25)
    meter.close()
    init, first, second, finish = calls()
    assert init == ["init", {"project": "regionspot", "name": "run-1", "config": {"preset": "toy"}, "resume": "allow"}]
    assert first[:2] == ["log", 5]
    assert set(first[2]) == {"loss", "lr", "grad_norm", "images_per_second", "mb_per_second", "data_wait", "seconds"}
    assert second[2]["validation/ap"] == 0.25
    assert finish == ["finish"]
    assert capsys.readouterr().out == ""


def test_a_resumed_run_sends_no_step_twice(tmp_path, calls):
    """Killed after step 15, with a checkpoint of step 10."""
    path = tmp_path / "metrics.jsonl"
    write(meter_at(path, 0, "trackio"), 5, 10, 15)
    write(meter_at(path, 10, "trackio"), 15, 20)
    assert [call[1] for call in calls() if call[0] == "log"] == [5, 10, 15, 20]
    assert [line["step"] for line in read_metrics(path)] == [5, 10, 15, 20]


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, calls, caplog):
    meter = meter_at(tmp_path / "metrics.jsonl", 0, "trackio")
    write(meter, 12, 13, 14)
    meter.close()
    assert [call[1] for call in calls() if call[0] == "log"] == [12, 13]
    assert "gets no more metrics (no route to host)" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_tracker_that_does_not_start_is_refused_in_one_line(tmp_path, calls):
    (tmp_path / "installed/trackio.py").write_text("def init(**options): raise ValueError('no login')")
    with pytest.raises(InputError, match=r"tracker trackio: does not start \(no login\); leave --log-to out"):
        open_trackers(tmp_path, "trackio", "run-1", {})


def test_a_tracker_that_is_not_installed_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tracker wandb: is not installed; pip install 'regionspot\[wandb\]'"):
        require_tracker("wandb")
    with pytest.raises(InputError, match="expected one of trackio, wandb"):
        require_tracker("mlflow")


def test_tensorboard_reads_each_step_once_also_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "metrics.jsonl"
    meter = meter_at(path, 0)
    write(meter, 5, 10, ap=0.25)
    write(meter, 15)
    meter.close()
    resumed = meter_at(path, 10)
    write(resumed, 15, 20)
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 5), (10, 10), (15, 15), (20, 20)]
    assert [(event.step, event.value) for event in events.Scalars("validation/ap")] == [(5, 0.25), (10, 0.25)]


def test_without_new_lines_there_is_no_event_file(tmp_path):
    meter_at(tmp_path / "metrics.jsonl", 0).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_curves_show_the_scores_of_a_validated_run(tmp_path):
    from PIL import Image

    meter = meter_at(tmp_path / "metrics.jsonl", 0)
    write(meter, 5, 10)
    draw_curves(read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "plain.png")
    write(meter, 15, ap=0.25, apr=0.1)
    draw_curves(read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "validated.png")
    heights = [Image.open(tmp_path / name).height for name in ("plain.png", "validated.png")]
    assert heights[1] > heights[0]
