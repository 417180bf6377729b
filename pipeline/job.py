"""An extraction as it is sent to workers: where things are, in words. They read the rest from there themselves.

The first worker prepares: it reads the annotations, loads the models and makes the cache, so neither a manifest nor
provenance travels, and the machine that gives the orders needs no GPU. The others open that cache. A worker loads the
models once; its threads share them, one at a time on the device, so that one part is decoded or flushed while another
is encoded.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from regionspot.cache.compatibility import require_same_features
from regionspot.cache.encodings import Encoding
from regionspot.cache.errors import InputError
from regionspot.cache.schema import FeatureSet, PictureFeatures
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.failure_limit import EXTRACTION_LIMIT, FIRST_IMAGES, FailureLimit
from regionspot.pipeline.outstanding import held_sets
from regionspot.pipeline.part_worker import Account, PartMaker

if TYPE_CHECKING:
    from regionspot.pipeline.extraction import Extraction
    from regionspot.pipeline.frozen_models import Backbones
    from regionspot.pipeline.photos import Exif

_DASKS_TRIM_THRESHOLD = "65536"  # distributed.yaml: distributed.nanny.pre-spawn-environ


@dataclass(frozen=True)
class Source:
    """A dataset split as the command line names it."""

    name: str
    data: str
    split: str = "train"
    annotations: str | None = None
    boxes: str = "gt"
    limit: int | None = None


@dataclass(frozen=True)
class Models:
    """What `Backbones.load` takes."""

    preset: str = "bl"
    weights: str | None = None
    sam_weights: str | None = None
    clip_weights: str | None = None
    device: str | None = None
    dtype: str = "auto"
    localizer: str | None = None
    encoders: tuple[str, ...] = ()
    preprocess: str = "direct"
    tokens: str = "first"

    def check(self) -> None:
        """Raises InputError for a device, a backbone or weights that are not on this machine; loads nothing."""
        from regionspot.cache.machine import compute_device  # imports torch
        from regionspot.pipeline.frozen_models import NONE
        from regionspot.pipeline.registry import ENCODERS, LOCALIZERS
        from regionspot.pipeline.weights import check_source

        compute_device(self.device)
        for source in (self.weights, self.sam_weights, self.clip_weights):
            check_source(source)
        if self.localizer not in (None, NONE):
            LOCALIZERS.builder(self.localizer)
        for name in self.encoders:
            if name != NONE:
                ENCODERS.builder(name)


@dataclass(frozen=True)
class Prepared:
    """What the first worker found.

    photos   their folder
    names    of the feature sets to fill
    parts    that are asked for; None: all
    models   name and origin of the weights of each
    machine, versions   of that worker
    device   of the models, and whether they would be faster in bfloat16 than in the dtype that they compute in
    """

    photos: str = ""
    names: tuple[str, ...] = ()
    parts: tuple[int, ...] | None = None
    models: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str | int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    decode_threads: int = 0
    device: str = "cpu"
    half_is_faster: bool = False


@dataclass(frozen=True)
class ExtractJob:
    """One run of `extract` for workers; `cache` to `check_room` are as `Extraction` and the command line have them.

    photos   folder of the photos, which `prepare` finds
    run      a word of this run's own: what a worker has opened for another one is not taken for it
    """

    cache: str
    source: Source
    models: Models = Models()
    exif: Exif = "auto"
    encoding: str = "float16"
    token_encoding: str = "float16"
    part_size: int = 512
    parts: str | None = None
    shard: str | None = None
    batch_size: int | None = None
    decode_threads: int | None = None
    max_failures: FailureLimit = EXTRACTION_LIMIT
    check_room: bool = True
    photos: str = ""
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def from_anywhere(self) -> ExtractJob:
        """The same with absolute paths: other machines have other working folders."""
        from regionspot.pipeline.proposals import GROUND_TRUTH

        boxes, random = self.source.boxes, "random:"  # as in weights.py, which imports torch
        source = replace(
            self.source,
            data=_absolute(self.source.data),
            annotations=self.source.annotations and _absolute(self.source.annotations),
            # Words are words, whatever files there are of these names.
            boxes=boxes if boxes == GROUND_TRUTH else _absolute(boxes, if_there=True),
        )
        weights = ("weights", "sam_weights", "clip_weights")
        named: dict[str, Any] = {
            name: _absolute(found, if_there=True)
            for name in weights
            if (found := getattr(self.models, name)) and not found.startswith(random)
        }
        models = replace(self.models, **named)
        return replace(self, cache=_absolute(self.cache), source=source, models=models)

    def prepare(self) -> Prepared:
        """Make the cache, or see that it is one to go on with. To be run by one worker before the others begin."""
        from regionspot.pipeline.decoding import default_threads  # imports torch
        from regionspot.pipeline.surroundings import machine, versions
        from regionspot.pipeline.watch import weights_of

        extraction = self.extraction(_loaded(self.run, self.models, held_sets(self.cache)))
        cache, backbones = extraction.prepare()
        names = [each.name for each in backbones.feature_sets(self.exif)]
        only = extraction.only(cache.n_parts)
        return Prepared(
            str(extraction.photos),
            tuple(names),
            None if only is None else tuple(only),
            {name: weights_of(cache.feature_sets[name]) for name in names},
            machine(),
            versions(),
            self.decode_threads or default_threads(),
            str(backbones.device),
            backbones.half_is_faster,
        )

    def open(self) -> PartMaker:
        """What a worker needs to make parts. Raises RegionSpotError where it lacks cache, photos or models."""
        if not Path(self.photos).is_dir():
            raise InputError(
                f"{self.photos}: the folder of the photos is not there on this machine; mount it in the same place"
            )
        cache = FeatureCache.open(self.cache, "a")
        backbones = _loaded(self.run, self.models, cache.feature_sets)
        wanted = backbones.feature_sets(self.exif)
        for asked in wanted:
            stored = cache.feature_sets[asked.name]
            require_same_features(
                self.cache, stored, replace(asked, dtype=stored.dtype, compression=stored.compression)
            )
        return PartMaker(cache, [asked.name for asked in wanted], PhotoFeatures(cache, backbones, self), self.run)

    def extraction(self, backbones: Backbones | None = None) -> Extraction:
        """The annotations read and the models loaded (or these), in this process.

        Raises what reading a dataset, loading models and opening a cache raise.
        """
        from regionspot.pipeline.datasets import photo_dir, read_split
        from regionspot.pipeline.extraction import Extraction  # imports torch
        from regionspot.pipeline.frozen_models import NONE, Backbones

        of = self.source
        encodings = Encoding.parse(self.encoding), Encoding.parse(self.token_encoding)
        annotations = None if of.annotations is None else Path(of.annotations)
        manifest = read_split(
            of.name,
            Path(of.data),
            of.split,
            annotations,
            of.boxes,
            of.limit,
            max_failures=self.max_failures,
            may_be_empty=self.models.localizer == NONE,  # maps need no boxes
        )
        return Extraction(
            self.cache,
            manifest,
            photo_dir(of.name, Path(of.data), of.split, manifest),
            backbones or Backbones.load(**asdict(self.models), held=held_sets(self.cache)),
            self.exif,
            *encodings,
            part_size=self.part_size,
            parts=self.parts,
            shard=self.shard,
            batch_size=self.batch_size,
            decode_threads=self.decode_threads,
            max_failures=self.max_failures,
            check_room=self.check_room,
        )


def _absolute(text: str, if_there: bool = False) -> str:
    """A path from the root; a URL as it is. `if_there`: and what is no file or folder here."""
    if "://" in text or (if_there and not Path(text).exists()):
        return text
    return str(Path(text).absolute())


class PhotoFeatures:
    """Features of a part's pictures from their photos; for several threads at once."""

    def __init__(self, cache: FeatureCache, backbones: Backbones, job: ExtractJob) -> None:
        from regionspot.pipeline.encoding import images_at_a_time  # imports torch

        names = [feature_set.name for feature_set in backbones.feature_sets(job.exif)]
        self._batch_size = images_at_a_time(job.batch_size, cache, names, backbones)
        self._cache, self._backbones, self._job = cache, backbones, job
        self._one_was_read = False

    def of_rows(self, rows: range, names: Sequence[str], account: Account) -> Iterator[PictureFeatures]:
        """The rows of one part, in batches as a run in one process makes them, so that the bytes are the same.

        Raises InputError when this worker has not read one photo yet and cannot read any of the first of this part: it
        may lack the disk that the others have, and a part of nothing but failures would count as done.
        """
        from regionspot.pipeline.decoding import Decoder, decode_ahead  # imports torch
        from regionspot.pipeline.encoding import BatchEncoder, batches_of

        job, manifest = self._job, self._cache.manifest
        decoder = Decoder(manifest, Path(job.photos), self._backbones, job.exif)
        encode = BatchEncoder(manifest, self._backbones, account.progress)
        jobs = ((row, names) for row in rows)
        with closing(decode_ahead(decoder, jobs, job.decode_threads)) as decoded:
            for picture in encode(batches_of(decoded, self._batch_size, self._cache.part_size, account.progress)):
                self._one_was_read |= picture.failure is None
                if not self._one_was_read and picture.row + 1 - rows.start >= min(FIRST_IMAGES, len(rows)):
                    raise InputError(
                        f"{job.photos}: none of a part's first pictures could be read (the last: {picture.failure}); "
                        "check --data, and that this machine sees it"
                    )
                account.ignored_orientations = encode.ignored_orientations
                yield picture


