"""`verify` finds every damage, names the file and the fix, and changes nothing."""

import json
import logging
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from regionspot.cache import FeatureCache, FeatureSet, InputError, NotACacheError, SchemaVersionError
from regionspot.cache.format.header import load_header
from regionspot.cache.format.part_record import load_record
from regionspot.cache.storage.atomic_files import partial_path, to_json
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.storage.open import open_storage
from regionspot.cache.storage.zarr_shard import with_crc
from regionspot.cache.tools.hdf5_export import export_hdf5
from regionspot.cache.tools.repair import repair
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.tools.verify import verify


@pytest.fixture
def full(small_folder, tmp_path) -> Path:
    return shutil.copytree(small_folder / "full", tmp_path / "c.zarr")


def change_byte(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def edit_record(folder: Path, name: str, **changes) -> None:
    """Change a part record and renew its checksum."""
    storage = LocalStorage(folder)
    replace(load_record(storage, name), **changes).save(storage, name)


def test_an_undamaged_cache_is_sound(full, small):
    before = {path: path.stat().st_mtime_ns for path in full.rglob("*")}
    report = verify(full)
    assert report.sound, report.text()
    assert (report.parts, report.pending, report.unfinished, report.warnings) == (15, 0, 0, ())
    files = [*full.glob("parts/*/*"), *full.glob("features/*/*/c.*")]
    assert report.bytes == sum(path.stat().st_size for path in files)
    assert {path: path.stat().st_mtime_ns for path in full.rglob("*")} == before
    assert "no problem: 15 parts" in report.text()


def test_an_open_or_unfinished_cache_is_verified(small, tmp_path):
    cache = small.create(tmp_path / "c.zarr")
    cache.write_part(1, map(small.features, cache.part_rows(1)), ["clip", "sam"])
    report = verify(cache)
    assert report.sound, report.text()
    assert (report.parts, report.pending) == (2, 13)


DAMAGES = {
    "a record's byte": ("features/clip/feature_map/c.1.0.0", 3, "1 of 3 records do not match", "drop"),
    "a compressed record's byte": ("features/clip-zstd/feature_map/c.1.0.0", 3, "1 of 3 records do not match", "drop"),
    "a token's byte": ("features/sam/token/c.1.0.0", 3, "1 of 2 records do not match", "drop"),
    "a scale's byte": ("features/clip-int8/scale/c.1.0", 3, "1 of 3 records do not match", "drop"),
    "an index's byte": ("features/clip/feature_map/c.1.0.0", -30, "does not match the checksum of its index", "drop"),
    "a checksum's byte": ("features/clip/crc32c/c.1", 0, "does not match the checksum of its own", "drop"),
    "a record file's byte": ("parts/clip/00001.json", 40, "does not match its own checksum", "drop"),
    "an array's metadata": ("features/clip/feature_map/zarr.json", 9, "is not what was written", "regenerate"),
    "a column's chunk": ("images/path/c.0", 5, "is not what was written", "restore"),
    "a column's metadata": ("images/negative_count/zarr.json", 5, "is not what was written", "regenerate"),
}


@pytest.mark.parametrize(("file", "place", "reason", "fix"), DAMAGES.values(), ids=DAMAGES)
def test_a_flipped_bit_is_found_and_named(full, file, place, reason, fix):
    change_byte(full / file, place)
    (problem,) = verify(full).problems
    assert reason in problem.reason
    assert (problem.path if fix != "drop" else problem.part, problem.fix) == (file if fix != "drop" else 1, fix)
    assert "\n" not in str(problem)


def test_a_damaged_record_names_its_image(full):
    change_byte(full / "features/clip/feature_map/c.1.0.0", 3)
    assert "the first is of row 4 (val2017/0004 ü.jpg)" in verify(full).text()


@pytest.mark.parametrize("name", ["features/sam/token/c.1.0.0", "features/sam/crc32c/c.1.0", "images/id/c.0"])
def test_a_missing_file_is_found(full, name):
    (full / name).unlink()
    (problem,) = verify(full).problems
    assert (problem.path, problem.reason) == (name, "is missing")


def test_swapped_files_of_two_parts_are_found(full):
    a, b = full / "features/sam-int8/crc32c/c.0.0", full / "features/sam-int8/crc32c/c.2.0"
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)
    assert [problem.part for problem in verify(full).problems] == [0, 2]
    shutil.copyfile(full / "images/height/c.0", full / "images/width/c.0")
    assert "images/width/c.0" in [problem.path for problem in verify(full).problems]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"regions": 74}, "regions: found 74, expected 70"),
        ({"first_row": 0}, "first_row: found 0, expected 4"),
        ({"failures": ()}, "has no record in slot 2, expected one"),
        ({"checksums": {}}, "checksums: found []"),
        ({"files": {}}, "files: found []"),
    ],
)
def test_a_part_record_that_contradicts_the_manifest_is_found(full, changes, reason):
    edit_record(full, "parts/clip/00001.json", **changes)
    (problem,) = verify(full).problems
    assert reason in problem.reason
    assert problem.part == 1


