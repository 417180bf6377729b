"""Weights are found, checked and named in the provenance, and nothing in a file is ever run."""

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
    """A model of three tensors, one of them a norm's."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 32)
        self.norm = torch.nn.Parameter(torch.ones(4))

    def forward(self, values):
        return self.layer(values)


EXPECTED = Small().state_dict()


def same(found, expected=EXPECTED) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


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
    """As OpenAI's state dicts are, with three numbers that are no weights."""
    torch.save({**EXPECTED, "input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}, path)


@pytest.mark.parametrize(
    "save",
    [
        lambda path: torch.save(EXPECTED, path),
        lambda path: torch.save(EXPECTED, path, _use_new_zipfile_serialization=False),
        lambda path: torch.save({"model": EXPECTED}, path),
        lambda path: save_file(EXPECTED, path),
        lambda path: save_file({f"module.{name}": value for name, value in EXPECTED.items()}, path),
        lambda path: torch.save({"model_state_dict": EXPECTED, "epoch": 3}, path),
        lambda path: torch.save({"model": {"state_dict": EXPECTED}}, path),
        lambda path: torch.save({f"_orig_mod.{name}": value for name, value in EXPECTED.items()}, path),
        save_checkpoint,
        save_with_sizes,
    ],
    ids=[
        "torch",
        "old torch",
        "nested",
        "safetensors",
        "safetensors, DDP",
        "model_state_dict",
        "nested twice",
        "compiled",
        "open_clip checkpoint",
        "OpenAI's numbers",
    ],
)
def test_a_state_dict_loads_from_any_of_the_usual_files_and_its_hash_is_kept(tmp_path, save):
    path = tmp_path / "fine_tuned.pt"
    save(path)
    loaded = load_weights(NAME, str(path), EXPECTED)
    assert same(loaded.state_dict)
    assert (loaded.sha256, loaded.origin) == (sha256(path), "file")


class Bomb:
    """Unpickled, it would create a file."""

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
    assert target.exists()  # the trap works where it is not refused


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_torchscript_archive_is_opened_only_when_its_hash_is_the_official_one(tmp_path):
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
def test_a_file_that_holds_no_weights_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        torch.save(EXPECTED, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        torch.save(content, path)
    assert refusal(path).startswith(f"{path}: {reason}")


def test_weights_of_another_model_are_refused_with_what_does_not_fit(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"layer.weight": torch.zeros(32, 9), "layer.bias": torch.zeros(32), "head.bias": torch.zeros(2)}, path)
    message = refusal(path)
    assert message.startswith(f"{path}: does not fit {NAME}")
    assert "1 missing (norm)" in message
    assert "1 not part of it (head.bias)" in message
    assert "layer.weight (32, 9) instead of (32, 64)" in message


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(tmp_path, value):
    broken = {name: tensor.half() for name, tensor in EXPECTED.items()}
    broken["layer.bias"][5] = value
    torch.save(broken, tmp_path / "broken.pth")
    assert refusal(tmp_path / "broken.pth").startswith(
        f"{tmp_path / 'broken.pth'}: layer.bias holds NaN or infinity (1 of 32 numbers)"
    )


def test_a_submodule_called_module_is_not_taken_for_a_wrapper(tmp_path):
    named = {f"module.{name}" if name == "norm" else name: value for name, value in EXPECTED.items()}
    torch.save(named, tmp_path / "named.pth")
    assert load_weights(NAME, str(tmp_path / "named.pth"), named).state_dict.keys() == named.keys()


def test_a_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "absent.pth").startswith(f"{tmp_path / 'absent.pth'}: there is no such weights file")


def test_a_folder_gives_the_file_with_the_official_name(tmp_path):
    official = OfficialFile("small.pth", "https://example.org/small.pth", "0" * 64)
    assert "does not hold small.pth" in refusal(tmp_path, official=official)
    torch.save(EXPECTED, tmp_path / "small.pth")
    assert load_weights(NAME, str(tmp_path), EXPECTED, official).origin == "file"


def test_random_weights_depend_on_the_seed_alone_and_say_what_they_are():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (load_weights(NAME, f"random:{seed}", EXPECTED) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(again.state_dict, first.state_dict)
    assert not torch.equal(other.state_dict["layer.weight"], first.state_dict["layer.weight"])
    assert first.sha256 == first.origin == "random:0"


def test_a_random_tensor_does_not_change_when_the_model_has_others_before_it():
    alone = random_weights(0, {"layer.bias": EXPECTED["layer.bias"]})
    assert torch.equal(alone["layer.bias"], random_weights(0, EXPECTED)["layer.bias"])


@pytest.mark.parametrize("source", ["random:", "random:abc", "random:-1"])
def test_a_seed_that_is_no_number_is_refused(source):
    assert "whole number" in refusal(source)


def test_weights_without_an_official_place_have_to_be_given():
    assert "give a weights file" in refusal(None)


@pytest.fixture
def web(tmp_path):
    """A web server on this machine; `web.official(content)` publishes a file there."""
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


def test_the_official_file_is_downloaded_once_and_kept(home, web):
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


def test_a_kept_official_file_that_was_damaged_is_refused(home, web):
    official = web.official()
    load_weights(NAME, None, EXPECTED, official)
    torch.save({name: value + 1 for name, value in EXPECTED.items()}, home / "weights" / "small.pth")
    assert "delete it and run this again" in refusal(None, official=official)


def test_without_a_network_one_line_says_what_to_fetch_and_where_to_put_it(home):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/small.pth"
        message = refusal(None, official=OfficialFile("small.pth", url, "0" * 64))
    assert f"fetch {url} and put it at {home / 'weights' / 'small.pth'}" in message
    assert "refused" in message.lower()


def test_a_page_that_is_not_there_is_reported_the_same_way(home, web):
    official = OfficialFile("absent.pth", web.official().url.replace("small", "absent"), None)
    assert f"put it at {home / 'weights' / 'absent.pth'}" in refusal(None, official=official)


def test_a_download_that_breaks_off_is_not_kept(home):
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


def test_a_weights_folder_that_cannot_be_made_is_one_line(home, web):
    home.write_text("a file where the folder should be")
    assert "could not be downloaded" in refusal(None, official=web.official())


def test_the_openai_files_are_those_that_open_clip_names():
    import open_clip

    models = {"clip_vit_b_16": "ViT-B-16", "clip_vit_l_14": "ViT-L-14", "clip_vit_l_14_336": "ViT-L-14-336"}
    for name, model in models.items():
        assert OFFICIAL[name].url == open_clip.get_pretrained_url(model, "openai")


def test_every_official_file_has_a_hash_and_a_name_of_its_own():
    assert all(len(official.sha256 or "") == 64 for official in OFFICIAL.values())
    assert len({official.file for official in OFFICIAL.values()}) == len(OFFICIAL)


def test_the_weights_folder_follows_the_environment(home, monkeypatch):
    assert weights.weights_folder() == home / "weights"
    monkeypatch.delenv("REGIONSPOT_HOME")
    assert weights.weights_folder() == Path.home() / ".cache/regionspot/weights"
