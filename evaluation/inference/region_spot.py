"""RegionSpot in one object: takes an image and boxes, returns a name, its score and a mask for every box.

`predict`, evaluation and the command line share this code, so `predict` gives the results that AP was measured on.
"""

# B images, R regions (padded), V classes, E text embedding, h, w pixels of the original image

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from regionspot.cache.errors import InputError
from regionspot.cache.machine import compute_device
from regionspot.evaluation.inference.boxes import check_boxes
from regionspot.evaluation.inference.head_features import HeadFeatureSet, head_features
from regionspot.evaluation.inference.scoring import RegionScores, encode_masks, head_probabilities
from regionspot.fusion.checkpoint import load_checkpoint, weights_digest
from regionspot.fusion.heads.pooling import relative_boxes
from regionspot.fusion.templates import template_set
from regionspot.fusion.vocabulary import Vocabulary, build_vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.clip import load_text_encoder
from regionspot.pipeline.backbones.dtypes import AUTO
from regionspot.pipeline.backbones.protocols import Localizer, MaskingLocalizer, TextEncoder
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.extraction.decode_ahead import DecodedImage
from regionspot.pipeline.images.decode import Exif, ImageSource, read_image

log = logging.getLogger(__name__)

Model = TypeVar("Model")


@dataclass(frozen=True)
class Region:
    """The prediction for one box.

    box_xyxy  x1, y1, x2, y2 in pixels of the image
    name      the most probable of the given names; score is its softmax probability among them
    scores    the most probable names with their scores, best first
    mask      bool (h, w), SAM's mask of the box; None if not requested or if the localizer cannot make masks
    """

    box_xyxy: tuple[float, float, float, float]
    name: str
    score: float
    scores: tuple[tuple[str, float], ...]
    mask: NDArray[np.bool_] | None = None

    def as_json(self) -> dict[str, Any]:
        """All fields except the mask, as JSON-able values."""
        scores = [{"name": name, "score": score} for name, score in self.scores]
        return {"box": list(self.box_xyxy), "name": self.name, "score": self.score, "scores": scores}