def test_swapped_part_records_are_found(full):
    shutil.copyfile(full / "parts/clip/00000.json", full / "parts/clip/00001.json")
    assert "part: found 0, expected 1" in verify(full).problems[0].reason


def test_tokens_after_the_last_region_are_found(full):
    shard, crcs = full / "features/sam/token/c.0.0.0", full / "features/sam/crc32c/c.0.0"
    data = bytearray(shard.read_bytes())
    data[10 * 6 * 4] = 1  # part 0 has eight regions
    shard.write_bytes(data)
    checksums = np.frombuffer(crcs.read_bytes()[:-4], "<u4").copy()
    checksums[0] = google_crc32c.value(bytes(data[: 64 * 6 * 4]))
    crcs.write_bytes(with_crc(checksums.tobytes()))
    edit_record(full, "parts/sam/00000.json", checksums={"features/sam/crc32c/c.0.0": google_crc32c.value(checksums)})
    (problem,) = verify(full).problems
    assert "has tokens after its 8 regions" in problem.reason


def test_the_root_metadata_is_verified_beyond_the_header(full):
    document = json.loads((full / "zarr.json").read_bytes())
    (full / "zarr.json").write_bytes(to_json({**document, "node_type": "array"}))
    (problem,) = verify(full).problems
    assert (problem.path, problem.fix) == ("zarr.json", "regenerate")
    assert problem.reason == "node_type is 'array', expected 'group'"
    document["attributes"]["somebody"] = {"note": 1}
    (full / "zarr.json").write_bytes(to_json(document))
    assert verify(full).sound


AGAIN = "was rewritten by another program; its content is correct"


def consolidated(full):
    zarr.consolidate_metadata(full)


def consolidated_and_then_extended(full):
    zarr.consolidate_metadata(full / "features/clip")
    consolidated(full)
    cache = FeatureCache.open(full)
    open_or_create(full, cache.manifest, [FeatureSet("more", "map", (2, 2))])


def consolidated_of_another_time(full):
    consolidated(full)
    edit_json(full / "zarr.json", lambda document: document["consolidated_metadata"]["metadata"].pop("features/sam"))


def attributes_in_zarr(full):
    group = zarr.open_group(full)
    group.attrs["lab"] = "north"
    for name in ("features/clip/feature_map", "images/path", "regions", "features/clip-int8/feature_map"):
        group[name].attrs["note"] = {"by": "me"}


def names_of_dimensions(full):
    edit_json(full / "features/sam/token/zarr.json", lambda document: document.update(dimension_names=["a", "b", "c"]))


def written_in_another_form(full):
    for name in ("zarr.json", "features/clip/feature_map/zarr.json", "images/id/zarr.json"):
        document = json.loads((full / name).read_bytes())
        (full / name).write_text(json.dumps(dict(sorted(document.items(), reverse=True)), separators=(",", ":")))


def an_empty_configuration(full):
    edit_json(full / "images/id/zarr.json", lambda document: document["codecs"][-1].update(configuration={}))


