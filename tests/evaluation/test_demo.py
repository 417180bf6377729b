"""The demo: its commands, results and errors."""

import shlex

import pytest

from regionspot.cache.errors import InputError, RegionSpotError
from regionspot.cli import app
from regionspot.evaluation.demo import commands, run_demo

BRIEFLY = {"train": ["--iterations", "2", "--templates", "plain"], "eval-lvis": ["--templates", "plain"]}


def run_briefly(arguments):
    """Run the real command line, with two training steps and one prompt per class only."""
    app([*arguments, *BRIEFLY.get(arguments[0], [])], standalone_mode=False)


@pytest.mark.usefixtures("home")
def test_the_demo_logs_every_command_and_returns_a_table(tmp_path, caplog):
    caplog.set_level("INFO", "regionspot")
    table = run_demo(run_briefly, tmp_path, images=40)
    printed = [line[2:] for line in caplog.text.splitlines() if line.startswith("$ regionspot ")]
    assert printed == [f"regionspot {shlex.join(arguments)}" for arguments in commands(tmp_path, 40, 0)]
    for method in (
        "head (trained)",
        "guided head, 400 steps",
        "CLIP on every crop",
        "CLIP dense map, mean in box",
        "CLIP map, mean in box",
        "8 validation images",
    ):
        assert method in table
    for file in (
        "report.md",
        "run/curves.png",
        "head/sheet.png",
        "head/report.html",
        "crop/results.json",
        "pooled/detections.json",
    ):
        assert (tmp_path / file).stat().st_size


def test_the_error_of_a_failed_stage_names_its_command(tmp_path):
    names = []

    def run(arguments):
        names.append(arguments[0])
        if arguments[0] == "extract":
            raise InputError("disk full")

    with pytest.raises(RegionSpotError, match=r"`regionspot extract toy .*` failed: disk full; run the demo again"):
        run_demo(run, tmp_path)
    assert names == ["toy-world", "extract"]
