"""The demo is its public commands, one after the other, and a table of what they found."""

import shlex

import pytest

from regionspot.cache.errors import InputError, RegionSpotError
from regionspot.cli import app
from regionspot.evaluation.demo import commands, run_demo


def run_briefly(arguments):
    """The real command line; training ends after two steps."""
    app([*arguments, *(["--iterations", "2"] if arguments[0] == "train" else [])], standalone_mode=False)


def test_the_demo_prints_every_command_that_it_runs_and_what_came_out(tmp_path, caplog):
    caplog.set_level("INFO", "regionspot")
    table = run_demo(run_briefly, tmp_path, images=40)
    printed = [line[2:] for line in caplog.text.splitlines() if line.startswith("$ regionspot ")]
    assert printed == [f"regionspot {shlex.join(arguments)}" for arguments in commands(tmp_path, 40, 0)]
    for method in ("head (trained)", "CLIP on every crop", "CLIP map, mean in box", "8 validation images"):
        assert method in table
    for file in ("report.md", "run/curves.png", "head/sheet.png", "crop/results.json", "pooled/detections.json"):
        assert (tmp_path / file).stat().st_size


def test_a_failed_stage_is_named_and_ends_the_demo(tmp_path):
    ran = []

    def run(arguments):
        ran.append(arguments[0])
        if arguments[0] == "extract":
            raise InputError("no room left")

    with pytest.raises(RegionSpotError, match=r"`regionspot extract toy .*` failed: no room left; run the demo again"):
        run_demo(run, tmp_path)
    assert ran == ["toy-world", "extract"]