def metadata_of_format_2_beside(full):
    (full / ".zgroup").write_text('{"zarr_format": 2}')
    (full / ".zmetadata").write_text("{}")


HARMLESS = {
    consolidated: ["zarr.json: has consolidated metadata, which is correct and not needed"],
    consolidated_and_then_extended: [f"features/clip/zarr.json: {AGAIN}"],
    consolidated_of_another_time: [
        "zarr.json: its consolidated metadata is out of date for 1 array, the first is features/sam: other Zarr "
        "programs may use it; renew it with zarr.consolidate_metadata"
    ],
    attributes_in_zarr: [
        f"{name}/zarr.json: {AGAIN}"
        for name in ("features/clip-int8/feature_map", "features/clip/feature_map", "images/path", "regions")
    ],
    names_of_dimensions: [f"features/sam/token/zarr.json: {AGAIN}"],
    written_in_another_form: [
        f"{name}: {AGAIN}" for name in ("features/clip/feature_map/zarr.json", "images/id/zarr.json", "zarr.json")
    ],
    an_empty_configuration: [f"images/id/zarr.json: {AGAIN}"],
    metadata_of_format_2_beside: [f"{name}: is not a file of this cache" for name in (".zgroup", ".zmetadata")],
}


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore")  # Zarr warns about claims/, parts/ and .zgroup
def test_harmless_changes_by_zarr_tools_are_warnings(full, change, tmp_path):
    right = FeatureCache.open(full)
    change(full)
    report = verify(full)
    assert report.sound, report.text()
    assert [line for line in sorted(report.warnings) if f"zarr.json: {AGAIN}" != line] == [
        line for line in HARMLESS[change] if f"zarr.json: {AGAIN}" != line
    ]
    assert all("\n" not in line and len(line) < 300 for line in report.warnings)
    cache = FeatureCache.open(full)
    assert cache.manifest.digest() == right.manifest.digest()
    rows = right.valid_rows()
    actual, expected = (cache.read(rows, map_set="clip", token_set="sam") for cache in (cache, right))
    np.testing.assert_array_equal(actual.feature_map, expected.feature_map)
    export_hdf5(cache, tmp_path / "c.h5")
    assert len(FeatureCache.open(tmp_path / "c.h5")) == len(cache)


def edit_json(file, change):
    document = json.loads(file.read_bytes())
    change(document)
    file.write_text(json.dumps(document, indent=2))


HARMFUL = {
    "another dtype": (
        "features/clip/feature_map",
        lambda document: document.update(data_type="float32"),
        "data_type is 'float32', expected 'float16'",
    ),
    "no codec": ("features/clip-zstd/feature_map", lambda document: document.update(codecs=[]), "codecs is []"),
    "other chunk keys": (
        "images/id",
        lambda document: document["chunk_key_encoding"]["configuration"].update(separator="/"),
        "chunk_key_encoding is {'name': 'default', 'configuration': {'separator': '/'}}, expected",
    ),
    "our own attribute gone": (
        "features/clip-zstd/feature_map",
        lambda document: document.update(attributes={"note": 1}),
        "attribute regionspot_dtype is not 'bfloat16'",
    ),
    "a field that nobody knows": ("regions", lambda document: document.update(colour="red"), "colour is 'red'"),
    "a federated list of another length": (
        "images/negative_category",
        lambda document: document.update(shape=[9]),
        "is not what was written",
    ),
}


@pytest.mark.parametrize(("name", "change", "reason"), HARMFUL.values(), ids=HARMFUL)
def test_changed_metadata_is_a_problem_in_one_line(full, small, small_folder, name, change, reason):
    edit_json(full / name / "zarr.json", change)
    (problem,) = verify(full).problems
    assert reason in problem.reason
    assert (problem.path, problem.fix) == (f"{name}/zarr.json", "regenerate")
    assert len(str(problem)) < 400
    repair(full, verify(full))
    if "negative" not in name:
        assert small.content(full) == small.content(small_folder / "full")


