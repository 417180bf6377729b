"""Weights are located, verified and recorded in the provenance, and code in a file is never run."""

import functools
import hashlib
import http.server
import pickle
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from regionspot.cache.errors import WeightsError
from regionspot.pipeline.backbones import weights
from regionspot.pipeline.backbones.weights import OFFICIAL, OfficialFile, load_weights, random_weights

NAME = "small"


class Small(torch.nn.Module):
    """A model of three tensors, one of them of a norm."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 32)
        self.norm = torch.nn.Parameter(torch.ones(4))

    def forward(self, values):
        return self.layer(values)


EXPECTED = Small().state_dict()


def same(actual, expected=EXPECTED) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(source, name=NAME, expected=EXPECTED, official=None) -> str:
    with pytest.raises(WeightsError) as caught:
        load_weights(name, None if source is None else str(source), expected, official)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def torchscript(path: Path, trained=EXPECTED) -> Path:
    model = Small()
    model.load_state_dict(trained)
    torch.jit.script(model).save(path)
    return path


def save_checkpoint(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in EXPECTED.items()}}, path)


def save_with_sizes(path: Path) -> None:
    """Like OpenAI's state dicts, with numbers that are not weights."""
    torch.save({**EXPECTED, "input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}, path)


FORMATS = {
    "torch": lambda path: torch.save(EXPECTED, path),
    "old torch": lambda path: torch.save(EXPECTED, path, _use_new_zipfile_serialization=False),
    "nested": lambda path: torch.save({"model": EXPECTED}, path),
    "safetensors": lambda path: save_file(EXPECTED, path),
    "safetensors, DDP": lambda path: save_file({f"module.{name}": value for name, value in EXPECTED.items()}, path),
    "model_state_dict": lambda path: torch.save({"model_state_dict": EXPECTED, "epoch": 3}, path),
    "nested twice": lambda path: torch.save({"model": {"state_dict": EXPECTED}}, path),
    "compiled": lambda path: torch.save({f"_orig_mod.{name}": value for name, value in EXPECTED.items()}, path),
    "open_clip checkpoint": save_checkpoint,
    "OpenAI's numbers": save_with_sizes,
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_state_dict_is_loaded_from_all_usual_formats_with_its_hash(tmp_path, format):
    path = tmp_path / "fine_tuned.pt"
    FORMATS[format](path)
    loaded = load_weights(NAME, str(path), EXPECTED)
    assert same(loaded.state_dict)
    assert (loaded.sha256, loaded.origin) == (sha256(path), "file")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, save):
    target = tmp_path / "was_run"
    save({**EXPECTED, "norm": Bomb(target)}, tmp_path / "trap.pth")
    assert "code in a pickle is never run" in refusal(tmp_path / "trap.pth")
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()  # the trap works if it is not refused


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_torchscript_archive_is_opened_only_with_the_official_hash(tmp_path):
    path = torchscript(tmp_path / "clip.pt")
    official = OfficialFile("clip.pt", "https://example.org/clip.pt", sha256(path))
    loaded = load_weights(NAME, str(path), EXPECTED, official)
    assert same(loaded.state_dict)
    assert loaded.origin == "official"
    assert "TorchScript archive" in refusal(path)
    other = torchscript(tmp_path / "other.pt", {name: value + 1 for name, value in EXPECTED.items()})
    message = refusal(other, official=official)
    assert sha256(other) in message
    assert sha256(path) in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is damaged"),
        (b"<html>404 Not Found</html>", "is damaged"),
        (b"\x40\0\0\0\0\0\0\0{'not json", "is damaged"),
        ("half", "is damaged"),
        ([1, 2], "holds list, expected a state dict"),
        ({"lr": 0.1}, "holds dict, expected a state dict"),
    ],
    ids=["empty", "html", "safetensors header", "half a file", "a list", "no tensors"],
)
def test_a_file_without_weights_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        torch.save(EXPECTED, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        torch.save(content, path)
    assert refusal(path).startswith(f"{path}: {reason}")


def test_weights_of_another_model_are_refused_with_the_differences(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"layer.weight": torch.zeros(32, 9), "layer.bias": torch.zeros(32), "head.bias": torch.zeros(2)}, path)
    message = refusal(path)
    assert message.startswith(f"{path}: does not fit {NAME}")
    assert "1 missing (norm)" in message
    assert "1 not part of it (head.bias)" in message
    assert "layer.weight (32, 9) instead of (32, 64)" in message


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_are_refused_with_file_and_tensor(tmp_path, value):
    broken = {name: tensor.half() for name, tensor in EXPECTED.items()}
    broken["layer.bias"][5] = value
    torch.save(broken, tmp_path / "broken.pth")
    assert refusal(tmp_path / "broken.pth").startswith(
        f"{tmp_path / 'broken.pth'}: layer.bias holds NaN or infinity (1 of 32 numbers)"
    )


