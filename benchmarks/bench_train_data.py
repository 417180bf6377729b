"""What the training benchmark reads: synthetic caches of full-size records, a vocabulary, and what a run is made of.

Values are random: what a step costs does not depend on them. A cache for the start-up measurement is sparse: its part
records, checksums, indices and manifest are complete, and its features are holes in files, which read as zeros.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import google_crc32c
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regionspot.cache import Category, FeatureCache, FeatureSet, ImageFeatures, Manifest
from regionspot.cache.format.encodings import encode
from regionspot.cache.format.feature_dtypes import Statistics
from regionspot.cache.format.part_record import PartRecord, part_identity, set_crc
from regionspot.cache.format.schema import EncodedFeatures, checksum_file, part_files, record_file, shard_file
from regionspot.cache.storage.atomic_files import file_crc
from regionspot.cache.storage.base import Access
from regionspot.cache.storage.zarr_shard import with_crc
from regionspot.fusion.training.batches import TrainingBatch, batch_shares, read_batches
from regionspot.fusion.training.config import TrainConfig
from regionspot.fusion.training.step import TrainStep
from regionspot.fusion.training.training_sets import TrainingSet, head_spec_for, open_training_set
from regionspot.fusion.vocabulary import Vocabulary

CLASSES = 365  # of Objects365
REGIONS = 15.8  # an image of Objects365 on average (Shao et al. 2019, table 1)
MOST_REGIONS = 100

_PATTERNS = 64  # distinct records; writing is then limited by the disk, not by drawing numbers


@dataclass(frozen=True)
class Shapes:
    """Shapes of the features of a preset: T map tokens of width D, tokens of width C, text embeddings of width E."""

    map: tuple[int, int]
    token: int
    text: int


# 14 x 14, 16 x 16 and 24 x 24 patches and a class token; widths as in fusion/head.py.
SHAPES = {
    "bb": Shapes((197, 768), 256, 512),
    "bl": Shapes((257, 1024), 256, 768),
    "bl336": Shapes((577, 1024), 256, 768),
    "tiny": Shapes((5, 16), 8, 8),  # to check that a benchmark runs
}


@dataclass(frozen=True)
class TrainingData:
    """A dataset of `images` images with the features of a preset, stored as `dtype`."""

    preset: str
    images: int
    dtype: str = "float16"
    regions: float = REGIONS
    part_size: int = 512  # the cache's own default

    @property
    def shapes(self) -> Shapes:
        return SHAPES[self.preset]

    @property
    def record_bytes(self) -> int:
        """Bytes of a feature map as stored, without the scales of int8."""
        return self.sets[0].record_bytes

    @functools.cached_property
    def sets(self) -> tuple[FeatureSet, FeatureSet]:
        """The feature sets: maps, and tokens of the same dtype."""
        shapes, dtype = self.shapes, self.dtype
        return (
            FeatureSet("map", "map", shapes.map, dtype, statistics=self._statistics(shapes.map[1])),
            FeatureSet("token", "token", (shapes.token,), dtype, statistics=self._statistics(shapes.token)),
        )

    def _statistics(self, width: int) -> Statistics | None:
        ones = np.ones(width, np.float32)
        return Statistics(0 * ones, ones) if self.dtype == "int8" else None

    @functools.cached_property
    def manifest(self) -> Manifest:
        """Region counts follow a geometric distribution: most images have few regions, some have many."""
        rng = np.random.default_rng(0)
        counts = np.minimum(rng.geometric(1 / self.regions, self.images), MOST_REGIONS)
        total = int(counts.sum())
        corners = rng.random((total, 2, 2), dtype=np.float32) * np.array([640, 480], np.float32)
        return Manifest(
            dataset="synthetic",
            split="train",
            image_ids=np.arange(self.images, dtype=np.int64),
            paths=np.array([f"{row:012d}.jpg" for row in range(self.images)], dtype=np.dtypes.StringDType()),
            heights=np.full(self.images, 480, np.int32),
            widths=np.full(self.images, 640, np.int32),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes_xyxy=np.concatenate([corners.min(1), corners.max(1)], axis=1),
            category_index=rng.integers(0, CLASSES, total, dtype=np.int32),
            annotation_ids=np.arange(total, dtype=np.int64),
            categories=tuple(Category(index + 1, name) for index, name in enumerate(_class_names())),
        )

    def vocabulary(self) -> Vocabulary:
        """Random embeddings of the dataset's classes."""
        random = torch.randn(CLASSES, self.shapes.text, generator=torch.Generator().manual_seed(0))
        return Vocabulary(_class_names(), ("{}.",), F.normalize(random, dim=-1), digest="synthetic")


def _class_names() -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(CLASSES))


