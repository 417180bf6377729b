"""`--config` gives a command its options, `--print-config` writes such a file; every help has an example."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from regionspot.cli import app

TRAIN = """
[train]
cache = ["a.zarr", "b.zarr"]
out = "runs/a"
lr = 1e-4
pack = true
head-option = ["layers=2"]

[cache.subset]
every = 10
"""


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "run.toml").write_text(text)
        return tmp_path / "run.toml"

    return write


def in_force(regionspot, *arguments) -> dict:
    code, out, err = regionspot(*arguments, "--print-config")
    assert code == 0, err
    return tomllib.loads(out)


def test_a_file_gives_the_options_of_its_commands_and_the_command_line_has_priority(regionspot, config):
    path = config(TRAIN)
    train = in_force(regionspot, "train", "--config", path, "--lr", 2, "--no-pack")["train"]
    assert (train["cache"], train["out"], train["head-option"]) == (["a.zarr", "b.zarr"], "runs/a", ["layers=2"])
    assert (train["lr"], train["pack"], train["preset"]) == (2.0, False, "bl")
    assert in_force(regionspot, "train", "--config", path, "--cache", "c.zarr")["train"]["cache"] == ["c.zarr"]
    subset = in_force(regionspot, "cache", "subset", "o.zarr", "s.zarr", "--config", path)["cache"]["subset"]
    assert (subset["every"], subset["path"]) == (10, "o.zarr")


def test_what_print_config_writes_is_a_config_file(regionspot, config):
    command = ("extract", "coco", "--data", "d", "--cache", "c.zarr", "--encoder", "a", "--encoder", "b", "--exact")
    _, printed, _ = regionspot(*command, "--print-config")
    path = config(printed)
    assert regionspot("extract", "--config", path, "--print-config")[1] == printed
    assert "# limit =" in printed  # an option without a value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[train", "is not TOML: "),
        ("lr = 1", "lr stands outside of a table; write [train] above it"),
        ("[train]\nlearning = 1", "option of [train] 'learning': unknown"),
        ("[train]\niterations = 0", "iterations: Input should be greater than or equal to 1"),
        ("[train]\npreset = 'xl'", "preset: "),
        ("[train]\nlr = [1, 2]", "lr is a list, expected one value"),
        ("[train]\nresume = 'yes'", "resume is 'yes', expected true or false"),
        ("[train]\nout = true", "out is True, expected a text or a number"),
        ("[train]\nout = 2020-01-01", "expected a text or a number"),
        ("[train.out]\nx = 1", "expected a text or a number"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(regionspot, config, text, problem):
    path = config(text)
    code, _, err = regionspot("train", "--cache", "c.zarr", "--config", path, "--out", "x")
    assert (code, len(err.splitlines())) == (2, 1), err
    assert str(path) in err
    assert problem in err


def test_a_missing_file_is_refused(regionspot, tmp_path):
    code, _, err = regionspot("runs", "runs", "--config", tmp_path / "no.toml")
    assert (code, err.startswith(f"regionspot: {tmp_path}/no.toml: cannot be read")) == (2, True)


def commands(group: object = None, name: tuple[str, ...] = ()) -> dict[str, str]:
    """The help text of every command."""
    group = group or typer.main.get_command(app)
    found = {}
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, (*name, word))
        else:
            found[" ".join((*name, word))] = command.help
    return found


@pytest.mark.parametrize("command", commands())
def test_the_help_of_a_command_has_an_example_that_is_accepted(regionspot, command):
    example = re.search(r"Example: regionspot (.*)", " ".join(commands()[command].split()))
    assert example, command
    assert example[1].startswith(f"{command} ")
    in_force(regionspot, *shlex.split(example[1]))


def test_a_shell_can_complete_commands_and_values():
    def completions(line: str) -> list[str]:
        words = shlex.split(line)
        request = {"_REGIONSPOT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        command = [sys.executable, "-c", "from regionspot.cli import main; main()"]
        return subprocess.run(command, env=request, capture_output=True, text=True, check=True).stdout.split()

    assert "train" in completions("regionspot tra")
    assert {"stage1-bl", "stage2-bl"} <= set(completions("regionspot train --preset stage"))


def test_the_file_in_the_documentation_is_accepted(regionspot, config):
    page = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
    path = config(page.split("```toml\n")[1].split("```")[0])
    assert in_force(regionspot, "extract", "--config", path)["extract"]["name"] == "o365"
    assert in_force(regionspot, "train", "--config", path)["train"]["resume"] is True
    assert (
        in_force(regionspot, "eval-lvis", "--config", path, "--limit", 100)["eval-lvis"]["boxes"] == "glip_t_boxes.json"
    )
