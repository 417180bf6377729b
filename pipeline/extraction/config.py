"""ExtractConfig: the one description of an extraction, from the command line to every worker.

It holds names and paths only, so it can be pickled and compared, and importing it does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from regionspot.cache.errors import InputError
from regionspot.cache.format.feature_dtypes import Encoding
from regionspot.cache.format.manifest import Manifest
from regionspot.cache.format.schema import FeatureSet, Geometry
from regionspot.pipeline.datasets.failure_limit import EXTRACTION_LIMIT, FailureLimit
from regionspot.pipeline.extraction.part_selection import check_selection, select_parts
from regionspot.pipeline.images.decode import Exif

if TYPE_CHECKING:
    from regionspot.pipeline.backbones.bundle import Backbones

_FLOAT16 = Encoding("float16")


@dataclass(frozen=True)
class ExtractConfig:
    """What to extract, from where, with which models, and how.

    cache            folder or URL of the cache to fill
    dataset, data, split, annotations, boxes, limit
                     the images and regions, see `extract --help`
    preset, localizer, encoders, weights, sam_weights, clip_weights, device, dtype, preprocess, tokens, dense
                     the models, see `Backbones.load`
    views            "flip": the features of the mirrored images, as further feature sets
    exif             how to apply an image's EXIF orientation
    encoding, token_encoding
                     how to store feature maps and tokens
    part_size        images per part, for a new cache
    parts, shard     extract only these parts ("3,7-9"), or only this share of the parts ("3/16")
    batch_size       images per encoder call; None: as in the cache's existing parts, else chosen for the models
    decode_threads   None: one per core, at most 16
    max_failures     how many of all images may be unreadable
    check_disk_space refuse a disk that is too small for the missing features
    take_over        no other run is alive: claims of dead runs are free at once
    metrics_port     port of the Prometheus metrics, for a run in one process
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
    dense: bool = False
    views: Literal["flip"] | None = None
    exif: Exif = "auto"
    encoding: Encoding = _FLOAT16
    token_encoding: Encoding = _FLOAT16
    part_size: int = 512
    parts: str | None = None
    shard: str | None = None
    batch_size: int | None = None
    decode_threads: int | None = None
    max_failures: FailureLimit = EXTRACTION_LIMIT
    check_disk_space: bool = True
    take_over: bool = False
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "decode_threads"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"extract: {name} is {number}, expected at least 1")
        check_selection(self.parts, self.shard)

    def check_models(self) -> None:
        """Raises InputError when the device, a backbone or weights are not available here; loads nothing."""
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
        """The same config for processes with another working directory."""
        from regionspot.pipeline.datasets.proposals import GROUND_TRUTH

        return replace(
            self,
            cache=absolute(self.cache),
            data=absolute(self.data),
            annotations=self.annotations and absolute(self.annotations),
            # A keyword stays a keyword, even if a file of that name exists.
            boxes=self.boxes if self.boxes == GROUND_TRUTH else absolute_if_exists(self.boxes),
            weights=absolute_weights(self.weights),
            sam_weights=absolute_weights(self.sam_weights),
            clip_weights=absolute_weights(self.clip_weights),
        )

    def read_manifest(self) -> Manifest:
        """Read the images and regions. Raises what `read_split` raises."""
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
            may_be_empty=self.localizer == NONE,  # feature maps need no boxes
        )

    def image_folder(self, manifest: Manifest) -> Path:
        """The folder that the manifest's paths are relative to."""
        from regionspot.pipeline.datasets.registry import image_folder_of

        return image_folder_of(self.dataset, Path(self.data), self.split, manifest)

    def load_backbones(self, stored: Mapping[str, FeatureSet] | None = None) -> Backbones:
        """Load the models; with `dtype` "auto", in the dtype of the cache's feature sets `stored`.

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
            dense=self.dense,
            flip=self.views == "flip",
            stored=stored,
        )

    def feature_sets(self, backbones: Backbones) -> list[FeatureSet]:
        """The feature sets that these models write; int8 sets do not have their statistics yet."""
        return backbones.feature_sets(self.exif, self.encoding, self.token_encoding)

    def selected_parts(self, geometry: Geometry) -> Collection[int]:
        """The parts to extract; with a limit, the whole parts that contain the first `limit` images.

        Raises InputError for a part that the cache does not have.
        """
        selected = select_parts(self.parts, self.shard, geometry.n_parts)
        if self.limit is None:
            return selected
        return [part for part in selected if part * geometry.part_size < self.limit]


def absolute(path: str) -> str:
    """The path for a process with another working directory; a URL as it is."""
    return path if "://" in path else str(Path(path).absolute())


def absolute_if_exists(path: str) -> str:
    """`absolute` of what may also be a keyword."""
    return absolute(path) if Path(path).exists() else path


def absolute_weights(source: str | None) -> str | None:
    """`absolute` of a source of weights."""
    if source is None or source.startswith("random:"):  # RANDOM of weights.py, which imports torch
        return source
    return absolute_if_exists(source)
