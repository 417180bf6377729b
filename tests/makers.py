"""Makers of manifests, features and child processes for tests, so that a test states only what it is about."""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.cache import Category, FeatureCache, FeatureSet, ImageFeatures, Manifest


def make_manifest(counts: Sequence[int], **columns: Any) -> Manifest:
    """A split whose image `row` has `counts[row]` regions; `columns` replace the fields of Manifest that they name."""
    images, regions = len(counts), int(sum(counts))
    values = {
        "dataset": "toy",
        "split": "train",
        "image_ids": np.arange(images) + 100,
        "paths": [f"{row}.jpg" for row in range(images)],
        "heights": np.full(images, 480, np.int32),
        "widths": np.full(images, 640, np.int32),
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes_xyxy": np.random.default_rng(0).random((regions, 4), dtype=np.float32),
        "category_index": np.zeros(regions, np.int32),
        "annotation_ids": np.arange(regions),
        "categories": (Category(1, "cat"),),
        **columns,
    }
    return Manifest(**{**values, "paths": np.array(values["paths"], dtype=np.dtypes.StringDType())})


def make_features(manifest: Manifest, sets: Iterable[FeatureSet], row: int, seed: int = 0) -> ImageFeatures:
    """Random features of one image, drawn from its id and `seed`: equal wherever the image stands in a manifest."""
    rng, regions = np.random.default_rng([seed, int(manifest.image_ids[row]) % 2**32]), int(manifest.region_count[row])
    shapes = {each.name: each.shape if each.kind == "map" else (regions, *each.shape) for each in sets}
    return ImageFeatures(row, {name: rng.standard_normal(shape) for name, shape in shapes.items()})


def fill(
    cache: FeatureCache,
    parts: Iterable[int] | None = None,
    names: Sequence[str] | None = None,
    failures: Mapping[int, str] | None = None,
    seed: int = 0,
) -> FeatureCache:
    """Write `parts` (default: the pending ones) of the sets `names` (default: all); `failures` gives reasons by row."""
    sets, failures = [cache.feature_sets[name] for name in names or cache.feature_sets], failures or {}
    for part in cache.pending_parts(names) if parts is None else parts:
        images = (
            ImageFeatures(row, {}, failures[row]) if row in failures else make_features(cache.manifest, sets, row, seed)
            for row in cache.part_rows(part)
        )
        cache.write_part(part, images, names)
    return cache


def files_under(folder: Path, skip: str = r"$.") -> dict[str, bytes]:
    """The bytes of every file by its path in the folder, without paths that match the pattern `skip`."""
    names = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*")}
    return {name: path.read_bytes() for name, path in names.items() if not re.search(skip, name) and path.is_file()}


def cache_content(folder: Path, skip: str = r"$.") -> dict[str, bytes]:
    """The bytes of every file of a cache; part records without worker and time."""
    files = files_under(folder, skip)
    for name in [name for name in files if name.startswith("parts/")]:
        varying = ("worker", "seconds", "account", "crc32c")
        record = {key: value for key, value in json.loads(files[name]).items() if key not in varying}
        files[name] = json.dumps(record).encode()
    return files


def extracted_content(folder: Path) -> dict[str, bytes]:
    """`cache_content` of what does not depend on the number of runs, nor on processes that are still alive."""
    return cache_content(folder, r"^(claims|runs)/|^summary\.md|\.partial$")


def fork(function: Callable[[], object]) -> int:
    """Run `function` in a forked child, which exits with 0, or 1 after an error; its pid. Do not nest."""
    pid, code = os.fork(), 1
    if not pid:
        try:
            faulthandler.dump_traceback_later(100, exit=True)  # a child that hangs must not block the tests
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def was_killed(pid: int) -> bool:
    """Wait for a child; whether it was killed. Otherwise it must have succeeded."""
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WIFSIGNALED(status)


def error_in_fork(function: Callable[[], object]) -> Exception | None:
    """The error that `function` raises in a forked child, if any."""
    reader, writer = os.pipe()

    def run() -> None:
        error = None
        try:
            function()
        except Exception as raised:
            error = raised
        os.write(writer, pickle.dumps(error))

    pid = fork(run)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    assert not was_killed(pid)
    error: Exception | None = pickle.loads(content)
    return error
