"""The doctor on surroundings that are sound and on ones that are really broken."""

import hashlib
import json
import socket
import subprocess
import sys
from dataclasses import replace

from PIL import Image
from typer.testing import CliRunner

from regionspot.cli import app
from regionspot.pipeline.backbones.weights import OFFICIAL
from regionspot.pipeline.datasets.registry import image_folder_of
from regionspot.pipeline.doctor import machine
from regionspot.pipeline.doctor.models import check_weights
from regionspot.pipeline.doctor.paths import check_cache, check_dataset
from regionspot.pipeline.doctor.report import DoctorOptions, is_healthy
from regionspot.pipeline.doctor.run import examine


def states(findings) -> list[tuple[str, str]]:
    return [(each.check, each.state) for each in findings]


def test_a_sound_machine_passes_with_an_image_through_every_stage(tmp_path, home):
    found = list(examine(DoctorOptions(cache=str(tmp_path / "new" / "c.zarr"), preset="toy", device="cpu")))
    assert is_healthy(found), [each.line() for each in found]
    checks = [each.check for each in found]
    for check in ("python", "packages", "torch", "allocator", "decoder", "disk", "write rate", "weights", "stages"):
        assert check in checks
    stages = next(each.text for each in found if each.check == "stages")
    for stage in ("load", "decode", "encode", "tokens", "write", "verify"):
        assert f" {stage} " in stages
    assert list(tmp_path.iterdir()) == []  # neither the cache nor what was written to measure the disk


def test_the_command_exits_with_1_and_names_the_mend_when_something_fails(tmp_path):
    done = CliRunner().invoke(app, ["doctor", "--json", "--preset", "bl", "--weights", str(tmp_path)])
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    failed = [each for each in report["findings"] if each["state"] == "fail"]
    assert not report["ok"]
    assert [each["check"] for each in failed] == ["weights", "weights"]
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth" in failed[0]["mend"]


def test_weights_are_held_against_their_checksum(tmp_path, home, monkeypatch):
    whole = b"weights" * 1000
    for name in ("sam_vit_b", "clip_vit_l_14"):
        monkeypatch.setitem(OFFICIAL, name, replace(OFFICIAL[name], sha256=hashlib.sha256(whole).hexdigest()))
        (tmp_path / OFFICIAL[name].file).write_bytes(whole)
    asked = DoctorOptions(preset="bl", weights=str(tmp_path))
    assert states(check_weights(asked)) == [("weights", "ok")] * 2
    (tmp_path / OFFICIAL["clip_vit_l_14"].file).write_bytes(whole[:-1])
    sam, clip = check_weights(asked)
    assert (sam.state, clip.state) == ("ok", "fail")
    assert "6,999 bytes" in clip.text
    assert "delete it and download" in clip.mend


def test_a_place_that_may_not_be_written_fails_and_says_so():
    (found,) = [each for each in check_cache(DoctorOptions(cache="/proc/c.zarr")) if each.check == "write rate"]
    assert found.state == "fail"
    assert "/proc" in found.text


def test_a_disk_that_takes_no_more_fails_and_nothing_is_left_on_it(tmp_path):
    """A limit on the size of files refuses bytes in the middle of one, as a full disk does."""
    code = (
        "import resource, signal, sys\n"
        "from regionspot.pipeline.doctor.report import DoctorOptions\n"
        "from regionspot.pipeline.doctor.paths import check_cache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "print([each.line() for each in check_cache(DoctorOptions(cache=sys.argv[1]))][-1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.zarr")], capture_output=True, text=True)
    assert done.stdout.startswith("fail  write rate"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_is_written_to_and_left_as_it_was(s3):
    found = list(check_cache(DoctorOptions(cache=f"{s3}/c.zarr")))
    assert states(found) == [("write rate", "ok")]
    from regionspot.cache.storage.open import open_storage

    assert open_storage(f"{s3}/c.zarr").list_files("") == []


def test_a_cache_that_is_damaged_is_found(tmp_path):
    path = tmp_path / "c.zarr"
    path.mkdir()
    (path / "zarr.json").write_text("{")
    assert states(check_cache(DoctorOptions(cache=str(path))))[0] == ("cache", "fail")


def test_a_dataset_is_read_its_images_looked_for_and_one_is_opened(world, tmp_path):
    asked = DoctorOptions(data=world, dataset="toy")
    assert states(check_dataset(asked)) == [("data", "ok"), ("data", "ok")]
    missing = next(image_folder_of("toy", world).rglob("*.jpg"))
    kept = missing.rename(tmp_path / "kept.jpg")
    first, _ = check_dataset(asked)
    kept.rename(missing)
    assert first.state == "warn"
    assert missing.name in first.text
    assert states(check_dataset(DoctorOptions(data=tmp_path, dataset="toy"))) == [("data", "fail")]


def test_an_annotation_file_is_read_by_itself_or_with_the_images(tmp_path, regionspot):
    path = tmp_path / "boxes.json"
    images = [{"id": 1, "height": 20, "width": 30, "file_name": "a.jpg"}]
    content = {"images": images, "categories": [{"id": 1, "name": "cat"}]}
    path.write_text(json.dumps({**content, "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 28, 18]}]}))
    _, said, _ = regionspot("doctor", "--annotations", path, "--json")
    found = [each for each in json.loads(said)["findings"] if each["check"] == "data"]
    assert [(each["state"], "1 images, 1 regions" in each["text"]) for each in found] == [("ok", True)]
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    asked = DoctorOptions(data=tmp_path, dataset="coco", annotations=path)
    assert states(check_dataset(asked)) == [("data", "ok"), ("data", "ok")]
    box = {"image_id": 1, "category_id": 1, "bbox": [20, 10, 29, 19]}
    path.write_text(json.dumps({**content, "annotations": [box]}))
    first, *_ = check_dataset(asked)
    assert (first.state, "they look like x1, y1, x2, y2 in pixels" in first.text) == ("warn", True)
    path.write_text(json.dumps({**content, "annotations": []}))
    assert states(check_dataset(asked)) == [("data", "fail")]


def test_a_port_in_use_fails_and_a_free_one_does_not():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (found,) = machine.check_metrics_port(DoctorOptions(metrics_port=port))
    assert found.state == "fail"
    assert f"port {port}" in found.text
    (found,) = machine.check_metrics_port(DoctorOptions(metrics_port=port))
    assert found.state == "ok"


def test_a_package_that_is_too_old_is_named_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(machine, "versions", lambda *_: {"zarr": "2.18.0"})
    found = [
        each
        for each in machine.check_packages(DoctorOptions())
        if each.state == "fail" and each.text.startswith("zarr")
    ]
    assert [each.mend for each in found] == ["pip install 'zarr<4,>=3.1'"]


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken(_):
        raise ImportError("libtorch.so: cannot open\nshared object file")

    monkeypatch.setattr(machine, "check_torch", broken)
    found = list(examine(DoctorOptions(device="cpu")))
    (bad,) = [each for each in found if each.state == "fail"]
    assert bad.text == "ImportError: libtorch.so: cannot open"
    assert found[-1].check == "stages"
