"""`repair` drops damaged parts only; it leaves what it cannot repair and says what to do."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from makers import fork, was_killed

from regionspot import cli
from regionspot.cache import CacheError, FeatureCache, NotExtractedError
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.tools.repair import repair
from regionspot.cache.tools.verify import verify
from regionspot.cache.writing.claims import Claims


@pytest.fixture
def full(small_folder, tmp_path) -> Path:
    return shutil.copytree(small_folder / "full", tmp_path / "c.zarr")


def change_byte(file: Path, place: int = 3) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def test_a_damaged_part_is_dropped_and_the_next_extract_writes_it_again(full, small, small_folder):
    change_byte(full / "features/clip/feature_map/c.1.0.0")
    change_byte(full / "features/sam-int8/scale/c.2.0", -1)
    before = small.content(full)
    summary = repair(full, verify(full))
    assert [(problem.feature_set, problem.part) for problem in summary.dropped] == [("clip", 1), ("sam-int8", 2)]
    assert (summary.regenerated, summary.left) == ((), ())
    left = small.content(full)
    assert before.keys() - left.keys() == {
        "parts/clip/00001.json",
        "features/clip/feature_map/c.1.0.0",
        "features/clip/crc32c/c.1",
        "parts/sam-int8/00002.json",
        "features/sam-int8/token/c.2.0.0",
        "features/sam-int8/scale/c.2.0",
        "features/sam-int8/crc32c/c.2.0",
    }
    assert all(left[name] == before[name] for name in left)
    assert verify(full).pending == 2
    with pytest.raises(NotExtractedError):
        FeatureCache.open(full).read([4], map_set="clip", token_set="sam")
    small.extract(full)
    assert small.content(full) == small.content(small_folder / "full")


def test_a_dry_run_changes_nothing(full, small):
    change_byte(full / "features/clip/feature_map/c.1.0.0")
    change_byte(full / "features/sam/zarr.json")
    before = small.content(full)
    summary = repair(full, verify(full), dry_run=True)
    assert "part 1 of clip would be dropped" in summary.text()
    assert "features/sam/zarr.json: would be regenerated" in summary.text()
    assert small.content(full) == before


def test_a_sound_part_is_not_dropped_because_of_an_old_report(full, small, small_folder):
    change_byte(full / "features/clip/feature_map/c.1.0.0")
    report = verify(full)
    repair(full, report)
    small.extract(full)
    assert repair(full, report).dropped == ()
    assert small.content(full) == small.content(small_folder / "full")


def test_a_part_claimed_by_another_run_is_not_dropped(full):
    change_byte(full / "features/clip/feature_map/c.1.0.0")
    with Claims(LocalStorage(full)) as claims:
        assert claims.claim(1)
        summary = repair(full, verify(full))
    assert summary.dropped == ()
    assert "another run has claimed the part" in summary.text()
    assert repair(full, verify(full)).dropped


def test_metadata_is_regenerated_byte_for_byte_except_lengths_of_manifest_columns(full, small, small_folder):
    for file in full.rglob("zarr.json"):
        if file.parent != full:
            change_byte(file)
    summary = repair(full, verify(full))
    lost = {f"images/{name}_category/zarr.json" for name in ("negative", "not_exhaustive")}
    assert {problem.path for problem in summary.left} == lost
    assert all("restore it from a copy" in str(problem) for problem in summary.left)
    for name in lost:
        shutil.copyfile(small_folder / "full" / name, full / name)
    assert verify(full).sound
    assert small.content(full) == small.content(small_folder / "full")


def test_the_root_metadata_is_regenerated_around_the_header(full, small, small_folder):
    text = (full / "zarr.json").read_text().replace('"node_type": "group"', '"node_type": "grouq"')
    (full / "zarr.json").write_text(text)
    assert repair(full, verify(full)).regenerated == ("zarr.json",)
    assert verify(full).sound
    assert small.content(full) == small.content(small_folder / "full")


def test_nothing_is_dropped_when_a_disk_is_unmounted(full, small):
    away = full.parent / "away"
    shutil.move(full / "features/clip", away)
    before = small.content(full)
    for _ in range(2):
        summary = repair(full, verify(full))
        assert summary.dropped == ()
    assert {name: data for name, data in small.content(full).items() if name != "features/clip/zarr.json"} == before
    (full / "features/clip/zarr.json").unlink()
    (full / "features/clip").rmdir()
    shutil.move(away, full / "features/clip")
    assert verify(full).sound


def test_unreadable_files_are_not_dropped(full, small, monkeypatch):
    def refuse(self, name, offset, out):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "read_into", refuse)
        report = verify(full)
        assert len(report.problems) == 15
        assert repair(full, report).dropped == ()
    change_byte(full / "features/clip/feature_map/c.1.0.0")
    report = verify(full)
    monkeypatch.setattr(LocalStorage, "read_into", refuse)
    assert repair(full, report).dropped == ()
    assert verify(full).parts == 15


def die_at_removal(number):
    left, unlink = [number], os.unlink

    def dying(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(*args, **kwargs)

    os.unlink = dying


def test_a_killed_repair_is_finished_by_the_next(full, small, small_folder):
    change_byte(full / "features/clip/feature_map/c.1.0.0")
    change_byte(full / "features/sam-int8/scale/c.2.0", -1)
    for at_removal in range(1, 9):
        path = shutil.copytree(full, full.parent / f"{at_removal}.zarr")
        report = verify(path)

        def run(at_removal=at_removal, report=report, path=path):
            die_at_removal(at_removal)
            repair(path, report)

        assert was_killed(fork(run))
        left = {(problem.feature_set, problem.part) for problem in verify(path).problems}
        assert left <= {("clip", 1), ("sam-int8", 2)}
        repair(path, verify(path))
        assert verify(path).sound
        small.extract(path)
        assert small.content(path) == small.content(small_folder / "full")


def test_a_concurrent_reader_gets_the_right_bytes_or_an_error(full, small, small_folder):
    rows = [4, 5, 7]
    right = FeatureCache.open(small_folder / "full").read(rows, map_set="clip-zstd", token_set="sam")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        cache, end = FeatureCache.open(full), time.monotonic() + 20
        try:
            while time.monotonic() < end:
                try:
                    batch = cache.read(rows, map_set="clip-zstd", token_set="sam")
                    same = np.array_equal(batch.feature_map, right.feature_map)
                    os.write(write_end, b"s" if same and np.array_equal(batch.tokens, right.tokens) else b"w")
                except CacheError:
                    os.write(write_end, b"e")
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        answers = os.read(read_end, 1)
        for _ in range(4):
            change_byte(full / "features/clip-zstd/feature_map/c.1.0.0")
            shutil.copyfile(full / "features/sam/crc32c/c.0.0", full / "features/sam/crc32c/c.1.0")
            assert len(repair(full, verify(full)).dropped) == 2
            small.extract(full)
            answers += os.read(read_end, 1 << 16)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read_end)
    assert set(answers) - set(b"e") == set(b"s"), "the reader was given wrong data"


def test_the_commands_report_and_repair(full, capsys, monkeypatch):
    def regionspot(*arguments):
        monkeypatch.setattr("sys.argv", ["regionspot", "cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr().out

    assert regionspot("verify", full)[0] == 0
    change_byte(full / "features/clip/feature_map/c.1.0.0")
    change_byte(full / "images/id/c.0")
    code, output = regionspot("verify", full)
    assert code == 1
    assert "1 of 3 records do not match" in output
    assert "2 problems" in output
    assert regionspot("repair", full, "--dry-run")[0] == 1
    code, output = regionspot("repair", full)
    assert code == 1
    assert "1 part dropped" in output
    assert regionspot("verify", full.parent)[0] == 2
