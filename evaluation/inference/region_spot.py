"""RegionSpot in one object: takes images and boxes, points or masks, returns a name, its score and a mask for each.

With a trained head it computes what AP is measured on; without one, it names regions by the frozen CLIP alone.
"""

# n regions, E text embedding, h, w pixels of the original image

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from regionspot.cache.errors import InputError, unknown_name
from regionspot.cache.machine import compute_device
from regionspot.evaluation.inference.boxes import check_boxes
from regionspot.evaluation.inference.encoded_image import AnyImage, EncodedImage, is_one_image, read_any
from regionspot.evaluation.inference.head_features import HeadFeatureSet, head_features
from regionspot.evaluation.inference.naming import name_regions, without_repetitions
from regionspot.evaluation.inference.prompts import box_of_mask, boxes_of_points, check_masks
from regionspot.evaluation.inference.regions import Regions
from regionspot.evaluation.inference.scoring import encode_masks, head_vectors
from regionspot.evaluation.inference.zero_shot import ZeroShotMethod, dense_embeddings, embed_crops
from regionspot.evaluation.metrics.detections import Masks
from regionspot.fusion.checkpoint import load_checkpoint, weights_digest
from regionspot.fusion.head import LOGIT_SCALE
from regionspot.fusion.heads.pooling import relative_boxes
from regionspot.fusion.templates import template_set
from regionspot.fusion.vocabulary import Vocabulary, build_vocabulary
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.builders import PRESETS, get_preset
from regionspot.pipeline.backbones.clip import load_text_encoder
from regionspot.pipeline.backbones.dense import require_dense
from regionspot.pipeline.backbones.dtypes import AUTO
from regionspot.pipeline.backbones.protocols import Localizer, MaskingLocalizer, PointLocalizer, TextEncoder
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.images.decode import Exif

log = logging.getLogger(__name__)

Model = TypeVar("Model")

ZERO_SHOT: dict[ZeroShotMethod, str] = {
    "dense": "named by the mean of CLIP's dense map in each region, without training",
    "crop": "named by CLIP on the crop of each region, without training",
}


