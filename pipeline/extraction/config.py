"""ExtractConfig: the one description of an extraction, from the command line to every worker.

It holds names and paths, nothing that is read or loaded, so it can be pickled and compared, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FeatureSet, Geometry
from regionspot.pipeline.datasets.failure_limit import EXTRACTION_LIMIT, FailureLimit
from regionspot.pipeline.extraction.part_choice import parse_parts
from regionspot.pipeline.extraction.part_selection import parse_shard
from regionspot.pipeline.images.decode import Exif

if TYPE_CHECKING:
    from regionspot.pipeline.backbones.bundle import Backbones

_FLOAT16 = Encoding("float16")


@dataclass(frozen=True)
class ExtractConfig:
    """What is extracted, from where, by which models, and how.

    cache            the folder or URL to fill
    dataset, data, split, annotations, boxes, limit
                     the images and regions, as `extract --help` explains them
    preset, localizer, encoders, weights, sam_weights, clip_weights, device, dtype, preprocess, tokens
                     the models, as `Backbones.load` explains them
    exif             what is done about an image's EXIF orientation
    encoding, token_encoding
                     how maps and tokens are stored
    part_size        images of a part, where the cache is new
    parts, shard     only these parts of the cache ("3,7-9"), or only this share of them ("3/16")
    batch_size       images of an encoder call; None: as the parts that are there were made, else what suits the models
    decode_threads   None: one a core, 16 at most
    max_failures     of all images, how many may be broken
    check_room       refuse a disk that is too small for what is missing
    take_over        no other run is alive: what dead ones have claimed is free at once
    metrics_port     where Prometheus metrics are served while a run in one process is at work
    """

    cache: str = ""
    dataset: str = ""
    data: str = ""
    split: str = "train"
    annotations: str | None = None
    boxes: str = "gt"
    limit: int | None = None
    preset: str = "bl"
    localizer: str | None = None
    encoders: tuple[str, ...] = ()
    weights: str | None = None
    sam_weights: str | None = None
    clip_weights: str | None = None
    device: str | None = None
    dtype: str = "auto"
    preprocess: str = "direct"
    tokens: str = "first"
    exif: Exif = "auto"
    encoding: Encoding = _FLOAT16
    token_encoding: Encoding = _FLOAT16
    part_size: int = 512
    parts: str | None = None
    shard: str | None = None
    batch_size: int | None = None
    decode_threads: int | None = None
    max_failures: FailureLimit = EXTRACTION_LIMIT
    check_room: bool = True
    take_over: bool = False
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "decode_threads"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"extract: {name} is {number}, expected at least 1")

    def check_models(self) -> None:
        """Raises InputError for a device, a backbone or weights that are not on this machine; loads nothing."""
        from regionspot.cache.machine import compute_device  # imports torch
        from regionspot.pipeline.backbones.bundle import NONE
        from regionspot.pipeline.backbones.registry import ENCODERS, LOCALIZERS
        from regionspot.pipeline.backbones.weights import check_source

        compute_device(self.device)
        for source in (self.weights, self.sam_weights, self.clip_weights):
            check_source(source)
        if self.localizer not in (None, NONE):
            LOCALIZERS.builder(self.localizer)
        for name in self.encoders:
            if name != NONE:
                ENCODERS.builder(name)

    def with_absolute_paths(self) -> ExtractConfig:
        """The same for processes with other working folders."""
        from regionspot.pipeline.datasets.proposals import GROUND_TRUTH

        return replace(
            self,
            cache=_absolute(self.cache),
            data=_absolute(self.data),
            annotations=self.annotations and _absolute(self.annotations),
            # Words are words, whatever files there are of these names.
            boxes=self.boxes if self.boxes == GROUND_TRUTH else _absolute_if_there(self.boxes),
            weights=_absolute_weights(self.weights),
            sam_weights=_absolute_weights(self.sam_weights),
            clip_weights=_absolute_weights(self.clip_weights),
        )

    def read_manifest(self) -> Manifest:
        """The images and regions. Raises what `read_split` raises."""
        from regionspot.pipeline.backbones.bundle import NONE  # imports torch
        from regionspot.pipeline.datasets.registry import read_split  # its readers take half a second to import

        return read_split(
            self.dataset,
            Path(self.data),
            self.split,
            None if self.annotations is None else Path(self.annotations),
            self.boxes,
            self.limit,
            max_failures=self.max_failures,
            may_be_empty=self.localizer == NONE,  # maps need no boxes
        )

    def image_folder(self, manifest: Manifest) -> Path:
        """The folder that the manifest's paths start from."""
        from regionspot.pipeline.datasets.registry import image_folder_of

        return image_folder_of(self.dataset, Path(self.data), self.split, manifest)

    def load_backbones(self, held: Mapping[str, FeatureSet] | None = None) -> Backbones:
        """The models, in the dtype of the feature sets `held` where `dtype` is "auto".

        Raises what `Backbones.load` raises.
        """
        from regionspot.pipeline.backbones.bundle import Backbones  # imports torch

        return Backbones.load(
            self.preset,
            self.weights,
            self.sam_weights,
            self.clip_weights,
            self.device,
            self.dtype,
            localizer=self.localizer,
            encoders=self.encoders,
            preprocess=self.preprocess,
            tokens=self.tokens,
            held=held,
        )

    def feature_sets(self, backbones: Backbones) -> list[FeatureSet]:
        """What these models write into the cache; int8 is still without the statistics of a sample."""
        return backbones.feature_sets(self.exif, self.encoding, self.token_encoding)

    def chosen_parts(self, geometry: Geometry) -> Collection[int]:
        """Those of a cache's parts that are asked for; of a limit, the whole parts that hold the first so many images.

        Raises InputError for what names no part.
        """
        if self.parts is not None and self.shard is not None:
            raise InputError(f"parts {self.parts!r} and shard {self.shard!r}: give one of the two")
        if self.parts is not None:
            named: Collection[int] = parse_parts(self.parts, geometry.n_parts)
        elif self.shard is not None:
            named = parse_shard(self.shard).parts(geometry.n_parts)
        else:
            named = range(geometry.n_parts)
        if self.limit is None:
            return named
        return [part for part in named if part * geometry.part_size < self.limit]


def _absolute(path: str) -> str:
    """A path from the root; a URL as it is."""
    return path if "://" in path else str(Path(path).absolute())


def _absolute_if_there(path: str) -> str:
    """Likewise; a word that names no file or folder here as it is."""
    return _absolute(path) if Path(path).exists() else path


def _absolute_weights(source: str | None) -> str | None:
    if source is None or source.startswith("random:"):  # RANDOM of weights.py, which imports torch
        return source
    return _absolute_if_there(source)
