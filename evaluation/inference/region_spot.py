"""RegionSpot in one object: an image and boxes in, a name, its score and a mask for every box out.

Localizer, encoder and head run in the same order and batches here, in evaluation and on the command line, so that
what `predict` says is what AP was measured on.
"""

# B images, R regions (padded), V classes, E text embedding, h, w pixels of the original image

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.machine import compute_device
from regionspot.evaluation.inference.boxes import check_boxes
from regionspot.evaluation.inference.head_features import TrainedOn, features_of
from regionspot.evaluation.inference.scoring import RegionScores, Timed, head_digest, head_probabilities
from regionspot.evaluation.metrics.detections import Masks, concatenate_masks
from regionspot.fusion.checkpoint import load_checkpoint
from regionspot.fusion.head import FusionHead
from regionspot.fusion.templates import template_set
from regionspot.fusion.vocabulary import Vocabulary, build_vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.clip import load_text_encoder
from regionspot.pipeline.backbones.dtypes import AUTO
from regionspot.pipeline.backbones.protocols import Localizer, MaskingLocalizer, TextEncoder
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.images.decode import Exif, ImageSource, read_image

log = logging.getLogger(__name__)

Model = TypeVar("Model")

MASK_PIXELS = 50_000_000  # of the bool masks that are in memory at a time


