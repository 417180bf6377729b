"""`regionspot runs`: every run below a folder, whatever state it is in."""

import json
from dataclasses import replace

import pytest
from small_training import CONFIG, make_cache, make_vocabulary

from regionspot.fusion.training.run_folder import RunFolder
from regionspot.fusion.training.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, a validated one that was stopped at step 4 of 8, and two broken ones."""
    folder = tmp_path_factory.mktemp("runs")
    cache, config = make_cache(folder / "small.zarr"), replace(CONFIG, iterations=4)
    train([cache], [make_vocabulary()], folder / "finished", config, preset="toy")
    scores = iter([0.25, 0.5, 0.125, 0.25])
    out, linear = folder / "deeper" / "stopped", replace(config, head="linear")
    train(
        [cache, make_cache(folder / "other.zarr", seed=1)],
        [make_vocabulary()] * 2,
        out,
        linear,
        validate=lambda head: {"AP": next(scores), "top1": 0.9},
        validate_every=1,
    )
    record = json.loads((out / "run.json").read_text())
    record["config"]["iterations"] = 8
    (out / "run.json").write_text(json.dumps(record))
    for name, text in (("broken", "{"), ("incomplete", '{"preset": "bl", "config": {"iterations": 9}}')):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(text)
    return folder


def test_the_table_lists_every_run_below_a_folder(regionspot, folder):
    code, out, _ = regionspot("runs", folder)
    header, *lines = out.splitlines()
    assert code == 0
    assert header.split() == ["run", "preset", "head", "data", "steps", "loss", "best", "images/s", "state"]
    cells = [line.removeprefix(str(folder)).split() for line in lines]
    assert cells[0][:7] == ["/deeper/stopped", "-", "linear", "small0", "train", "+", "small1"]
    assert cells[0][8] == "4/8"
    assert (cells[0][10:12], cells[0][-1]) == (["AP", "0.5000"], "stopped")
    assert cells[1][:6] == ["/finished", "toy", "fusion", "small0", "train", "4/4"]
    assert (cells[1][7], cells[1][-1]) == ("-", "finished")
    assert lines[2].startswith(f"{folder}/broken: cannot be read (Expecting")
    assert lines[3] == f"{folder}/incomplete: cannot be read (no field 'caches')"


def test_json_holds_the_same_and_a_run_is_named_directly(regionspot, folder):
    code, out, _ = regionspot("runs", folder / "finished", folder / "broken", "--json")
    broken, finished = json.loads(out)
    assert code == 0
    assert (finished["step"], finished["iterations"], finished["state"]) == (4, 4, "finished")
    assert finished["images_per_second"] > 0
    assert finished["loss"] > 0
    assert broken["error"].startswith("cannot be read")


def test_a_run_whose_process_is_alive_is_running(regionspot, folder):
    run = RunFolder(folder / "finished")
    identity = json.loads(run.record.read_text())
    run.claim(identity, resume=True)
    try:
        assert json.loads(regionspot("runs", run.path, "--json")[1])[0]["state"] == "running"
    finally:
        run.close()


def test_a_folder_without_runs_is_refused(refused, tmp_path):
    refused(f"{tmp_path}: holds no training run", "runs", tmp_path)
