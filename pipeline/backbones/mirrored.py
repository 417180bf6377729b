"""Mirrored backbones: the features of each image flipped left to right, as feature sets `<name>.flip`.

A mirrored model is a backbone like any other, so the batches, resuming, retries and checks of an extraction apply to
its feature sets unchanged.
"""

# B images, n boxes of an image, C token width

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.cache.format.schema import FLIP
from regionspot.pipeline.backbones.dense import require_dense
from regionspot.pipeline.backbones.protocols import Backbone, Localizer, SemanticEncoder


class _Mirrored:
    def __init__(self, model: Backbone) -> None:
        self.name, self.device = model.name + FLIP, model.device
        self.provenance = {**model.provenance, "view": "flip"}
        self.encode = model.encode
        self._preprocess, self._model = model.preprocess, model

    @property
    def batch_size(self) -> int:
        return self._model.batch_size

    def preprocess(self, image: Image.Image) -> Tensor:
        """The model's input for the mirrored image."""
        return self._preprocess(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


class MirroredEncoder(_Mirrored):
    """A SemanticEncoder of mirrored images."""

    def __init__(self, encoder: SemanticEncoder) -> None:
        super().__init__(encoder)
        self.map_shape = encoder.map_shape
        self.dense_shape = getattr(encoder, "dense_shape", None)
        self.logit_scale = getattr(encoder, "logit_scale", 1.0)  # used where it has dense maps
        self._encoder = encoder

    def encode_with_dense(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, T, D) and (B, P, E), as a DenseEncoder's."""
        return require_dense(self._encoder).encode_with_dense(batch)


class MirroredLocalizer(_Mirrored):
    """A Localizer of mirrored images. Its boxes are those of the original image, and are mirrored here."""

    def __init__(self, localizer: Localizer) -> None:
        super().__init__(localizer)
        self.pixels, self.token_dim = localizer.pixels, localizer.token_dim
        self.outputs = {name + FLIP: shape for name, shape in localizer.outputs.items()}
        self._localizer = localizer

    def tokens_of_images(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """B tensors float32 (n, C), as a Localizer's."""
        return self._localizer.tokens_of_images(embeddings, _mirrored(boxes_xyxy, original_sizes), original_sizes)

    def outputs_of_images(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """All `outputs` of each image's boxes, as a Localizer's."""
        boxes = _mirrored(boxes_xyxy, original_sizes)
        outputs = self._localizer.outputs_of_images(embeddings, boxes, original_sizes)
        return [{name + FLIP: values for name, values in features.items()} for features in outputs]


def _mirrored(boxes_xyxy: Sequence[NDArray[np.float32]], sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """The boxes in the mirrored image: the right edge becomes the left one."""
    return [
        np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        for boxes, (_, width) in zip(boxes_xyxy, sizes, strict=True)
    ]
