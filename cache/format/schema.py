"""Feature sets, the features of one image, and the names and shapes of a part's files.

All shapes on disk follow from `Geometry`, which is known before extraction begins: each array has its final shape from
the start, and no two parts share a file.

    features/clip_vit_l_14/feature_map   (N, 257, 1024)   one shard per part, one inner chunk per image
    features/clip_vit_l_14/scale         (N, 257)         int8 only: one scale per row of D channels, sharded alike
    features/clip_vit_l_14/crc32c        (N,)             of each stored inner chunk followed by its scales
    features/sam_vit_b/token             (P, CAP, 256)    one shard per part, one inner chunk per 64 regions
    features/sam_vit_b/scale             (P, CAP)         int8 only
    features/sam_vit_b/crc32c            (P, CAP / 64)    of each stored inner chunk followed by its scales
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
from regionspot.cache.format.feature_dtypes import STORED, Statistics

SCHEMA_VERSION = 1
MAX_PART_SIZE = 65_536  # images; the shard index, which is read as a whole, takes 16 bytes for each
TOKEN_CHUNK = 64  # regions per inner chunk: 32 KB of 256 float16, a balance of padding and number of reads

PART_SIZE = 512  # images: 270 MB of CLIP's maps, written and downloaded as one file

FLIP = ".flip"  # ends the names of the feature sets of images that were flipped left to right

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ARRAY_NAMES = {"map": "feature_map", "token": "token"}
_COMPRESSIONS = (None, "zstd")


@dataclass(frozen=True)
class FeatureSet:
    """One backbone's output over all images (`map`: one record per image) or all regions (`token`: one row per region).

    name        folder under features/: letters, digits, `_`, `-` and `.`
    shape       (T, D) of a map, class token first unless `class_token` in the provenance is false; (C,) of a token
    dtype       as stored: float16, float32, bfloat16 (as uint16 bits) or int8 (with one float16 scale per row of D or C
                channels)
    provenance  JSON-able; everything that determines the values: model, weights sha256, input size, resize rule. Its
                `versions` are recorded but not compared: another torch gives the same features up to rounding
    compression None or "zstd", per inner chunk
    statistics  int8 only: mean and deviation of the channels, from `statistics_of`. Fixed when the cache is created

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
            raise InputError(f"feature set {self.name}: statistics are for int8, its dtype is {self.dtype}; omit them")
        channels = len(self.statistics.mean)
        if channels != self.shape[-1]:
            raise InputError(f"feature set {self.name}: statistics of {channels} channels, expected {self.shape[-1]}")

    def _provenance_as_json(self) -> Any:
        """The provenance as JSON restores it, so that the two compare equal."""
        try:
            return json.loads(json.dumps(self.provenance, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InputError(f"feature set {self.name}: provenance cannot be stored as JSON: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Every field, as stored in zarr.json."""
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
    def from_json(cls, document: dict[str, Any]) -> FeatureSet:
        """The inverse of `to_json`; statistics are equal to the bit."""
        statistics = document["statistics"] and Statistics.from_json(document["statistics"])
        return cls(**{**document, "shape": tuple(document["shape"]), "statistics": statistics})

    @property
    def array(self) -> str:
        """Path of the array inside the cache."""
        return f"features/{self.name}/{_ARRAY_NAMES[self.kind]}"

    @property
    def checksums(self) -> str:
        """Path of the array of crc32c checksums, one per inner chunk."""
        return f"features/{self.name}/crc32c"

    @property
    def has_scales(self) -> bool:
        """Whether each row has a float16 scale: int8 only."""
        return self.dtype == "int8"

    @property
    def scales(self) -> str:
        """Path of the array of scales, if `has_scales`."""
        return f"features/{self.name}/scale"

    @property
    def stored(self) -> np.dtype[Any]:
        """The numpy dtype on disk: little-endian; uint16 for the bits of bfloat16."""
        return np.dtype(STORED[self.dtype])

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Shape of one inner chunk without the leading 1: one image's map, or TOKEN_CHUNK rows of tokens."""
        return self.shape if self.kind == "map" else (TOKEN_CHUNK, *self.shape)

    @property
    def record_bytes(self) -> int:
        """Bytes of one inner chunk before compression, without scales."""
        return math.prod(self.record_shape) * self.stored.itemsize

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales of one inner chunk: one per row of channels."""
        return self.record_shape[:-1]


@dataclass(frozen=True)
class EncodedFeatures:
    """Features in the encoding of their set, which are written without encoding them again.

    codes    in the dtype `FeatureSet.stored`, in the shape of floating features
    scales   float16, one per row of codes, if the set has scales
    """

    codes: NDArray[Any]
    scales: NDArray[np.float16] | None = None


@dataclass
class ImageFeatures:
    """The backbones' output for the image at `row`.

    features[map set]    floating (T, D), or EncodedFeatures
    features[token set]  floating (regions of the image, C), in the manifest's order, or EncodedFeatures
    failure              why the image could not be read; `features` is then empty
    batch_sizes[set]     number of images computed in the same batch, this one included, if known; also for a failed
                         image, whose slot in the batch stays blank
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
    """The three numbers that determine where each record is stored.

    images     N, rows of the manifest
    part_size  S, images per part; the last part may have fewer
    capacity   CAP, the largest part's region count, rounded up to whole token chunks, at least one
    """

    images: int
    part_size: int
    capacity: int

    @classmethod
    def of(cls, offsets: NDArray[np.int64], part_size: int) -> Geometry:
        """The geometry of a manifest with the region offsets (N + 1,)."""
        images = len(offsets) - 1
        part_size = min(part_size, images)
        firsts = np.append(np.arange(0, images, part_size), images)
        largest = int(np.diff(offsets[firsts]).max())
        return cls(images, part_size, max(1, math.ceil(largest / TOKEN_CHUNK)) * TOKEN_CHUNK)

    @property
    def n_parts(self) -> int:
        return math.ceil(self.images / self.part_size)

    def rows(self, part: int) -> range:
        """Manifest rows of a part. Raises InputError when there is no such part."""
        if not 0 <= part < self.n_parts:
            raise InputError(f"there is no part {part}: this cache has parts 0 to {self.n_parts - 1}")
        first = part * self.part_size
        return range(first, min(first + self.part_size, self.images))

    def slots(self, feature_set: FeatureSet) -> int:
        """Number of inner chunks in one shard."""
        return self.part_size if feature_set.kind == "map" else self.capacity // TOKEN_CHUNK

    def array_shape(self, feature_set: FeatureSet) -> tuple[int, ...]:
        lead = (self.images,) if feature_set.kind == "map" else (self.n_parts, self.capacity)
        return (*lead, *feature_set.shape)

    def shard_shape(self, feature_set: FeatureSet) -> tuple[int, ...]:
        lead = (self.part_size,) if feature_set.kind == "map" else (1, self.capacity)
        return (*lead, *feature_set.shape)


def shard_file(feature_set: FeatureSet, part: int) -> str:
    """Path of a part's shard inside the cache: Zarr's default chunk key with `.`, so that a part needs no folder."""
    return f"{feature_set.array}/c.{part}.0.0"


def scale_file(feature_set: FeatureSet, part: int) -> str:
    """Path of the shard with a part's scales."""
    return f"{feature_set.scales}/c.{part}.0"


def checksum_file(feature_set: FeatureSet, part: int) -> str:
    """Path of the checksums of a part's inner chunks."""
    return f"{feature_set.checksums}/c.{part}" + ("" if feature_set.kind == "map" else ".0")


def record_file(feature_set: str, part: int) -> str:
    """Path of the record whose existence marks a part as written."""
    return f"parts/{feature_set}/{part:05d}.json"


def part_files(feature_set: FeatureSet, part: int) -> list[str]:
    """Paths of all files of a part, except its record."""
    scales = [scale_file(feature_set, part)] if feature_set.has_scales else []
    return [shard_file(feature_set, part), *scales, checksum_file(feature_set, part)]
