"""Photos in, cache out: decode ahead, encode in batches, write behind.

Threads decode and resize the pictures ahead, the calling thread keeps the encoders busy, one thread commits parts.
Between them stand two short queues, so memory does not grow with the dataset and the slowest stage sets the pace;
the summary names it. What is done is known from the cache alone: a run that was killed goes on with the parts that
have no record yet, and several runs at once divide them among themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from regionspot.cache.claims import Claims
from regionspot.cache.encodings import Encoding
from regionspot.cache.errors import InputError
from regionspot.cache.manifest import Manifest
from regionspot.cache.progress import Progress, duration
from regionspot.cache.schema import FeatureSet, PictureFeatures, Stored
from regionspot.cache.store import FeatureCache
from regionspot.pipeline.backbones import preset_named
from regionspot.pipeline.committing import CommitThread
from regionspot.pipeline.decoding import Decoded, Decoder, decode_ahead
from regionspot.pipeline.encoder import SemanticEncoder, load_encoder
from regionspot.pipeline.encoding_sample import ready_to_store
from regionspot.pipeline.localizer import Localizer, load_localizer
from regionspot.pipeline.photos import Exif
from regionspot.pipeline.sharing import SharedParts

# A wrong photo folder shows in the first pictures: stop before a part of nothing but failures is committed.
FIRST_PICTURES = 10

FLOAT16 = Encoding("float16")


@dataclass(frozen=True)
class Backbones:
    """The frozen models of one extraction; either may be left out to extract the other alone."""

    localizer: Localizer | None = None
    encoder: SemanticEncoder | None = None

    @classmethod
    def load(
        cls,
        preset: str,
        weights: str | None = None,
        sam_weights: str | None = None,
        clip_weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ) -> Backbones:
        """Both models of a preset, on a GPU where there is one; `weights` is for both, the others go before it.

        Raises InputError for an unknown preset or dtype, WeightsError for weights that cannot be had or do not fit.
        """
        names = preset_named(preset)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            load_localizer(names.localizer, sam_weights or weights, place, dtype),
            load_encoder(names.encoder, clip_weights or weights, place, dtype),
        )

    def feature_sets(
        self, exif: Exif = "auto", encoding: Encoding = FLOAT16, token_encoding: Encoding = FLOAT16
    ) -> list[FeatureSet]:
        """What these models write into a cache, with the provenance that a later run must match.

        encoding, token_encoding   of maps and of tokens; int8 is still without the statistics of a sample
        """
        sets = []
        if self.localizer is not None:
            sets.append(_feature_set(self.localizer, "token", (self.localizer.token_dim,), exif, token_encoding))
        if self.encoder is not None:
            sets.append(_feature_set(self.encoder, "map", self.encoder.map_shape, exif, encoding))
        return sets


def _feature_set(
    model: Localizer | SemanticEncoder,
    kind: Literal["map", "token"],
    shape: tuple[int, ...],
    exif: Exif,
    encoding: Encoding,
) -> FeatureSet:
    provenance = {**model.provenance, "exif": exif}
    return FeatureSet(model.name, kind, shape, encoding.dtype, provenance, encoding.compression)


@dataclass(frozen=True)
class ExtractSummary:
    """What one run of `extract` did.

    parts                 parts that it wrote
    parts_before          parts that were complete when it started
    parts_of_others       parts that other runs wrote while it was at work
    ignored_orientations  pictures whose EXIF would have turned them, but whose annotations want them as stored
    shares                each stage's share of the time; the largest is the bottleneck
    """

    pictures: int
    failed: int
    parts: int
    parts_before: int
    parts_of_others: int
    ignored_orientations: int
    seconds: float
    shares: dict[str, float]

    def text(self) -> str:
        """One line for people."""
        if not self.parts:
            others = f", {self.parts_of_others:,} of them by other runs meanwhile" if self.parts_of_others else ""
            return f"nothing to do: all {self.parts_before + self.parts_of_others:,} parts are there{others}"
        slowest = max(self.shares, key=self.shares.__getitem__)
        words = [
            f"{self.pictures:,} pictures in {self.parts:,} parts, {duration(self.seconds)}, "
            f"{self.pictures / self.seconds:.3g}/s, bottleneck {slowest} ({self.shares[slowest]:.0%})",
            f"{self.failed:,} could not be read",
        ]
        if self.parts_before:
            words.append(f"{self.parts_before:,} parts were there before")
        if self.parts_of_others:
            words.append(f"other runs did {self.parts_of_others:,} parts meanwhile")
        if self.ignored_orientations:
            words.append(f"EXIF orientation ignored for {self.ignored_orientations:,}, as their stated size asks")
        return "; ".join(words)


def open_for_extraction(
    address: str | Path,
    manifest: Manifest,
    photo_folder: Path,
    backbones: Backbones,
    exif: Exif = "auto",
    encoding: Encoding = FLOAT16,
    token_encoding: Encoding = FLOAT16,
    part_size: int = 512,
) -> FeatureCache:
    """Go on with the cache at `address`, or make it for what the backbones write into it.

    For int8 the backbones run over a few pictures first, unless the cache holds the feature set already. Raises
    InputError when none of these can be read, and what `FeatureCache.open_or_create` raises.
    """

    def features_of(rows: list[int], names: list[str]) -> Iterator[PictureFeatures]:
        decoder = Decoder(manifest, photo_folder, backbones.localizer, backbones.encoder, exif)
        progress = Progress(len(rows), "pictures of the sample")
        with closing(decode_ahead(decoder, ((row, names) for row in rows), None)) as decoded:
            for picture in decoded:
                yield from _encode([picture], manifest, backbones, progress)
                progress.step()

    sets = ready_to_store(address, manifest, backbones.feature_sets(exif, encoding, token_encoding), features_of)
    return FeatureCache.open_or_create(address, manifest, sets, part_size)


def extract(
    cache: FeatureCache,
    photo_folder: Path,
    backbones: Backbones,
    *,
    exif: Exif = "auto",
    batch_size: int | None = None,
    decode_threads: int | None = None,
    max_failed_share: float = 0.2,
    take_over: bool = False,
) -> ExtractSummary:
    """Run the backbones over every part of `cache` that lacks a record of theirs, and only those it lacks.

    Other runs may be at work on the same cache: each does what no other one has claimed, and all end when every part
    is there. `take_over` says that no other run is alive, so that what dead ones have claimed is free at once.

    A picture that cannot be read is recorded with its reason and skipped. Raises InputError when the first
    pictures all fail, or when more than `max_failed_share` of this run's do (V3Det's copies lack many photos; a
    mistyped folder lacks all); what is committed by then stays.
    """
    size = batch_size or (8 if backbones.localizer is None else backbones.localizer.batch_size)
    names = [feature_set.name for feature_set in backbones.feature_sets(exif)]
    decoder = Decoder(cache.manifest, photo_folder, backbones.localizer, backbones.encoder, exif)
    failed = ignored = 0
    with Claims(cache.storage, take_over=take_over) as claims:
        parts = SharedParts(cache, names, claims)
        progress = Progress(parts.pictures, "pictures")
        while parts.wait():
            with (
                CommitThread(cache, parts) as writer,
                closing(decode_ahead(decoder, parts.jobs(), decode_threads)) as decoded,
            ):
                for batch in _timed_batches(decoded, size, cache.part_size, progress):
                    ignored += sum(picture.orientation_ignored for picture in batch)
                    for picture in _encode(batch, cache.manifest, backbones, progress):
                        failed += picture.failure is not None
                        with progress.timed("write"):
                            writer.put(picture)
                        progress.total = parts.pictures
                        progress.step()
                        _stop_if_hopeless(failed, progress, max_failed_share, photo_folder, picture.failure)
    return ExtractSummary(
        pictures=progress.done,
        failed=failed,
        parts=parts.done,
        parts_before=parts.before,
        parts_of_others=parts.lacking_before - parts.done,
        ignored_orientations=ignored,
        seconds=progress.seconds,
        shares=progress.shares(),
    )


def _timed_batches(
    pictures: Iterator[Decoded], size: int, part_size: int, progress: Progress
) -> Iterator[list[Decoded]]:
    """Lists of `size` pictures, shorter at a part's end; waiting for them is the decoders' share of the time.

    None spans two parts: how a product rounds may depend on what else is in its batch, and a part shall hold the same
    bytes whichever parts its run has done before.
    """
    batch: list[Decoded] = []
    while True:
        with progress.timed("decode"):
            picture = next(pictures, None)
        if picture is None:
            break
        batch.append(picture)
        if len(batch) == size or (picture.row + 1) % part_size == 0:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(
    batch: list[Decoded], manifest: Manifest, backbones: Backbones, progress: Progress
) -> Iterator[PictureFeatures]:
    """The wanted features of each picture of the batch, in order; one that failed passes with its reason."""
    features: dict[int, dict[str, NDArray[Any] | Stored]] = {picture.row: {} for picture in batch}
    for_clip = [picture for picture in batch if picture.clip is not None]
    if backbones.encoder is not None and for_clip:
        with progress.timed("encode"):
            maps = backbones.encoder.encode(torch.stack([p.clip for p in for_clip if p.clip is not None]))
            for picture, feature_map in zip(for_clip, maps.float().cpu().numpy(), strict=True):
                features[picture.row][backbones.encoder.name] = feature_map
    for_sam = [picture for picture in batch if picture.sam is not None]
    if backbones.localizer is not None and for_sam:
        with progress.timed("encode"):
            embeddings = backbones.localizer.encode([p.sam for p in for_sam if p.sam is not None])
        with progress.timed("tokens"):
            boxes = [manifest.boxes_xyxy[manifest.regions(picture.row)] for picture in for_sam]
            tokens = backbones.localizer.tokens_of_pictures(embeddings, boxes, [picture.size for picture in for_sam])
            for picture, of_picture in zip(for_sam, tokens, strict=True):
                features[picture.row][backbones.localizer.name] = of_picture.cpu().numpy()
    for picture in batch:
        yield PictureFeatures(picture.row, features[picture.row], picture.failure)


def _stop_if_hopeless(
    failed: int, progress: Progress, max_share: float, photo_folder: Path, reason: str | None
) -> None:
    seen, first = progress.done, min(FIRST_PICTURES, progress.total)
    if reason is not None and ((failed == seen == first) or failed > max(FIRST_PICTURES, max_share * seen)):
        raise InputError(
            f"{photo_folder}: {failed} of the first {seen} pictures could not be read (the last: {reason}); "
            "check --data, or allow more with --max-failed"
        )