class _OneAtATime:
    """A model whose computing calls wait for one another: those of other threads use the device meanwhile."""

    _CALLS = ("encode", "outputs_of_pictures")

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


_models: dict[tuple[str, Models], Backbones] = {}  # of this process's run: `prepare` and `open` load them once


def _loaded(run: str, models: Models, held: dict[str, FeatureSet]) -> Backbones:
    from regionspot.pipeline.frozen_models import Backbones  # imports torch

    key = run, models
    if key in _models:
        loaded = _models[key].following(held)
    else:
        _models.clear()
        # Dask sets this for its workers and so keeps glibc from being told to keep freed memory (allocator.py).
        if os.environ.get("MALLOC_TRIM_THRESHOLD_") == _DASKS_TRIM_THRESHOLD:
            del os.environ["MALLOC_TRIM_THRESHOLD_"]
        loaded = Backbones.load(**asdict(models), held=held)
    if loaded is not _models.get(key):
        turn = threading.Lock()
        localizer = None if loaded.localizer is None else cast("Any", _OneAtATime(loaded.localizer, turn))
        encoders = tuple(cast("Any", _OneAtATime(encoder, turn)) for encoder in loaded.encoders)
        _models[key] = replace(loaded, localizer=localizer, encoders=encoders)
    return _models[key]
