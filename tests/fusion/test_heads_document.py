"""Run the programs and commands of docs/heads.md on a small toy dataset whose classes are colours."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regionspot.cache import Category, FeatureCache, Manifest
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.extract import extract
from regionspot.pipeline.toy.world import make_toy_world

DOCUMENT = Path(__file__).parents[2] / "docs" / "heads.md"
OWN_HEAD = re.search(r"```python\n(import torch\nfrom torch import nn\n.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
COMMANDS = re.findall(
    r"^    (regionspot .* --head my_head.py.*)$", DOCUMENT.read_text().replace("\\\n", ""), re.MULTILINE
)
# A program and, below it, its output.
EXAMPLES = re.findall(r"```python\n((?:(?!```).)*)```\n\n    (.*?)\n", DOCUMENT.read_text(), re.DOTALL)
IMAGES = 75


def by_colours(manifest: Manifest) -> Manifest:
    """The same regions with the colour as class: the middle word of "striped green star"."""
    names = [category.name.split()[1] for category in manifest.categories]
    colours = sorted(set(names))
    index = np.array([colours.index(name) for name in names], np.int32)
    categories = tuple(Category(number, colour) for number, colour in enumerate(colours, start=1))
    # Without the lists of verified classes, which are indices of the toy world's names.
    lists = {"negatives": None, "not_exhaustive": None}
    return replace(manifest, category_index=index[manifest.category_index], categories=categories, **lists)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The working folder of the programs, with their cache."""
    root = tmp_path_factory.mktemp("heads")
    world = make_toy_world(root / "world", 2 * IMAGES, seed=3)
    manifest = by_colours(read_dataset("toy", world).head(IMAGES))
    backbones = Backbones.load("toy", device="cpu")
    cache = FeatureCache.create(root / "o365.zarr", manifest, backbones.feature_sets(), part_size=16)
    extract(cache, image_folder_of("toy", world), backbones)
    shutil.copy(world / "photos" / "val" / "000000000124.jpg", root / "image.jpg")
    return root


def test_the_document_has_three_programs():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize(("program", "printed"), EXAMPLES, ids=["linear probe", "nearest neighbours", "small head"])
def test_each_program_prints_its_documented_output_and_beats_chance(folder, monkeypatch, capsys, program, printed):
    monkeypatch.chdir(folder)
    exec(compile(program, str(DOCUMENT), "exec"), {"__name__": "__main__"})
    output = capsys.readouterr().out.strip()
    accuracy, chance = (int(percent) for percent in re.findall(r"(\d+)%", output))
    assert accuracy > chance + 20
    documented = [int(percent) for percent in re.findall(r"(\d+)%", printed)]
    assert documented == pytest.approx([accuracy, chance], abs=4)  # rounding differs between machines
    assert re.sub(r"\d+%", "N%", output) == re.sub(r"\d+%", "N%", printed)


def test_the_documented_head_is_trained_and_used_by_the_documented_commands(folder, home, monkeypatch, regionspot):
    assert OWN_HEAD.count("\n") <= 30
    monkeypatch.chdir(folder)
    (folder / "my_head.py").write_text(OWN_HEAD)
    outputs = []
    for command in COMMANDS:
        code, out, err = regionspot(*shlex.split(command)[1:])
        assert code == 0, err
        outputs.append(out)
    assert outputs[0].startswith("runs/mine/head.safetensors: 120 steps")
    (region,) = json.loads(outputs[1])
    # The image is not one of the training images.
    assert (region["name"], region["score"] > 0.5) == ("blue", True)


def test_the_documented_checkpoint_is_refused_without_its_class(folder, home, monkeypatch, refused):
    monkeypatch.chdir(folder)
    command = shlex.split(COMMANDS[1])[1:]
    at = command.index("--head")
    refused("never decides what code is run", *command[:at], *command[at + 2 :])
