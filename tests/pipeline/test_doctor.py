"""The doctor on working and on broken machines."""

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
    return [(finding.check, finding.state) for finding in findings]


def test_a_working_machine_passes_with_an_image_through_every_stage(tmp_path, home):
    findings = list(examine(DoctorOptions(cache=str(tmp_path / "new" / "c.zarr"), preset="toy", device="cpu")))
    assert is_healthy(findings), [finding.line() for finding in findings]
    checks = [finding.check for finding in findings]
    for check in ("python", "packages", "torch", "allocator", "decoder", "disk", "write rate", "weights", "stages"):
        assert check in checks
    stages = next(finding.text for finding in findings if finding.check == "stages")
    for stage in ("load", "decode", "encode", "tokens", "write", "verify"):
        assert f" {stage} " in stages
    assert list(tmp_path.iterdir()) == []  # no cache, and no file of the disk check


def test_the_command_exits_with_1_and_says_how_to_fix_what_fails(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--json", "--preset", "bl", "--weights", str(tmp_path)])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    failed = [finding for finding in report["findings"] if finding["state"] == "fail"]
    assert not report["ok"]
    assert [finding["check"] for finding in failed] == ["weights", "weights"]
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth" in failed[0]["mend"]


def test_weights_are_compared_with_their_checksum(tmp_path, home, monkeypatch):
    content = b"weights" * 1000
    for name in ("sam_vit_b", "clip_vit_l_14"):
        monkeypatch.setitem(OFFICIAL, name, replace(OFFICIAL[name], sha256=hashlib.sha256(content).hexdigest()))
        (tmp_path / OFFICIAL[name].file).write_bytes(content)
    options = DoctorOptions(preset="bl", weights=str(tmp_path))
    assert states(check_weights(options)) == [("weights", "ok")] * 2
    (tmp_path / OFFICIAL["clip_vit_l_14"].file).write_bytes(content[:-1])
    sam, clip = check_weights(options)
    assert (sam.state, clip.state) == ("ok", "fail")
    assert "6,999 bytes" in clip.text
    assert "delete it and download" in clip.mend


def test_a_cache_path_that_cannot_be_written_fails():
    *_, finding = check_cache(DoctorOptions(cache="/proc/c.zarr"))
    assert (finding.check, finding.state) == ("write rate", "fail")
    assert "/proc" in finding.text


def test_a_full_disk_fails_and_the_test_file_is_removed(tmp_path):
    """A limit on file sizes fails in the middle of a file, as a full disk does."""
    code = (
        "import resource, signal, sys\n"
        "from regionspot.pipeline.doctor.report import DoctorOptions\n"
        "from regionspot.pipeline.doctor.paths import check_cache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "print([finding.line() for finding in check_cache(DoctorOptions(cache=sys.argv[1]))][-1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.zarr")], capture_output=True, text=True)
    assert done.stdout.startswith("fail  write rate"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_is_left_unchanged(s3, monkeypatch):
    monkeypatch.setenv("REGIONSPOT_PATIENCE", "60")  # the server stores 256 MB, next to other tests
    findings = list(check_cache(DoctorOptions(cache=f"{s3}/c.zarr")))
    assert states(findings) == [("write rate", "ok")], [finding.line() for finding in findings]
    from regionspot.cache.storage.open import open_storage

    assert open_storage(f"{s3}/c.zarr").list_files("") == []


def test_a_damaged_cache_fails(tmp_path):
    path = tmp_path / "c.zarr"
    path.mkdir()
    (path / "zarr.json").write_text("{")
    assert states(check_cache(DoctorOptions(cache=str(path))))[0] == ("cache", "fail")


def test_a_dataset_is_read_and_its_images_are_checked(world, tmp_path):
    options = DoctorOptions(data=world, dataset="toy")
    assert states(check_dataset(options)) == [("data", "ok"), ("data", "ok")]
    missing = next(image_folder_of("toy", world).rglob("*.jpg"))
    kept = missing.rename(tmp_path / "kept.jpg")
    first, _ = check_dataset(options)
    kept.rename(missing)
    assert first.state == "warn"
    assert missing.name in first.text
    assert states(check_dataset(DoctorOptions(data=tmp_path, dataset="toy"))) == [("data", "fail")]


def test_an_annotation_file_is_checked_without_or_with_images(tmp_path, regionspot):
    path = tmp_path / "boxes.json"
    images = [{"id": 1, "height": 20, "width": 30, "file_name": "a.jpg"}]
    content = {"images": images, "categories": [{"id": 1, "name": "cat"}]}
    path.write_text(json.dumps({**content, "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 28, 18]}]}))
    _, out, _ = regionspot("doctor", "--annotations", path, "--json")
    (finding,) = [finding for finding in json.loads(out)["findings"] if finding["check"] == "data"]
    assert (finding["state"], "1 images, 1 regions" in finding["text"]) == ("ok", True)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    options = DoctorOptions(data=tmp_path, dataset="coco", annotations=path)
    assert states(check_dataset(options)) == [("data", "ok"), ("data", "ok")]
    box = {"image_id": 1, "category_id": 1, "bbox": [20, 10, 29, 19]}
    path.write_text(json.dumps({**content, "annotations": [box]}))
    first, *_ = check_dataset(options)
    assert (first.state, "they look like x1, y1, x2, y2 in pixels" in first.text) == ("warn", True)
    path.write_text(json.dumps({**content, "annotations": []}))
    assert states(check_dataset(options)) == [("data", "fail")]


def test_a_port_in_use_fails_and_a_free_one_does_not():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        (finding,) = machine.check_metrics_port(DoctorOptions(metrics_port=port))
    assert finding.state == "fail"
    assert f"port {port}" in finding.text
    (finding,) = machine.check_metrics_port(DoctorOptions(metrics_port=port))
    assert finding.state == "ok"


def test_an_outdated_package_is_named_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(machine, "versions", lambda *_: {"zarr": "2.18.0"})
    findings = machine.check_packages(DoctorOptions())
    assert [finding.mend for finding in findings if finding.text.startswith("zarr is")] == [
        "pip install 'zarr<4,>=3.1'"
    ]


def test_an_error_in_a_check_is_a_finding_and_the_other_checks_still_run(monkeypatch):
    def broken(_):
        raise ImportError("libtorch.so: cannot open\nshared object file")

    monkeypatch.setattr(machine, "check_torch", broken)
    findings = list(examine(DoctorOptions(device="cpu")))
    (failed,) = [finding for finding in findings if finding.state == "fail"]
    assert failed.text == "ImportError: libtorch.so: cannot open"
    assert findings[-1].check == "stages"
