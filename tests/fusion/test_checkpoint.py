"""Loading and saving checkpoints: our format, released files, and errors."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from regionspot.cache.errors import InputError, WeightsError
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint, save_checkpoint
from regionspot.fusion.head import HEADS, FusionHead
from regionspot.fusion.heads import HeadSpec

SMALL = HeadSpec(token_dim=12, width=16, text_dim=8, options={"layers": 2, "heads": 4, "ffn": 24})
INFO = HeadInfo(
    preset="toy",
    localizer="toy_sam",
    encoder="toy_clip",
    weights_sha256={"toy_sam": "a" * 64, "toy_clip": "b" * 64},
    caches=({"dataset": "toy", "share": 1.0},),
    vocabularies=("c" * 64,),
    templates=("{}.", "a {}."),
    step=7,
)


@pytest.fixture
def head():
    return SMALL.build().eval()


def released(preset: str, extra: dict | None = None) -> dict:
    """A state dict as the authors' trainer writes it, all zeros."""
    with torch.device("meta"):
        weights = FusionHead(HEADS[preset]).state_dict()
    state = {f"model.{name}": torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in weights.items()}
    return {
        "model": {**state, "model.sam.x.weight": torch.zeros(2), "model.clip_model.y": torch.ones(3)} | (extra or {})
    }


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_save_and_load_keep_the_weights_and_the_training_info(tmp_path, head):
    save_checkpoint(tmp_path / "head.safetensors", SMALL, head, INFO)
    loaded = load_checkpoint(tmp_path / "head.safetensors")
    assert loaded.info == INFO
    assert loaded.spec == SMALL
    assert not loaded.head.training
    inputs = torch.randn(1, 3, 12), None, torch.randn(1, 5, 16)
    assert torch.equal(loaded.head(*inputs), head(*inputs))


def test_a_header_length_that_looks_like_a_pickle_is_recognised(tmp_path, head):
    """A safetensors file starts with the length of its header, whose first byte may be that of a pickle."""
    first_bytes = set()
    for length in range(0, 256, 8):  # the header is padded to 8 bytes
        path = tmp_path / f"{length}.safetensors"
        save_checkpoint(path, SMALL, head, replace(INFO, templates=("{}" + "a" * length,)))
        first_bytes.add(path.read_bytes()[0])
        assert load_checkpoint(path).info.preset == "toy"
    assert 0x80 in first_bytes


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, head, monkeypatch):
    path = tmp_path / "head.safetensors"
    save_checkpoint(path, SMALL, head, INFO)
    before = path.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", no_space)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, SMALL, head, HeadInfo())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["head.safetensors"]


def test_a_released_file_loads_and_counts_the_ignored_tensors(tmp_path):
    path = tmp_path / "regionspot_bb.pth"
    torch.save(released("bb", {"model.to_clip.bias": torch.arange(768.0)}), path)
    loaded = load_checkpoint(path)
    assert loaded.info.preset == "bb"
    assert loaded.ignored == {"sam": 1, "clip_model": 1}
    assert loaded.head.to_clip.bias[5] == 5
    assert {parameter.dtype for parameter in loaded.head.parameters()} == {torch.float32}


def head_only(preset: str = "toy") -> dict:
    """The state dict of a head under our names, as another program may save it."""
    state = FusionHead(HEADS[preset]).state_dict()
    return {name: torch.full_like(tensor, 0.5) for name, tensor in state.items()}


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "layout",
    [
        lambda state: state,
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
        lambda state: {"state_dict": {"model": prefixed("_orig_mod.module.", state)}, "lr": 0.1},
        lambda state: {"state_dict": prefixed("model.module.", {**state, "criterion.weight": torch.ones(1)})},
        lambda state: {**prefixed("module.", state), "n_averaged": torch.tensor(7)},
    ],
    ids=["bare", "model_state_dict", "nested, compiled", "Lightning", "averaged"],
)
def test_a_head_loads_from_the_layouts_of_common_training_programs(tmp_path, layout):
    state = head_only()
    torch.save(layout(state), tmp_path / "head.pth")
    loaded = load_checkpoint(tmp_path / "head.pth")
    assert loaded.info.preset == "toy"
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.head.state_dict().items())