def test_a_submodule_named_module_is_not_a_wrapper(tmp_path):
    state_dict = {f"module.{name}" if name == "norm" else name: value for name, value in EXPECTED.items()}
    torch.save(state_dict, tmp_path / "named.pth")
    assert load_weights(NAME, str(tmp_path / "named.pth"), state_dict).state_dict.keys() == state_dict.keys()


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / "absent.pth").startswith(f"{tmp_path / 'absent.pth'}: is not a weights file or folder")


def test_a_folder_stands_for_its_file_with_the_official_name(tmp_path):
    official = OfficialFile("small.pth", "https://example.org/small.pth", "0" * 64)
    assert "does not contain small.pth" in refusal(tmp_path, official=official)
    torch.save(EXPECTED, tmp_path / "small.pth")
    assert load_weights(NAME, str(tmp_path), EXPECTED, official).origin == "file"


def test_random_weights_depend_only_on_the_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (load_weights(NAME, f"random:{seed}", EXPECTED) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(again.state_dict, first.state_dict)
    assert not torch.equal(other.state_dict["layer.weight"], first.state_dict["layer.weight"])
    assert first.sha256 == first.origin == "random:0"


def test_a_random_tensor_does_not_depend_on_the_other_tensors():
    alone = random_weights(0, {"layer.bias": EXPECTED["layer.bias"]})
    assert torch.equal(alone["layer.bias"], random_weights(0, EXPECTED)["layer.bias"])


@pytest.mark.parametrize("source", ["random:", "random:abc", "random:-1"])
def test_a_seed_that_is_not_an_integer_is_refused(source):
    assert "expected an integer" in refusal(source)


def test_a_source_is_required_if_there_is_no_official_file():
    assert "give a weights file" in refusal(None)


@pytest.fixture
def web(tmp_path):
    """A local web server with a weights file; `web.official()` describes it."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.official = lambda: OfficialFile(
            "small.pth", f"http://127.0.0.1:{server.server_port}/small.pth", sha256(folder / "small.pth")
        )
        torch.save(EXPECTED, folder / "small.pth")
        yield server
        server.shutdown()


def test_the_official_file_is_downloaded_once(home, web):
    official = web.official()
    first = load_weights(NAME, None, EXPECTED, official)
    web.shutdown()
    web.server_close()
    again = load_weights(NAME, None, EXPECTED, official)
    assert same(again.state_dict)
    assert first.origin == again.origin == "official"
    assert [path.name for path in (home / "weights").iterdir()] == ["small.pth"]


def test_a_download_with_another_hash_is_not_kept(home, web):
    official = OfficialFile("small.pth", web.official().url, "0" * 64)
    assert "expected " + "0" * 64 in refusal(None, official=official)
    assert list((home / "weights").iterdir()) == []


def test_a_damaged_official_file_is_refused(home, web):
    official = web.official()
    load_weights(NAME, None, EXPECTED, official)
    torch.save({name: value + 1 for name, value in EXPECTED.items()}, home / "weights" / "small.pth")
    assert "delete it and run this again" in refusal(None, official=official)


def test_without_a_network_the_error_names_url_and_path(home):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/small.pth"
        message = refusal(None, official=OfficialFile("small.pth", url, "0" * 64))
    assert f"download {url} to {home / 'weights' / 'small.pth'}" in message
    assert "refused" in message.lower()


def test_a_missing_page_is_reported_in_the_same_way(home, web):
    official = OfficialFile("absent.pth", web.official().url.replace("small", "absent"), None)
    assert f"to {home / 'weights' / 'absent.pth'}" in refusal(None, official=official)


def test_an_interrupted_download_is_not_kept(home):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection = server.accept()[0]
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/small.pth"
        assert "9 of 1000 bytes" in refusal(None, official=OfficialFile("small.pth", url, None))
    assert list((home / "weights").iterdir()) == []


def test_an_unwritable_weights_folder_is_reported(home, web):
    home.write_text("a file where the folder should be")
    assert "could not be downloaded" in refusal(None, official=web.official())


def test_the_openai_urls_equal_open_clips():
    import open_clip

    models = {"clip_vit_b_16": "ViT-B-16", "clip_vit_l_14": "ViT-L-14", "clip_vit_l_14_336": "ViT-L-14-336"}
    for name, model in models.items():
        assert OFFICIAL[name].url == open_clip.get_pretrained_url(model, "openai")


def test_every_official_file_has_a_hash_and_a_unique_name():
    assert all(len(official.sha256 or "") == 64 for official in OFFICIAL.values())
    assert len({official.file for official in OFFICIAL.values()}) == len(OFFICIAL)


def test_the_weights_folder_follows_the_environment(home, monkeypatch):
    assert weights.weights_folder() == home / "weights"
    monkeypatch.delenv("REGIONSPOT_HOME")
    assert weights.weights_folder() == Path.home() / ".cache/regionspot/weights"