def write_cache(path: Path, data: TrainingData) -> None:
    """Write the whole cache, with random features."""
    cache = FeatureCache.create(path, data.manifest, data.sets, data.part_size)
    rng = np.random.default_rng(0)
    maps, tokens = data.sets
    map_patterns = _encoded(rng, (_PATTERNS, *maps.shape), maps)
    token_patterns = _encoded(rng, (_PATTERNS, MOST_REGIONS, *tokens.shape), tokens)
    counts = data.manifest.region_count.tolist()

    def image(row: int) -> ImageFeatures:
        of_regions = token_patterns[row % _PATTERNS]
        scales = of_regions.scales
        regions = slice(counts[row])
        cut = EncodedFeatures(of_regions.codes[regions], None if scales is None else scales[regions])
        return ImageFeatures(row, {maps.name: map_patterns[row % _PATTERNS], tokens.name: cut})

    for part in range(cache.n_parts):
        cache.write_part(part, (image(row) for row in cache.part_rows(part)))


def _encoded(rng: np.random.Generator, shape: tuple[int, ...], feature_set: FeatureSet) -> list[EncodedFeatures]:
    encoded = []
    for _ in range(shape[0]):
        codes, scales = encode(rng.standard_normal(shape[1:], dtype=np.float32), feature_set)
        encoded.append(EncodedFeatures(codes.copy(), None if scales is None else scales.copy()))
    return encoded


def write_sparse_cache(path: Path, data: TrainingData) -> None:
    """Write a cache whose features are holes in sparse files; nothing is flushed.

    Terabytes of features take seconds and a few hundred megabytes of disk. The number of images must be a multiple of
    the part size.
    """
    cache = FeatureCache.create(path, data.manifest, data.sets, data.part_size)
    for feature_set in data.sets:
        for folder in (feature_set.array, feature_set.checksums, f"parts/{feature_set.name}"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        crc = set_crc(feature_set)
        for part in range(cache.n_parts):
            _write_sparse_part(path, cache, feature_set, part, crc)


def _write_sparse_part(path: Path, cache: FeatureCache, feature_set: FeatureSet, part: int, crc: int) -> None:
    rows, offsets = cache.part_rows(part), cache.manifest.offsets
    regions = int(offsets[rows.stop] - offsets[rows.start])
    slots, size = cache.geometry.slots(feature_set), feature_set.record_bytes
    records = len(rows) if feature_set.kind == "map" else -(-regions // feature_set.record_shape[0])
    index = np.full((slots, 2), np.uint64(2**64 - 1), dtype="<u8")  # as an empty slot has it
    index[:records] = np.stack([np.arange(records) * size, np.full(records, size)], axis=1)
    with (path / shard_file(feature_set, part)).open("wb") as file:
        file.seek(records * size)
        file.write(with_crc(index.tobytes()))
        shard_bytes = file.tell()
    checksums = np.zeros(slots, dtype="<u4")
    checksums[:records] = _crc_of_zeros(size)
    name, stored = checksum_file(feature_set, part), with_crc(checksums.tobytes())
    (path / name).write_bytes(stored)
    record = PartRecord(
        part=part,
        first_row=rows.start,
        images=len(rows),
        regions=regions,
        files=dict(zip(part_files(feature_set, part), (shard_bytes, len(stored)), strict=True)),
        checksums={name: file_crc(stored)},
        failures=(),
        worker="",
        seconds=0.0,
        identity=part_identity(rows, cache.manifest, crc),
    )
    (path / record_file(feature_set.name, part)).write_bytes(record.to_json())


@functools.cache
def _crc_of_zeros(size: int) -> int:
    return int(google_crc32c.value(bytes(size)))


class TrainingRun:
    """The batches and the step of a training run on one cache; both are the code of `regionspot train`."""

    def __init__(self, data: TrainingData, path: Path, config: TrainConfig, device: str = "cpu") -> None:
        self.data, self.path, self.config, self.device = data, path, config, torch.device(device)
        self.step = self.new_step()

    def new_step(self, compiled: Callable[[nn.Module], nn.Module] = lambda head: head) -> TrainStep:
        """A step of a new head; `compiled` may wrap the head."""
        vocabulary = self.data.vocabulary()
        torch.manual_seed(self.config.seed)
        head = head_spec_for(self._sets("auto"), [vocabulary], self.config).build()
        text = vocabulary.embeddings.to(self.device)
        return TrainStep(compiled(head.to(self.device).train()), self.config, [text], self.device)

    def batches(self, access: Access = "auto") -> Generator[TrainingBatch]:
        """All batches from the first step on, by a cache opened anew: every record is compared with its checksum."""
        sets = self._sets(access)
        return read_batches(sets, batch_shares(sets), self.config, self.device)

    def copies(self, steps: int) -> list[TrainingBatch]:
        """The first batches, in memory of their own on the device."""
        # By `pread`: the copies keep the cache open, and files that are mapped cannot be dropped from the page cache.
        with closing(self.batches("pread")) as batches:
            return [_copy_of(batch) for batch in itertools.islice(batches, steps)]

    def _sets(self, access: Access) -> list[TrainingSet]:
        return [open_training_set(FeatureCache.open(self.path, access=access))]


def _copy_of(batch: TrainingBatch) -> TrainingBatch:
    return replace(batch, **{name: value.clone() for name, value in vars(batch).items() if isinstance(value, Tensor)})
