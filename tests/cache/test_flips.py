"""Flipped bits and truncated files anywhere in a cache: verify finds all, and no reader gets wrong data."""

import random
import shutil
import time
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from regionspot.cache import CacheError, FeatureCache, Ragged
from regionspot.cache.format import zarr_metadata as metadata
from regionspot.cache.format.header import load_header
from regionspot.cache.format.zarr_metadata import expected_metadata
from regionspot.cache.tools.hdf5_export import export_hdf5
from regionspot.cache.tools.verify import verify

CUTS = 0.2  # share of truncations; the others flip one bit
PAIRS = (("clip", "sam"), ("clip-int8", "sam-int8"), ("clip-zstd", "sam"))


def equal(a, b):
    if isinstance(a, Ragged):
        return equal(a.offsets, b.offsets) and equal(a.values, b.values)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def require_equal(a, b):
    for field in [field for field in fields(a) if not field.name.startswith("_")]:
        assert equal(getattr(a, field.name), getattr(b, field.name)), f"{field.name} is wrong"


def opened(path):
    try:
        return FeatureCache.open(path), ""
    except CacheError as error:
        return None, str(error)


def read(cache, rows, pair):
    """Batch of some rows; None if the read raises."""
    try:
        return cache.read(rows, map_set=pair[0], token_set=pair[1])
    except CacheError:
        return None


class Right:
    """The correct content of a cache."""

    def __init__(self, path):
        self.cache = FeatureCache.open(path)
        self.rows = self.cache.valid_rows()
        self.batches = {pair: self.cache.read(self.rows, map_set=pair[0], token_set=pair[1]) for pair in PAIRS}
        self.single = {(row, pair): read(self.cache, [row], pair) for row in self.rows for pair in PAIRS}

    def require_nothing_wrong(self, path):
        """Read and compare all of a damaged cache; whether it opened, and how many reads raised."""
        cache, refusal = opened(path)
        assert "\n" not in refusal
        if cache is None:
            return False, 0
        require_equal(cache.manifest, self.cache.manifest)
        assert (cache.categories, cache.feature_sets) == (self.cache.categories, self.cache.feature_sets)
        refused = 0
        try:
            assert np.array_equal(cache.valid_rows(), self.rows)
            assert cache.failures() == self.cache.failures()
        except CacheError:
            refused += 1
        for pair, right in self.batches.items():
            batch = read(cache, self.rows, pair)
            if batch is not None:
                require_equal(batch, right)
                continue
            for row in self.rows:
                batch = read(cache, [row], pair)
                refused += batch is None
                if batch is not None:
                    require_equal(batch, self.single[row, pair])
        return True, refused


def damaged(rng, data):
    """The bytes with one bit flipped or truncated, and the kind of damage."""
    if rng.random() < CUTS:
        return data[: rng.randrange(len(data))], "cut"
    changed, bit = bytearray(data), rng.randrange(8 * len(data))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed), "flip"


def kind_of(name):
    """Kind of a file, for the counts."""
    if name.endswith("zarr.json"):
        return "metadata"
    return name.split("/")[0 if name.startswith(("images", "regions", "parts")) else 2]


def stress(folder, tmp_path, seed, damages, monkeypatch):
    """Damage one file at a time and restore it; counts of detections by kind."""
    path, rng = shutil.copytree(folder / "full", tmp_path / "c.zarr"), random.Random(seed)
    right, counts = Right(path), Counter()
    # Computed once for thousands of damages: it depends only on the header and takes as long as the rest.
    expected = expected_metadata(load_header(right.cache.storage))
    monkeypatch.setattr(metadata, "expected_metadata", lambda header: expected)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for _ in range(damages):
        file = rng.choice(files)
        data = file.read_bytes()
        changed, how = damaged(rng, data)
        what = f"{how} in {file.relative_to(path)} of seed {seed}: {next_to(data, changed)}"
        file.write_bytes(changed)
        try:
            report = verify(path)
            assert not report.sound or report.warnings, f"not found: {what}"
        except CacheError:
            counts["refused by verify"] += 1
        counts["found"] += 1
        try:
            opened, refused = right.require_nothing_wrong(path)
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        counts[f"{how} of {kind_of(file.relative_to(path).as_posix())}"] += 1
        counts["refused to open" if not opened else "refused some reads" if refused else "read right"] += 1
        file.write_bytes(data)
    assert verify(path).sound
    return counts


def next_to(data, changed):
    place = next((at for at, (a, b) in enumerate(zip(data, changed, strict=False)) if a != b), len(changed))
    return f"at byte {place}, {data[max(place - 12, 0) : place + 12]!r}"


def test_damage_anywhere_is_found_and_never_read(small_folder, tmp_path, monkeypatch):
    counts = stress(small_folder, tmp_path, 0, 25, monkeypatch)
    assert counts["refused to open"] > 1
    assert counts["refused some reads"] > 1


def stress_one_file(folder, tmp_path, seed, damages):
    """The same for a cache in one HDF5 file, part of which only other programs read."""
    whole, path = export_hdf5(FeatureCache.open(folder / "full"), tmp_path / "c.h5"), tmp_path / "d.h5"
    right, counts, data, rng = Right(whole), Counter(), whole.read_bytes(), random.Random(seed)
    for _ in range(damages):
        path.unlink(missing_ok=True)  # a new file, because the old one may be mapped
        changed, how = damaged(rng, data)
        path.write_bytes(changed)
        opened, refused = right.require_nothing_wrong(path)
        counts["refused to open" if not opened else "refused some reads" if refused else "read right"] += 1
        try:
            detected = not verify(path).sound
        except CacheError:
            detected = True
        assert detected or not refused
        counts[f"{how} in one file, {'found' if detected else 'in what only other programs read'}"] += 1
    return counts


def test_damage_in_an_hdf5_file_is_never_read(small_folder, tmp_path):
    counts = stress_one_file(small_folder, tmp_path, 0, 15)
    assert counts["refused to open"] + counts["refused some reads"] > 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 9))
def test_damage_anywhere_is_found_and_never_read_in_full(
    small_folder, tmp_path, seed, monkeypatch, stress_result, stress_size
):
    started, damages = time.monotonic(), stress_size(1250)
    counts = stress(small_folder, tmp_path, seed, damages, monkeypatch)
    stress_result(seeds=[seed], seconds=time.monotonic() - started, damages=damages, wrong=0, **counts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_hdf5_file_in_full(small_folder, tmp_path, stress_result, stress_size):
    started, damages = time.monotonic(), stress_size(1000)
    counts = stress_one_file(small_folder, tmp_path, 1, damages)
    stress_result(seeds=[1], seconds=time.monotonic() - started, damages=damages, wrong=0, **counts)