class RegionSpot:
    """A trained head with its two frozen backbones. Created by `load`, or from loaded models."""

    def __init__(
        self,
        head: nn.Module,
        localizer: Localizer,
        encoder: TextEncoder,
        templates: Sequence[str],
        *,
        exif: str | None = None,
        trained_classes: tuple[str, ...] = (),
    ) -> None:
        """`exif` and `trained_classes`: EXIF rule of the images and names of the classes of the training, if known."""
        self.device = torch.device(encoder.device)
        self.head = head.to(self.device).eval().requires_grad_(False)
        self.localizer, self.encoder = localizer, encoder
        self.templates = tuple(templates)
        self.exif, self.trained_classes = exif, trained_classes
        self._batches = defaultdict[str, Halving](Halving)  # by stage: a batch may fit one model and not another

    def identity(self) -> dict[str, Any]:
        """Everything that decides the results except images, boxes and names; JSON-able."""
        backbones = {"localizer": self.localizer.provenance, "encoder": self.encoder.provenance}
        return {"head_sha256": weights_digest(self.head.state_dict()), **backbones}

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        weights: str | None = None,
        device: str | None = None,
        *,
        preset: str | None = None,
        head_class: str | None = None,
        sam_weights: str | None = None,
        clip_weights: str | None = None,
        dtype: str = AUTO,
        preprocess: str | None = None,
        check_weights: bool = True,
    ) -> RegionSpot:
        """Load a checkpoint and the backbones that it names, configured as for its training features.

        weights        source of the weights of both backbones, as for `load_weights`; sam_weights and clip_weights
                       override it. None: the official files
        device         "cpu", "cuda", ...; None: a GPU if there is one
        preset         the model of a file released by the authors, if its shapes are ambiguous
        head_class     `file.py:Class` or `package.module:Class` of a head of your own class, whose code is then run
        dtype          of the image encoders; "auto": that of the head's training features, or the default of the device
                       if the checkpoint does not state it
        preprocess     a preset of pipeline/images/preprocess.py; None: that of the head's training features
        check_weights  refuse other backbones than the head was trained with

        Another dtype or preprocessing than in training logs a warning. Raises WeightsError for a checkpoint or weights
        that cannot be loaded or do not belong together, InputError for a dtype that the device does not support.
        """
        path = Path(checkpoint)
        loaded = load_checkpoint(path, preset, head_class)
        features = head_features(path, loaded.info)
        device = str(compute_device(device))

        def load_model(load: Callable[..., Model], trained_on: HeadFeatureSet, source: str | None) -> Model:
            resolved = trained_on.dtype if dtype == AUTO else dtype
            rule = preprocess or trained_on.preprocess
            return load(trained_on.name, source or weights, device, resolved, preprocess=rule)

        localizer = load_model(load_localizer, features.tokens, sam_weights)
        encoder = load_model(load_text_encoder, features.maps, clip_weights)
        overridden = [name for name, given in (("dtype", dtype != AUTO), ("preprocess", preprocess)) if given]
        provenances = {model.name: model.provenance for model in (localizer, encoder)}
        features.require_backbones(provenances, overridden, strict=check_weights)
        # Released files do not state their templates; the authors train and evaluate with the same ones.
        templates = loaded.info.templates or template_set("reference")
        classes = loaded.info.classes
        return cls(loaded.head, localizer, encoder, templates, exif=features.exif, trained_classes=classes)

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
        """Select the best of `names` for every box.

        image      a path, the content of a file as bytes, a PIL image, or uint8 (h, w, 3) or (h, w)
        boxes      (n, 4) x1, y1, x2, y2 in pixels of the upright image; clipped to the image
        names      candidates; scores are relative, so a single name always scores 1. Repeated names count once
        templates  name of a template set, or a list; None: those that the head was trained with
        top        number of names that each region lists
        exif       "apply" rotates the image as its EXIF or XMP orientation says, also an image opened by PIL; "ignore"
                   keeps it as stored. An array is never rotated

        Raises InputError for a box outside the image, an empty list of names, a name that is too long, or scores that
        are not finite; ImageError for an image that cannot be read.
        """
        upright = _read(image, exif)
        size = (upright.height, upright.width)
        clipped = check_boxes(boxes, size)
        vocabulary = self.vocabulary(_without_repetitions(names), templates)
        if not len(clipped):
            return []
        inputs = {model.name: model.preprocess(upright) for model in (self.localizer, self.encoder)}
        text = vocabulary.embeddings.to(self.device)
        scores = self.score([DecodedImage(0, inputs, size)], [clipped], text)[0]
        if problem := scores.not_finite():
            raise InputError(f"{image if isinstance(image, str | Path) else 'image'}: {problem}")
        decoded: Iterable[NDArray[np.bool_] | None] = [None] * len(clipped)
        if masks and scores.masks is not None:
            decoded = map(scores.masks(np.arange(len(clipped))).decode, range(len(clipped)))
        return [
            _region(box, probabilities, vocabulary.names, top, mask)
            for box, probabilities, mask in zip(clipped, scores.probabilities, decoded, strict=True)
        ]

    def vocabulary(self, names: Sequence[str], templates: str | Sequence[str] | None = None) -> Vocabulary:
        """The vocabulary of these names, stored or newly computed. Raises the errors of `build_vocabulary`."""
        if isinstance(names, str):
            raise InputError(f"names is the text {names!r}, expected a list of names such as {names.split(',')}")
        if isinstance(templates, str):
            templates = template_set(templates)
        return build_vocabulary(names, templates or self.templates, self.encoder)

    def score(
        self, images: Sequence[DecodedImage], boxes_xyxy: Sequence[NDArray[np.float32]], text: Tensor
    ) -> list[RegionScores]:
        """Scores of the regions of each image, for its boxes float32 (n, 4) and text embeddings (V, E).

        A batch that does not fit into the memory of the GPU is split in halves, and so are all later ones.
        """
        localizer, encoder = self.localizer, self.encoder
        inputs = [image.inputs[localizer.name] for image in images]
        embeddings = self._batches["sam"](localizer.encode, inputs)
        inputs = [image.inputs[encoder.name] for image in images]
        feature_maps = self._batches["clip"](lambda batch: encoder.encode(torch.stack(list(batch))), inputs)
        sizes = [image.size for image in images if image.size is not None]
        tokens = localizer.tokens_of_images(embeddings, boxes_xyxy, sizes)
        relative = [relative_boxes(boxes, *size) for boxes, size in zip(boxes_xyxy, sizes, strict=True)]
        probabilities = head_probabilities(self.head, tokens, relative, feature_maps, text, self._batches["head"])
        if not isinstance(localizer, MaskingLocalizer):
            return [RegionScores(of_image) for of_image in probabilities]
        return [
            RegionScores(of_image, partial(encode_masks, localizer, embedding, boxes, size))
            for of_image, embedding, boxes, size in zip(probabilities, embeddings, boxes_xyxy, sizes, strict=True)
        ]


def _without_repetitions(names: Sequence[str]) -> Sequence[str]:
    """The names, each once: a repeated name would split its probability. White space is normalised first."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        return names  # `vocabulary` raises the error
    unique = dict.fromkeys(" ".join(name.split()) for name in names)
    if len(unique) < len(names):
        log.warning("%d of %d names are repeated and count once", len(names) - len(unique), len(names))
    return list(unique)


def _read(image: ImageSource | NDArray[np.uint8], exif: Exif) -> Image.Image:
    if isinstance(image, str | os.PathLike | bytes | Image.Image):
        return read_image(image, exif=exif)
    grey_or_rgb = isinstance(image, np.ndarray) and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
    if not grey_or_rgb or image.dtype != np.uint8 or not image.size:
        actual = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(
            f"image is {actual}, expected a path, bytes, a PIL image, or uint8 of shape (h, w, 3) or (h, w)"
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
