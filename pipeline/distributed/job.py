"""An extraction as it is sent to workers: its config, nothing else. They read the rest from where it says.

The first worker prepares: it reads the annotations, loads the models and makes the cache, so neither a manifest nor
provenance travels, and the machine of the command needs no GPU. The others open that cache. A worker loads the models
once; its threads share them, one at a time on the device, so that one part is decoded or flushed while another one is
encoded.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from regionspot.cache.errors import InputError
from regionspot.cache.format.compatibility import require_same_features
from regionspot.cache.format.schema import FeatureSet, ImageFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.distributed.worker import PartMaker
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.plan import held_sets
from regionspot.pipeline.reporting.environment import Environment
from regionspot.pipeline.reporting.failures import FIRST_IMAGES
from regionspot.pipeline.reporting.run_stats import RunStats

if TYPE_CHECKING:
    from regionspot.pipeline.backbones.bundle import Backbones

_DASKS_TRIM_THRESHOLD = "65536"  # distributed.yaml: distributed.nanny.pre-spawn-environ


@dataclass(frozen=True)
class Prepared:
    """What the first worker found.

    images        their folder
    names         of the feature sets to fill
    environment   of that worker
    """

    images: Path
    names: tuple[str, ...]
    environment: Environment


@dataclass(frozen=True)
class ExtractJob:
    """One run of an extraction; by its `run`, a random word, what a worker has opened for another one is told apart."""

    config: ExtractConfig
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def prepare(self) -> Prepared:
        """Make the cache, or see that it is one to resume. To be run by one worker before the others begin."""
        from regionspot.pipeline.extraction.run import Extraction  # imports torch

        extraction = Extraction.load(self.config, _loaded(self, held_sets(self.config.cache)))
        cache, backbones = extraction.prepare()
        names = tuple(each.name for each in self.config.feature_sets(backbones))
        environment = Environment.here(cache, backbones, self.config.decode_threads)
        return Prepared(extraction.images, names, environment)

    def open(self) -> PartMaker:
        """What a worker needs to make parts. Raises RegionSpotError where it lacks cache, images or models."""
        cache = FeatureCache.open(self.config.cache, "a")
        images = self.config.image_folder(cache.manifest)
        if not images.is_dir():
            raise InputError(f"{images}: the image folder is not there on this machine; mount it in the same place")
        backbones = _loaded(self, cache.feature_sets)
        wanted = self.config.feature_sets(backbones)
        for asked in wanted:
            stored = cache.feature_sets[asked.name]
            require_same_features(
                self.config.cache, stored, replace(asked, dtype=stored.dtype, compression=stored.compression)
            )
        names = [each.name for each in wanted]
        return PartMaker(cache, names, PartImageEncoder(cache, names, images, backbones, self.config), self.run)


class PartImageEncoder:
    """Features of a part's images from their files; for several threads at once."""

    def __init__(
        self, cache: FeatureCache, names: Sequence[str], images: Path, backbones: Backbones, config: ExtractConfig
    ) -> None:
        from regionspot.pipeline.extraction.batch_encoder import images_at_a_time
        from regionspot.pipeline.extraction.decode_ahead import Decoder  # imports torch

        self._cache, self._backbones, self._config = cache, backbones, config
        self._batch_size = images_at_a_time(config.batch_size, cache, names, backbones)
        self._decoder = Decoder(cache.manifest, images, backbones, config.exif)
        self._one_was_read = False

    def of_rows(self, rows: range, names: Sequence[str], stats: RunStats) -> Iterator[ImageFeatures]:
        """The rows of one part.

        Raises InputError when this worker has not read one image yet and cannot read any of the first of this part: it
        may lack the disk that the others have, and a part of nothing but failures would count as done.
        """
        from regionspot.pipeline.extraction.batch_encoder import BatchEncoder, features_of  # imports torch

        encode = BatchEncoder(self._cache.manifest, self._backbones, stats)
        jobs = ((row, names) for row in rows)
        size, threads = self._batch_size, self._config.decode_threads
        for image in features_of(jobs, self._decoder, encode, size, self._cache.part_size, threads):
            self._one_was_read |= image.failure is None
            if not self._one_was_read and image.row + 1 - rows.start >= min(FIRST_IMAGES, len(rows)):
                raise InputError(
                    f"{self._decoder.image_folder}: none of a part's first images could be read (the last: "
                    f"{image.failure}); check --data, and that this machine sees it"
                )
            yield image


class _OneAtATime:
    """A model whose computing calls wait for one another: those of other threads use the device meanwhile."""

    _CALLS = ("encode", "outputs_of_images")

    def __init__(self, model: Any, turn: threading.Lock) -> None:
        self._model, self._turn = model, turn

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in self._CALLS:
            return found

        def in_turn(*args: Any, **kwargs: Any) -> Any:
            with self._turn:
                return found(*args, **kwargs)

        return in_turn


_models: dict[ExtractJob, Backbones] = {}  # of this process's run: `prepare` and `open` load them once


def _loaded(job: ExtractJob, held: Mapping[str, FeatureSet]) -> Backbones:
    if job in _models:
        loaded = _models[job].following(held)
    else:
        _models.clear()
        # Dask sets this for its workers and so keeps glibc from being told to keep freed memory (allocator.py).
        if os.environ.get("MALLOC_TRIM_THRESHOLD_") == _DASKS_TRIM_THRESHOLD:
            del os.environ["MALLOC_TRIM_THRESHOLD_"]
        loaded = job.config.load_backbones(held)
    if loaded is not _models.get(job):
        turn = threading.Lock()
        localizer = None if loaded.localizer is None else cast("Any", _OneAtATime(loaded.localizer, turn))
        encoders = tuple(cast("Any", _OneAtATime(encoder, turn)) for encoder in loaded.encoders)
        _models[job] = replace(loaded, localizer=localizer, encoders=encoders)
    return _models[job]
