"""Small costs, in microseconds and megabytes: tokens of one image, opening a part, the memory of a loader."""

from __future__ import annotations

import gc
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import zarr

from benchmarks.bench_cache_data import BATCH, MAPS, PART, Features, manifest_of, write_cache
from benchmarks.goals import Samples, interleaved, say, seconds
from regionspot.cache import Batch, FeatureCache, FeatureSet, ImageFeatures

_TOKENS = FeatureSet("token", "token", (256,))
_TOKENS_A_IMAGE = 16
_SMALL_MAP = FeatureSet(MAPS, "map", (4, 64))  # 512 bytes a record: many parts cost little


def measure_tokens(folder: Path, rounds: int) -> Samples:
    """Microseconds for the tokens of one image, at random, by each way; the median of a part's images a round."""
    folder.mkdir(parents=True)
    cache = _write_tokens(folder / "cache.zarr")
    array = zarr.open_array(folder / "cache.zarr" / _TOKENS.array, mode="r")
    for row in range(PART):
        torch.save(torch.from_numpy(_tokens_of(row)), folder / f"{row}.pth")
    batch = Batch()

    def by_ours(row: int) -> Any:
        return cache.read([row], out=batch).tokens[0]

    def by_zarr(row: int) -> Any:
        first = row * _TOKENS_A_IMAGE
        return array[0, first : first + _TOKENS_A_IMAGE]

    def by_pth(row: int) -> Any:
        return torch.load(folder / f"{row}.pth", weights_only=True).numpy()

    ways = {"cache.read": by_ours, "zarr-python": by_zarr, ".pth an image": by_pth}
    for name, way in ways.items():
        if not all((way(row) == _tokens_of(row)).all() for row in range(PART)):
            raise ValueError(f"{name}: tokens came back wrong")
    samples = interleaved({name: _microseconds(way) for name, way in ways.items()}, rounds)
    shutil.rmtree(folder)
    return samples


def measure_opening(folder: Path, rounds: int) -> list[float]:
    """Milliseconds to open a part: its first read less a later one, the median of all parts, in every round."""
    _write_maps(folder / "cache.zarr", parts := 16)

    def opened() -> float:
        cache, batch = FeatureCache.open(folder / "cache.zarr"), Batch()
        cache.read([0], out=batch)  # the first part bears the cost of what is set up once
        firsts = [cache.part_rows(part)[0] for part in range(1, parts)]
        cold = [seconds(partial(cache.read, [row], out=batch)) for row in firsts]
        again = [seconds(partial(cache.read, [row + 1], out=batch)) for row in firsts]
        return 1e3 * (median(cold) - median(again))

    milliseconds = [opened() for _ in range(rounds)]
    shutil.rmtree(folder)
    return milliseconds


def measure_memory(features: Features, folder: Path) -> dict[float, float]:
    """Megabytes that a loader holds when its epoch ends, by the gigabytes of its cache: of so many records, and ten
    times as many.
    """
    held = {}
    for each in (features, replace(features, records=10 * features.records)):
        say(f"memory of a loader: {each.gigabytes:.2f} GB of {each.name}")
        write_cache(folder / "cache.zarr", each)
        held[each.gigabytes] = _held_by_loader(folder / "cache.zarr")
        shutil.rmtree(folder)
    return held


def _held_by_loader(path: Path) -> float:
    cache = FeatureCache.open(path)
    gc.collect()
    tracemalloc.start()
    for _ in cache.loader(BATCH):
        held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / 1e6


def _microseconds(way: Callable[[int], Any]) -> Callable[[], float]:
    rows = np.random.default_rng(0).permutation(PART).tolist()
    return lambda: 1e6 * median(seconds(partial(way, row)) for row in rows)


def _tokens_of(row: int) -> Any:
    return np.random.default_rng(row).standard_normal((_TOKENS_A_IMAGE, *_TOKENS.shape)).astype(np.float16)


def _write_tokens(path: Path) -> FeatureCache:
    cache = FeatureCache.create(path, manifest_of(PART, _TOKENS_A_IMAGE), [_TOKENS], PART)
    cache.write_part(0, (ImageFeatures(row, {_TOKENS.name: _tokens_of(row)}) for row in range(PART)))
    return cache


def _write_maps(path: Path, parts: int) -> None:
    cache = FeatureCache.create(path, manifest_of(parts * PART, regions=1), [_SMALL_MAP], PART)
    record = np.zeros(_SMALL_MAP.shape, np.float16)
    for part in range(parts):
        cache.write_part(part, (ImageFeatures(row, {MAPS: record}) for row in cache.part_rows(part)))