def test_a_released_head_converted_to_safetensors_loads(tmp_path):
    save_file(prefixed("model.", head_only()), tmp_path / "head.safetensors")
    assert load_checkpoint(tmp_path / "head.safetensors").info.preset == "toy"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_with_nan_or_infinity_is_refused_with_file_and_tensor(tmp_path, head, value):
    with torch.no_grad():
        head.decoder.norm.bias[3] = value
    save_checkpoint(tmp_path / "ours.safetensors", SMALL, head, INFO)
    broken = head_only()
    broken["decoder.norm.bias"][3] = value
    torch.save({"model": prefixed("model.", broken)}, tmp_path / "released.pth")
    for name in ("ours.safetensors", "released.pth"):
        with pytest.raises(WeightsError) as error:
            load_checkpoint(tmp_path / name)
        assert one_line(error).startswith(f"{tmp_path / name}: decoder.norm.bias holds NaN or infinity (1 of ")


def test_a_released_file_that_fits_two_presets_needs_a_preset(tmp_path):
    path = tmp_path / "regionspot_bl.pth"
    torch.save(released("bl"), path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    assert "bl and of bl336; name one with --preset" in one_line(error)
    assert load_checkpoint(path, preset="bl336").info.preset == "bl336"
    with pytest.raises(WeightsError, match="width=1024"):
        load_checkpoint(path, preset="bb")


class Code:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def write_code(path):
    torch.save({"model": {"model.to_clip.weight": Code()}}, path)


def write_bare_code(path):
    path.write_bytes(pickle.dumps(Code(), protocol=2))


def write_half(path):
    torch.save({"model": {"model.to_clip.weight": torch.zeros(2000)}}, path)
    path.write_bytes(path.read_bytes()[:4000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_code, "could run code"),
        (write_bare_code, "could run code"),
        (write_half, "cannot be read"),
        (lambda path: path.write_text("{}"), "cannot be read"),
        (lambda path: torch.save([1, 2], path), "holds list"),
        (lambda path: torch.save({"model": {"sam.x": torch.zeros(1)}}, path), "holds no fusion head"),
        (lambda path: torch.save({"model": {"model.to_clip.weight": torch.zeros(8, 4)}}, path), "incomplete"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "no head that `regionspot train` wrote"),
        (lambda path: None, "no such checkpoint file"),
    ],
)
def test_an_invalid_checkpoint_is_refused_in_one_line_and_no_code_runs(tmp_path, capsys, write, message):
    path = tmp_path / "given.pth"
    write(path)
    with pytest.raises(WeightsError) as error:
        load_checkpoint(path)
    assert message in one_line(error)
    assert str(path) in one_line(error)
    assert capsys.readouterr().out == ""


def test_a_tensor_of_another_shape_is_named(tmp_path):
    path = tmp_path / "odd.pth"
    torch.save(released("bb", {"model.decoder.norm.bias": torch.zeros(5)}), path)
    with pytest.raises(WeightsError, match=r"decoder.norm.bias \(5,\) instead of \(768,\)"):
        load_checkpoint(path)


def test_a_missing_tensor_is_named(tmp_path):
    path, state = tmp_path / "odd.pth", released("bb")
    del state["model"]["model.decoder.layers.1.norm2.bias"]
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"1 missing \(decoder.layers.1.norm2.bias\)"):
        load_checkpoint(path)


def test_a_preset_that_contradicts_the_file_is_refused(tmp_path, head):
    save_checkpoint(tmp_path / "head.safetensors", SMALL, head, INFO)
    with pytest.raises(InputError, match="trained as preset toy, not bl; leave --preset out"):
        load_checkpoint(tmp_path / "head.safetensors", preset="bl")


def test_the_error_for_an_unknown_preset_lists_the_presets(tmp_path):
    with pytest.raises(InputError, match="bb, bl, bl336"):
        load_checkpoint(tmp_path / "any.pth", preset="xl")
