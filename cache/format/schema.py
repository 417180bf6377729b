"""What a cache holds, in types: its feature sets, the features of one image, and where a part's files lie.

Everything on disk follows from the numbers of `Geometry`, which are known before extraction begins; so every
array has its final shape at once and no two parts ever share a file.

    features/clip_vit_l_14/feature_map   (N, 257, 1024)   a shard is a part, an inner chunk one image
    features/clip_vit_l_14/scale         (N, 257)         int8 only: of each row of D channels, in shards likewise
    features/clip_vit_l_14/crc32c        (N,)             of each inner chunk as it lies on disk, then of its scales
    features/sam_vit_b/token             (P, CAP, 256)    a shard is a part, an inner chunk 64 regions
    features/sam_vit_b/scale             (P, CAP)         int8 only
    features/sam_vit_b/crc32c            (P, CAP / 64)    of each inner chunk, then of its scales
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regionspot.cache.errors import InputError
from regionspot.cache.format.encodings import STORED, Statistics

SCHEMA_VERSION = 1
MAX_PART_SIZE = 65_536  # images; a shard's index takes 16 bytes for each, read whole
TOKEN_CHUNK = 64  # regions in one inner chunk: 32 KB of 256 float16, so small parts cost little and reads stay few

PART_SIZE = 512  # images: 270 MB of CLIP's maps, which is written and fetched as a whole

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ARRAY_NAMES = {"map": "feature_map", "token": "token"}
_COMPRESSIONS = (None, "zstd")


@dataclass(frozen=True)
class FeatureSet:
    """One backbone's output over all images (`map`: one record an image) or all regions (`token`: one row a region).

    name        folder under features/: letters, digits, `_`, `-` and `.`
    shape       of one record: (T, D) of a map, class token first unless `class_token` in the provenance is false;
                (C,) of a token
    dtype       as stored: float16, float32, bfloat16 (on disk its 16 bits, as uint16) or int8 (with a float16 scale
                for each row of D or C channels)
    provenance  JSON-able, all that decides the numbers: model, weights sha256, input size, resize rule. Its
                `versions` are kept but never refused: another torch gives the same features up to rounding
    compression None or "zstd": each inner chunk compressed by itself
    statistics  what int8 standardises the channels by, from `statistics_of`; a cache is made with them and whoever
                goes on with it takes those that it has

    Raises InputError for a name, shape, dtype, provenance, compression or statistics that cannot be stored.
    """

    name: str
    kind: Literal["map", "token"]
    shape: tuple[int, ...]
    dtype: str = "float16"
    provenance: dict[str, Any] = field(default_factory=dict)
    compression: Literal["zstd"] | None = None
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(f"feature set {self.name!r}: a name is letters, digits, '_', '-' and '.'")
        if self.kind not in _ARRAY_NAMES:
            raise InputError(f"feature set {self.name}: kind is {self.kind!r}, expected 'map' or 'token'")
        if len(self.shape) != (2 if self.kind == "map" else 1) or min(self.shape) < 1:
            raise InputError(
                f"feature set {self.name}: shape is {self.shape}, expected (T, D) of a map, (C,) of a token"
            )
        if self.dtype not in STORED:
            raise InputError(f"feature set {self.name}: dtype is {self.dtype!r}, expected one of {', '.join(STORED)}")
        if self.compression not in _COMPRESSIONS:
            raise InputError(f"feature set {self.name}: compression is {self.compression!r}, expected None or 'zstd'")
        self._check_statistics()
        object.__setattr__(self, "provenance", self._provenance_as_json())

    def _check_statistics(self) -> None:
        if self.statistics is None:
            return
        if self.dtype != "int8":
            raise InputError(
                f"feature set {self.name}: statistics are for int8, its dtype is {self.dtype}; leave them out"
            )
        channels = len(self.statistics.mean)
        if channels != self.shape[-1]:
            raise InputError(f"feature set {self.name}: statistics of {channels} channels, expected {self.shape[-1]}")

    def _provenance_as_json(self) -> Any:
        """The provenance as it will come back from disk, so that the two compare equal."""
        try:
            return json.loads(json.dumps(self.provenance, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InputError(f"feature set {self.name}: provenance cannot be stored as JSON: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Every field, as it lies in zarr.json."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "compression": self.compression,
            "statistics": None if self.statistics is None else self.statistics.to_json(),
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, words: dict[str, Any]) -> FeatureSet:
        """The feature set that `to_json` wrote; equal to it, statistics to the bit."""
        statistics = words["statistics"]
        read = None if statistics is None else Statistics.from_json(statistics)
        return cls(**{**words, "shape": tuple(words["shape"]), "statistics": read})

    @property
    def array(self) -> str:
        """The array's path inside the cache."""
        return f"features/{self.name}/{_ARRAY_NAMES[self.kind]}"

    @property
    def checksums(self) -> str:
        """Path of the array that holds the crc32c of every inner chunk."""
        return f"features/{self.name}/crc32c"

    @property
    def has_scales(self) -> bool:
        """Whether a record is more than its numbers: int8 has a float16 scale for each of their rows."""
        return self.dtype == "int8"

    @property
    def scales(self) -> str:
        """Path of the array that holds the scales, where there are any."""
        return f"features/{self.name}/scale"

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype on disk: little-endian, as the bytes codec says; uint16 for the bits of bfloat16."""
        return np.dtype(STORED[self.dtype])

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Shape of one inner chunk without its leading 1: one image's map, or TOKEN_CHUNK rows of tokens."""
        return self.shape if self.kind == "map" else (TOKEN_CHUNK, *self.shape)

    @property
    def record_bytes(self) -> int:
        """Bytes of one inner chunk's numbers, before compression and without scales."""
        return math.prod(self.record_shape) * self.stored.itemsize

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales of one inner chunk: a float16 for each row of channels."""
        return self.record_shape[:-1]


@dataclass(frozen=True)
class EncodedFeatures:
    """Features in the form of their set on disk, which are written as they are: from a cache of the same encoding.

    codes    as floating features would be shaped, in the dtype `FeatureSet.stored`
    scales   float16, of each row of codes, where the set has scales
    """

    codes: NDArray[Any]
    scales: NDArray[np.float16] | None = None


@dataclass
class ImageFeatures:
    """What the backbones said about the image at `row`.

    features[map set]    floating (T, D)
    features[token set]  floating (regions of the image, C), in the manifest's order; or either `EncodedFeatures`
    failure              why the image could not be read; its features are then left out
    batch_sizes[set]     images that were computed together, this one included, where that is known; also of one that
                         failed, for its place in the batch stayed blank
    """

    row: int
    features: dict[str, NDArray[Any] | EncodedFeatures]
    failure: str | None = None
    batch_sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An image that could not be read when its part was extracted. `path` is relative to the image folder."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True)
class Geometry:
    """The three numbers that place every record.

    images   N, rows of the manifest
    part_size  S, images of one part; the last part may have fewer
    capacity   CAP, the largest part's region count rounded up to a whole number of token chunks, at least one
    """

    images: int
    part_size: int
    capacity: int

    @classmethod
    def of(cls, offsets: NDArray[np.int64], part_size: int) -> Geometry:
        """The geometry of a manifest, from the (N + 1,) offsets of its regions."""
        images = len(offsets) - 1
        part_size = min(part_size, images)
        firsts = np.append(np.arange(0, images, part_size), images)
        largest = int(np.diff(offsets[firsts]).max())
        return cls(images, part_size, max(1, math.ceil(largest / TOKEN_CHUNK)) * TOKEN_CHUNK)

    @property
    def n_parts(self) -> int:
        return math.ceil(self.images / self.part_size)

    def rows(self, part: int) -> range:
        """Rows of the manifest that make up a part. Raises InputError when there is no such part."""
        if not 0 <= part < self.n_parts:
            raise InputError(f"there is no part {part}: this cache has parts 0 to {self.n_parts - 1}")
        first = part * self.part_size
        return range(first, min(first + self.part_size, self.images))

    def slots(self, feature_set: FeatureSet) -> int:
        """Inner chunks of one shard."""
        return self.part_size if feature_set.kind == "map" else self.capacity // TOKEN_CHUNK

    def array_shape(self, feature_set: FeatureSet) -> tuple[int, ...]:
        lead = (self.images,) if feature_set.kind == "map" else (self.n_parts, self.capacity)
        return (*lead, *feature_set.shape)

    def shard_shape(self, feature_set: FeatureSet) -> tuple[int, ...]:
        lead = (self.part_size,) if feature_set.kind == "map" else (1, self.capacity)
        return (*lead, *feature_set.shape)


def shard_file(feature_set: FeatureSet, part: int) -> str:
    """Path inside the cache of a part's shard: Zarr's default chunk key with `.`, so a part takes no folder."""
    return f"{feature_set.array}/c.{part}.0.0"


def scale_file(feature_set: FeatureSet, part: int) -> str:
    """Path inside the cache of the shard that holds the scales of a part."""
    return f"{feature_set.scales}/c.{part}.0"


def checksum_file(feature_set: FeatureSet, part: int) -> str:
    """Path inside the cache of the checksums of a part's inner chunks."""
    return f"{feature_set.checksums}/c.{part}" + ("" if feature_set.kind == "map" else ".0")


def record_file(name: str, part: int) -> str:
    """Path inside the cache of the record that says a part of a feature set is written."""
    return f"parts/{name}/{part:05d}.json"


def part_files(feature_set: FeatureSet, part: int) -> list[str]:
    """Paths inside the cache of all that a part of a feature set consists of, but its record."""
    scales = [scale_file(feature_set, part)] if feature_set.has_scales else []
    return [shard_file(feature_set, part), *scales, checksum_file(feature_set, part)]