@pytest.mark.parametrize("name", ["images/id", "images/negative_category", "regions/box"])
def test_a_column_with_changed_metadata_is_not_read(full, name):
    edit_json(full / name / "zarr.json", lambda document: document["shape"].__setitem__(0, 2))
    with pytest.raises(NotACacheError, match=f"{name}/zarr.json: .*restore it from a copy of the cache"):
        FeatureCache.open(full)


def test_quick_skips_only_the_bytes_of_records(full):
    change_byte(full / "features/clip/feature_map/c.1.0.0", 3)
    assert verify(full, quick=True).sound
    change_byte(full / "features/clip/feature_map/c.1.0.0", -30)
    assert not verify(full, quick=True).sound


def test_unfinished_files_are_counted_and_unknown_files_are_warnings(full):
    (full / "parts/clip/00001.json").unlink()
    (full / partial_path(full / "features/clip/feature_map/c.1.0.0").name).write_bytes(b"")
    (full / "features/clip/notes.txt").write_text("mine")
    report = verify(full)
    assert report.sound
    assert (report.parts, report.pending, report.unfinished) == (14, 1, 3)
    assert report.warnings == ("features/clip/notes.txt: is not a file of this cache",)


def test_an_unreadable_file_is_not_reported_as_damaged(full, monkeypatch):
    real = LocalStorage.read_into

    def refuse(self, name, offset, out):
        if "token" in name:
            raise OSError(5, "Input/output error")
        real(self, name, offset, out)

    monkeypatch.setattr(LocalStorage, "read_into", refuse)
    problems = verify(full).problems
    assert {(problem.fix, problem.feature_set) for problem in problems} == {("access", "sam"), ("access", "sam-int8")}
    assert "cannot be read: Input/output error" in problems[0].reason


def test_a_missing_array_is_reported_as_an_unmounted_disk(full):
    shutil.rmtree(full / "features/clip/feature_map")
    problems = verify(full).problems
    assert {problem.fix for problem in problems} == {"regenerate", "restore"}
    assert "a disk may not be mounted" in verify(full).text()


def test_a_part_dropped_during_verify_is_no_problem(full, monkeypatch):
    real = LocalStorage.list_files

    def names_then_drop(self, folder):
        names = real(self, folder)
        (full / "parts/clip/00001.json").unlink(missing_ok=True)
        return names

    monkeypatch.setattr(LocalStorage, "list_files", names_then_drop)
    assert verify(full).sound


def test_it_logs_progress(full, caplog):
    with caplog.at_level(logging.INFO, logger="regionspot.cache.progress"):
        verify(full)
    assert "15/15 parts" in caplog.text


def test_a_cache_that_cannot_be_opened_raises_the_same_error(full, tmp_path):
    with pytest.raises(NotACacheError, match="no such cache"):
        verify(tmp_path / "nothing")
    with pytest.raises(InputError, match="threads is 0, expected"):
        verify(full, threads=0)
    document = json.loads((full / "zarr.json").read_bytes())
    document["attributes"]["regionspot_schema"] = 2
    (full / "zarr.json").write_bytes(to_json(document))
    with pytest.raises(SchemaVersionError, match="has schema version 2"):
        verify(full)


def test_the_columns_are_compared_with_the_digest_though_their_files_are_unchanged(full):
    storage = LocalStorage(full)
    replace(load_header(storage), digest="0" * 64).save(storage)
    (problem,) = verify(full).problems
    assert (problem.path, problem.reason) == ("images", "do not match, with regions/, the digest in zarr.json")


def test_a_cache_in_an_object_store_is_verified_and_repaired(small):
    address = f"memory://{uuid.uuid4().hex}/c.zarr"
    small.extract(address)
    report = verify(address)
    assert report.sound, report.text()
    assert (report.parts, report.pending) == (15, 0)
    storage, name = open_storage(address), "features/clip-zstd/feature_map/c.1.0.0"
    data = bytearray(storage.read(name))
    data[3] ^= 4
    storage.write(name, bytes(data))
    report = verify(address)
    assert "1 of 3 records do not match" in report.text()
    repair(address, report)
    assert verify(address).pending == 1
    small.extract(address)
    assert verify(address).sound
