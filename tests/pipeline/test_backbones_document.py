"""docs/backbones.md: its example runs as printed, and its tables equal the models' values."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from regionspot import cli
from regionspot.pipeline.backbones.builders import CLIP_MODELS, build_clip
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.protocols import SemanticEncoder, TextEncoder
from regionspot.pipeline.backbones.registry import ENCODERS, LOCALIZERS
from regionspot.pipeline.toy.world import make_toy_world

DOCUMENT = Path(__file__).parents[2] / "docs" / "backbones.md"
TEXT = DOCUMENT.read_text()
BACKBONE, READING = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMAND = re.search(r"^    PYTHONPATH=\. (regionspot extract toy .*)$", TEXT, re.MULTILINE)[1]
PRINTED = re.search(r"```\n\n    (\(8.*?)\n", TEXT)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the example backbone and a small toy dataset."""
    root = tmp_path_factory.mktemp("document")
    (root / "dinov2.py").write_text(BACKBONE)
    make_toy_world(root / "world", 40, seed=0)
    return root


@pytest.fixture(scope="module")
def dinov2(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield load_encoder("dinov2:Dinov2", "random:0")
    sys.modules.pop("dinov2", None)


def test_the_example_is_short_and_an_encoder_without_text(dinov2):
    assert len(BACKBONE.strip().splitlines()) <= 50
    assert isinstance(dinov2, SemanticEncoder)
    assert not isinstance(dinov2, TextEncoder)


def test_the_command_and_the_program_print_what_the_document_shows(folder, dinov2, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [*shlex.split(COMMAND), "--device", "cpu", "--dtype", "float32"])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    capsys.readouterr()
    exec(compile(READING, str(DOCUMENT), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip() == PRINTED


def test_the_example_reads_metas_weights_file(dinov2, tmp_path):
    """The file has a grid of 37 x 37 positions and a mask token."""
    weights = {**dinov2.model.state_dict(), "mask_token": torch.zeros(1, 384), "pos_embed": torch.randn(1, 1370, 384)}
    torch.save(weights, tmp_path / "dinov2_vits14_pretrain.pth")
    again = load_encoder("dinov2:Dinov2", str(tmp_path))
    assert again.model.pos_embed.shape == dinov2.model.pos_embed.shape
    assert torch.equal(again.model.blocks[0].mlp.fc1.weight, dinov2.model.blocks[0].mlp.fc1.weight)


def test_the_tables_list_all_our_backbones():
    for name in (*LOCALIZERS.names(), *ENCODERS.names()):
        assert f"| `{name}`" in TEXT or f", `{name}`" in TEXT, name


def test_the_table_of_encoders_has_the_right_shapes_and_sizes():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) x ([\d,]+) \| ([\d,]+) KB", TEXT, re.MULTILINE)
    assert {name for name, *_ in rows} == {*CLIP_MODELS, "toy_clip"}
    for name, pixels, tokens, width, kilobytes in rows:
        visual = build_clip(name).model.visual
        assert visual.image_size[0] == int(pixels)
        assert tuple(visual.positional_embedding.shape) == (int(tokens), int(width.replace(",", "")))
        assert round(2 * visual.positional_embedding.numel() / 1000) == int(kilobytes.replace(",", ""))