class RegionSpot:
    """A trained head, or a method without one, with its two frozen backbones. Created by `load` or `zero_shot`.

    method   "head", "dense" or "crop"
    """

    def __init__(
        self,
        head: nn.Module | None,
        localizer: Localizer,
        encoder: TextEncoder,
        templates: Sequence[str],
        *,
        method: ZeroShotMethod = "dense",
        exif: str | None = None,
        trained_classes: tuple[str, ...] = (),
    ) -> None:
        """`method` counts without a head.

        `exif` and `trained_classes`: EXIF rule of the images and names of the classes of the training, if known. Raises
        InputError for an unknown method, and for one that the encoder does not support.
        """
        if method not in get_args(ZeroShotMethod):
            raise unknown_name("method", method, get_args(ZeroShotMethod))
        self.device = torch.device(encoder.device)
        self._head = None if head is None else head.to(self.device).eval().requires_grad_(False)
        self.localizer, self.encoder = localizer, encoder
        self.method = method if head is None else "head"
        self._dense = require_dense(encoder) if self.method == "dense" else None
        self.logit_scale = encoder.logit_scale if head is None else LOGIT_SCALE
        self.templates = tuple(templates)
        self.exif, self.trained_classes = exif, trained_classes
        self._batches = defaultdict[str, Halving](Halving)  # by stage: a batch may fit one model and not another

    @property
    def head(self) -> nn.Module:
        """The trained head. Raises InputError if there is none."""
        if self._head is None:
            raise InputError(f"method {self.method}: has no head; load a checkpoint")
        return self._head

    def identity(self) -> dict[str, Any]:
        """Everything that decides the results except images, boxes and names; JSON-able."""
        backbones = {"localizer": self.localizer.provenance, "encoder": self.encoder.provenance}
        if self._head is None:
            return {"method": self.method, **backbones}
        return {"head_sha256": weights_digest(self._head.state_dict()), **backbones}

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

        checkpoint     a file; or the name of a preset ("bl"), for `zero_shot`
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
        if str(checkpoint) in PRESETS and not path.exists():
            sources = {"sam_weights": sam_weights, "clip_weights": clip_weights}
            rule = preprocess or "direct"
            return cls.zero_shot(str(checkpoint), "dense", weights, device, dtype=dtype, preprocess=rule, **sources)
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

    @classmethod
    def zero_shot(
        cls,
        preset: str = "bl",
        method: ZeroShotMethod = "dense",
        weights: str | None = None,
        device: str | None = None,
        *,
        sam_weights: str | None = None,
        clip_weights: str | None = None,
        dtype: str = AUTO,
        preprocess: str = "direct",
    ) -> RegionSpot:
        """Load the two backbones of a preset, and name regions without a trained head.

        method   "dense": by the mean of CLIP's dense map in the region, one pass of CLIP an image; "crop": by CLIP on
                 the crop of every box, one pass a box

        The other arguments are those of `load`. Logs the method. Raises InputError for an unknown preset or method.
        """
        names, place = get_preset(preset), str(compute_device(device))
        localizer = load_localizer(names.localizer, sam_weights or weights, place, dtype, preprocess=preprocess)
        encoder = load_text_encoder(names.encoder, clip_weights or weights, place, dtype, preprocess=preprocess)
        spot = cls(None, localizer, encoder, template_set("reference"), method=method)
        log.info(
            "preset %s: regions are %s; a head trained on boxes with names (`regionspot train`, or a file of the "
            "authors by --checkpoint) also uses SAM's token of each region and the whole image around it",
            preset,
            ZERO_SHOT[method],
        )
        return spot

    @overload
    def predict(  # type: ignore[overload-overlap]  # a text or bytes is an image before it is an iterable
        self,
        image: AnyImage | EncodedImage,
        boxes: ArrayLike | None = None,
        names: Sequence[str] = (),
        templates: str | Sequence[str] | None = None,
        *,
        points: Sequence[Any] | NDArray[Any] | None = None,
        masks: Sequence[ArrayLike] | NDArray[Any] | None = None,
        with_masks: bool = True,
        top: int = 5,
        unknown_below: float | None = None,
        exif: Exif = "apply",
    ) -> Regions: ...

    @overload
    def predict(
        self,
        image: Iterable[AnyImage],
        boxes: Iterable[ArrayLike] | None = None,
        names: Sequence[str] = (),
        templates: str | Sequence[str] | None = None,
        *,
        points: Iterable[Any] | None = None,
        masks: Iterable[Any] | None = None,
        with_masks: bool = True,
        top: int = 5,
        unknown_below: float | None = None,
        exif: Exif = "apply",
    ) -> Iterator[Regions]: ...

    def predict(
        self,
        image: AnyImage | EncodedImage | Iterable[AnyImage],
        boxes: Any = None,
        names: Sequence[str] = (),
        templates: str | Sequence[str] | None = None,
        *,
        points: Any = None,
        masks: Any = None,
        with_masks: bool = True,
        top: int = 5,
        unknown_below: float | None = None,
        exif: Exif = "apply",
    ) -> Regions | Iterator[Regions]:
        """Select the best of `names` for every region.

        image          a path, the content of a file as bytes, a PIL image, uint8 RGB (h, w, 3) or grey (h, w), or an
                       `EncodedImage`. An iterable of them gives an iterator of results; then boxes, points or masks
                       have one item for each image
        boxes          (n, 4) x1, y1, x2, y2 in pixels of the upright image; clipped to the image
        points         n points (x, y), or n lists of points (x, y, label), label 0 for a point outside of the region
        masks          bool (n, h, w). Without boxes, points and masks, SAM proposes regions everywhere
        names          candidates; scores are relative, so a single name always scores 1. Repeated names count once
        templates      name of a template set, or a list; None: those that the head was trained with
        with_masks     return masks: those given, else SAM's of the boxes
        top            number of names that each region lists
        unknown_below  a region whose `similarity` with its best name is below this has the name "unknown"; see
                       `threshold_at_precision`
        exif           "apply" rotates the image as its EXIF or XMP orientation says, also an image opened by PIL;
                       "ignore" keeps it as stored. An array is never rotated

        Raises InputError for a box outside the image, an empty list of names, a name that is too long, or scores that
        are not finite; ImageError for an image that cannot be read.
        """
        if sum(value is not None for value in (boxes, points, masks)) > 1:
            raise InputError("give either boxes, points or masks")
        vocabulary = self.vocabulary(without_repetitions(names), templates)

        def predict_one(image: AnyImage | EncodedImage, boxes: Any, points: Any, masks: Any) -> Regions:
            encoded = image if isinstance(image, EncodedImage) else self.encode(image, exif)
            region_boxes, region_masks = self._boxes_and_masks(encoded, boxes, points, masks)
            if not len(region_boxes):
                return Regions([], vocabulary.names)
            embedded = self.embed(encoded, region_boxes, region_masks)
            if not torch.isfinite(embedded).all():
                raise InputError(
                    f"{encoded.name}: scores are not finite; the features of a backbone overflow (use another dtype), "
                    "or are NaN themselves"
                )
            every = np.arange(len(region_boxes))
            if with_masks and region_masks is None and isinstance(self.localizer, MaskingLocalizer):
                region_masks = encode_masks(self.localizer, encoded.embedding, region_boxes, encoded.size, every)
            shown = region_masks if with_masks else None
            rles = [None if shown is None else shown[region] for region in every.tolist()]
            boxes_xyxy = region_boxes.tolist()
            return name_regions(embedded, boxes_xyxy, rles, vocabulary, self.logit_scale, top, unknown_below)

        if is_one_image(image):
            return predict_one(image, boxes, points, masks)
        return _predict_each(predict_one, cast("Iterable[AnyImage]", image), boxes, points, masks)

    def encode(self, image: AnyImage, exif: Exif = "apply") -> EncodedImage:
        """Run CLIP on an image; SAM runs when it is needed first. `predict` takes the result in place of the image."""
        upright = read_any(image, exif)
        feature_map = None
        if self.method != "crop":
            encode = self.encoder.encode if self._dense is None else self._dense.encode_with_dense
            output = encode(self.encoder.preprocess(upright)[None])
            feature_map = (output if isinstance(output, Tensor) else output[1])[0]
        name = str(image) if isinstance(image, str | os.PathLike) else "image"
        return EncodedImage(upright, name, feature_map, self._localize)

    def embed(self, image: EncodedImage, boxes_xyxy: NDArray[np.float32], masks: Masks | None = None) -> Tensor:
        """Embeddings float32 (n, E) of unit length of the boxes (n, 4); "dense" uses their `masks` if it has them."""
        relative = relative_boxes(boxes_xyxy, *image.size)
        if image.feature_map is None:
            return embed_crops(self.encoder, image.image, boxes_xyxy, batches=self._batches["crops"])
        if self._head is None:
            return dense_embeddings(image.feature_map, relative, masks)
        tokens = self.localizer.tokens_of_images(image.embedding[None], [boxes_xyxy], [image.size])
        vectors = head_vectors(self._head, tokens, [relative], image.feature_map[None], self._batches["head"])
        return F.normalize(vectors[0].float(), dim=-1)

    def rename(
        self,
        regions: Regions,
        names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        *,
        top: int = 5,
        unknown_below: float | None = None,
    ) -> Regions:
        """The same regions with the best of other names, by their embeddings: no image is needed."""
        vocabulary = self.vocabulary(without_repetitions(names), templates)
        if not regions:
            return Regions([], vocabulary.names)
        embedded = torch.from_numpy(np.stack([region.embedding for region in regions]))
        boxes, rles = [region.box_xyxy for region in regions], [region.rle for region in regions]
        return name_regions(embedded, boxes, rles, vocabulary, self.logit_scale, top, unknown_below)

    def vocabulary(self, names: Sequence[str], templates: str | Sequence[str] | None = None) -> Vocabulary:
        """The vocabulary of these names, stored or newly computed. Raises the errors of `build_vocabulary`."""
        if isinstance(names, str):
            raise InputError(f"names is the text {names!r}, expected a list of names such as {names.split(',')}")
        if isinstance(templates, str):
            templates = template_set(templates)
        return build_vocabulary(names, templates or self.templates, self.encoder)

    def _boxes_and_masks(
        self, image: EncodedImage, boxes: Any, points: Any, masks: Any
    ) -> tuple[NDArray[np.float32], Masks | None]:
        """The boxes of all prompts, and the masks if they are given. Without a prompt SAM proposes boxes."""
        if boxes is not None:
            return check_boxes(boxes, image.size), None
        if masks is not None:
            checked = check_masks(masks, image.size)
            return np.array([box_of_mask(mask) for mask in checked], np.float32).reshape(-1, 4), Masks.encode(checked)
        localizer = self.localizer
        if not isinstance(localizer, PointLocalizer):
            raise InputError(f"localizer {localizer.name}: takes boxes only; give boxes, or masks")
        if points is not None:
            return boxes_of_points(points, localizer, image.embedding, image.size), None
        proposed = localizer.propose_boxes(image.embedding, image.size)
        if not len(proposed):
            log.warning("%s: %s proposes no region; give boxes", image.name, localizer.name)
        return proposed, None

    def _localize(self, image: Image.Image) -> Tensor:
        return self.localizer.encode([self.localizer.preprocess(image)])[0]


def _predict_each(
    predict_one: Callable[..., Regions], images: Iterable[AnyImage], *prompts: Iterable[Any] | None
) -> Iterator[Regions]:
    """`prompts`: boxes, points and masks, with an item for each image; None: nothing for all of them."""
    iterators = [repeat(None) if prompt is None else iter(prompt) for prompt in prompts]
    for number, image in enumerate(images, start=1):
        try:
            of_image = [next(iterator) for iterator in iterators]
        except StopIteration:
            raise InputError(f"boxes, points or masks: have no item for image {number}") from None
        yield predict_one(image, *of_image)