@dataclass(frozen=True)
class Region:
    """What one box was recognised as.

    box_xyxy  x1, y1, x2, y2 in pixels of the image
    name      the likeliest of the names asked about; score is its softmax probability among these names
    scores    the likeliest few names with their scores, best first
    mask      bool (h, w), SAM's mask of the box; None where masks were not asked for, or the localizer draws none
    """

    box_xyxy: tuple[float, float, float, float]
    name: str
    score: float
    scores: tuple[tuple[str, float], ...]
    mask: NDArray[np.bool_] | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything but the mask, ready for `json.dumps`."""
        scores = [{"name": name, "score": score} for name, score in self.scores]
        return {"box": list(self.box_xyxy), "name": self.name, "score": self.score, "scores": scores}


@dataclass(frozen=True)
class Prepared:
    """One image ready for both encoders: SAM's and CLIP's input, its size (h, w), and its boxes float32 (n, 4)."""

    sam: Tensor
    clip: Tensor
    size: tuple[int, int]
    boxes_xyxy: NDArray[np.float32]


class RegionSpot:
    """A trained head between its two frozen backbones. Made by `load`, or from loaded parts."""

    def __init__(
        self,
        head: FusionHead,
        localizer: Localizer,
        encoder: TextEncoder,
        templates: Sequence[str],
        *,
        exif: str | None = None,
    ) -> None:
        """`exif` is the rule by which the images that the head was trained on were turned, where that is known."""
        self.device = torch.device(encoder.device)
        self.head = head.to(self.device).eval().requires_grad_(False)
        self.localizer, self.encoder = localizer, encoder
        self.templates = tuple(templates)
        self.exif = exif
        self._pieces = defaultdict[str, Halving](Halving)  # by stage: a batch that fits one model may not fit another

    def identity(self) -> dict[str, Any]:
        """What decides the numbers besides images, boxes and names, ready for JSON."""
        backbones = {"localizer": self.localizer.provenance, "encoder": self.encoder.provenance}
        return {"head_sha256": head_digest(self.head), **backbones}

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        weights: str | None = None,
        device: str | None = None,
        *,
        preset: str | None = None,
        sam_weights: str | None = None,
        clip_weights: str | None = None,
        dtype: str = AUTO,
        preprocess: str | None = None,
        check_weights: bool = True,
    ) -> RegionSpot:
        """A checkpoint with the backbones that it names, which make features as those that it was trained on.

        weights        source of both backbones' weights, as `load_weights` knows them; sam_weights and clip_weights
                       go before it. None: the official files
        device         "cpu", "cuda", ...; None: a GPU where there is one
        preset         which model a file released by the authors is, where its shapes do not tell
        dtype          of the image encoders; "auto": that of the features which the head was trained on, or where
                       its checkpoint states none, what suits the device
        preprocess     a preset of pipeline/images/preprocess.py; None: that of the features which the head was
                       trained on
        check_weights  refuse backbones other than those that the head was trained with

        Another dtype or preprocessing than the head's own is taken with a warning. Raises WeightsError for a checkpoint
        or weights that cannot be loaded or do not belong together, InputError for a dtype that the device cannot
        compute in.
        """
        path = Path(checkpoint)
        loaded = load_checkpoint(path, preset)
        trained = features_of(path, loaded.info)
        device = str(compute_device(device))

        def load_as(load: Callable[..., Model], one: TrainedOn, source: str | None) -> Model:
            resolved = one.dtype if dtype == AUTO else dtype
            return load(one.name, source or weights, device, resolved, preprocess=preprocess or one.preprocess)

        localizer = load_as(load_localizer, trained.tokens, sam_weights)
        encoder = load_as(load_text_encoder, trained.maps, clip_weights)
        asked = [name for name, given in (("dtype", dtype != AUTO), ("preprocess", preprocess)) if given]
        provenances = {each.name: each.provenance for each in (localizer, encoder)}
        trained.require_backbones(provenances, asked, strict=check_weights)
        # The authors evaluate with the templates that they train with; their files do not state them.
        templates = loaded.info.templates or template_set("reference")
        return cls(loaded.head, localizer, encoder, templates, exif=trained.exif)

    def predict(
        self,
        image: ImageSource | NDArray[np.uint8],
        boxes: NDArray[np.float32] | Sequence[Sequence[float]],
        names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        masks: bool = True,
        top: int = 5,
        exif: Exif = "apply",
    ) -> list[Region]:
        """Name every box by one of `names`.

        image      a path, a file's content as bytes, a PIL image, or uint8 (h, w, 3) or (h, w)
        boxes      (n, 4) x1, y1, x2, y2 in pixels of the image as it is seen; what reaches over its edge is cut off
        names      what a box may be; scores compare these with each other, so one name alone always scores 1, and a
                   name given twice is taken once
        templates  a set's name or a list; None: those that the head was trained with
        top        how many names each region lists
        exif       "apply" turns the image upright as its EXIF or XMP says, also an image that PIL opened; boxes are
                   those of the upright image. "ignore" takes it as stored. An array is taken as it is

        Raises InputError for a box outside of the image, an empty list of names, a name that is too long, or scores
        that are not finite; ImageError for an image that cannot be read.
        """
        upright = _image(image, exif)
        checked = check_boxes(boxes, (upright.height, upright.width))
        vocabulary = self.vocabulary(_each_once(names), templates)
        if not len(checked):
            return []
        drawn = masks and isinstance(self.localizer, MaskingLocalizer)
        found = self.score([self.prepare(upright, checked)], self.text(vocabulary), drawn)[0]
        if problem := found.not_finite():
            raise InputError(f"{image if isinstance(image, str | Path) else 'image'}: {problem}")
        return [
            _region(box, probabilities, vocabulary.names, top, None if found.masks is None else found.masks.decode(row))
            for row, (box, probabilities) in enumerate(zip(checked, found.probabilities, strict=True))
        ]

    def vocabulary(self, names: Sequence[str], templates: str | Sequence[str] | None = None) -> Vocabulary:
        """The stored or newly computed vocabulary of these names. Raises InputError as `build_vocabulary` does."""
        if isinstance(names, str):
            raise InputError(f"names is the text {names!r}, expected a list of names such as {names.split(',')}")
        if isinstance(templates, str):
            templates = template_set(templates)
        return build_vocabulary(names, templates or self.templates, self.encoder)

    def text(self, vocabulary: Vocabulary) -> Tensor:
        """float32 (V, E): the vocabulary's embeddings where the head runs."""
        return vocabulary.embeddings.to(self.device)

    def prepare(self, image: Image.Image, boxes_xyxy: NDArray[np.float32]) -> Prepared:
        """Resize for both encoders; may run in a thread."""
        size = (image.height, image.width)
        return Prepared(self.localizer.preprocess(image), self.encoder.preprocess(image), size, boxes_xyxy)

    def score(
        self, images: Sequence[Prepared], text: Tensor, masks: bool = False, timed: Timed | None = None
    ) -> list[RegionScores]:
        """Scores of the regions of each image, for text embeddings (V, E).

        A batch that the GPU's memory does not hold is computed in halves, and so are all after it. `timed` is entered
        with the name of each stage: "sam", "clip", "tokens" or "tokens and masks", "head".
        """
        timed = timed or _untimed
        with timed("sam"):
            embeddings = self._pieces["sam"](self.localizer.encode, [image.sam for image in images])
        with timed("clip"):
            feature_maps = self._pieces["clip"](
                lambda piece: self.encoder.encode(torch.stack(list(piece))), [image.clip for image in images]
            )
        with timed("tokens and masks" if masks else "tokens"):
            located = [self._locate(*each, masks) for each in zip(images, embeddings, strict=True)]
        with timed("head"):
            tokens = [of_image for of_image, _ in located]
            probabilities = head_probabilities(self.head, tokens, feature_maps, text, self._pieces["head"])
        return [RegionScores(found, made) for found, (_, made) in zip(probabilities, located, strict=True)]

    def _locate(self, image: Prepared, embedding: Tensor, masks: bool) -> tuple[Tensor, Masks | None]:
        """Tokens (n, C) of one image's boxes, and their masks, a few at a time: bool masks of 300 boxes are large."""
        if not masks:
            found = self.localizer.tokens_of_images(embedding[None], [image.boxes_xyxy], [image.size])
            return found[0], None
        localizer = self.localizer
        if not isinstance(localizer, MaskingLocalizer):
            raise InputError(f"localizer {localizer.name}: draws no masks; ask for none (--no-masks)")
        step = max(1, MASK_PIXELS // (image.size[0] * image.size[1]))
        pieces = [
            localizer.tokens_and_masks(embedding, image.boxes_xyxy[start : start + step], image.size)
            for start in range(0, max(1, len(image.boxes_xyxy)), step)
        ]
        made = concatenate_masks([Masks.encode(bits) for _, bits in pieces])
        return torch.cat([tokens for tokens, _ in pieces]), made


def _each_once(names: Sequence[str]) -> Sequence[str]:
    """The names without repetitions, which would share their probability; a number of spaces makes no other name."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        return names  # for `vocabulary` to refuse
    once = dict.fromkeys(" ".join(name.split()) for name in names)
    if len(once) < len(names):
        log.warning("%d of %d names are given twice and taken once", len(names) - len(once), len(names))
    return list(once)


def _image(image: ImageSource | NDArray[np.uint8], exif: Exif) -> Image.Image:
    if isinstance(image, str | os.PathLike | bytes | Image.Image):
        return read_image(image, exif=exif)
    grey_or_rgb = isinstance(image, np.ndarray) and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
    if not grey_or_rgb or image.dtype != np.uint8 or not image.size:
        found = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(
            f"image is {found}, expected a path, bytes, a PIL image, or uint8 of shape (h, w, 3) or (h, w)"
        )
    return Image.fromarray(image).convert("RGB")


def _region(
    box: NDArray[np.float32],
    probabilities: NDArray[np.float32],
    names: Sequence[str],
    top: int,
    mask: NDArray[np.bool_] | None,
) -> Region:
    best = np.argsort(-probabilities, kind="stable")[: max(1, top)]
    scores = tuple((names[index], float(probabilities[index])) for index in best)
    x1, y1, x2, y2 = box.tolist()
    return Region((x1, y1, x2, y2), scores[0][0], scores[0][1], scores, mask)


def _untimed(_: str) -> AbstractContextManager[None]:
    return contextlib.nullcontext()
