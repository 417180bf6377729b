"""The interfaces of localizers and semantic encoders, for extraction, training and evaluation.

They are Protocols: a class of another package implements one by having these members, without inheritance. Optional
abilities (masks, text) are Protocols of their own. docs/backbones.md shows how to write one.
"""

# B images, n boxes of an image, C token width, T map tokens, D map width, P prompts, E width of the joint space

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.pipeline.images.preprocess import Preprocess

FIRST, ALL = TOKENS = ("first", "all")  # which outputs of a mask decoder are stored

# The size at which masks are thresholded. "sam": that of the image, as in segment_anything. "reference": the first size
# of the preset "reference", whatever the localizer's preset is, then resized to the image by nearest neighbour, as in
# regionspot/util/preprocessing.py and postprocessing.py of RegionSpot's authors.
MaskThreshold = Literal["sam", "reference"]


@dataclass(frozen=True)
class BackboneConfig:
    """The only argument of a backbone's builder.

    name        as requested; the model's own name should be `registry.stored_name(name)`
    weights     a source for `weights.load_weights`; None: the official weights
    device      torch's name of the device
    dtype       of the image encoder: float32, bfloat16 or float16
    preprocess  the preprocessing preset
    tokens      "first", or "all": a localizer's other mask tokens and predicted IoUs as well
    """

    name: str
    weights: str | None
    device: str
    dtype: str
    preprocess: Preprocess
    tokens: str = FIRST


class Backbone(Protocol):
    """The common members of localizers and encoders.

    name        of the feature set: letters, digits, `_`, `-` and `.`
    provenance  JSON-serialisable, everything that determines the values: "model", "weights_sha256", "input_pixels",
                "resize", "preprocess", "dtype"; "versions" is recorded but not compared
    """

    name: str
    provenance: dict[str, Any]
    device: torch.device

    @property
    def batch_size(self) -> int:
        """Default batch size; on a GPU it is measured instead (batch_size.py)."""
        ...

    def preprocess(self, image: Image.Image) -> Tensor:
        """One image's input, on the CPU. Must be thread-safe."""
        ...

    def encode(self, images: Any, /) -> Tensor:
        """(B, ...): image embeddings or feature maps of preprocessed images."""
        ...


@runtime_checkable
class Localizer(Backbone, Protocol):
    """Computes location tokens of boxes.

    pixels     side of the image encoder's square input
    token_dim  C
    """

    pixels: int
    token_dim: int

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Shape per region of each feature set. The first is `name`, the location token, (C,)."""
        ...

    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """(B, ...): the embeddings of preprocessed images."""
        ...

    def tokens_of_images(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """B tensors float32 (n, C): the location tokens of each image's boxes.

        embeddings      (B, ...) from `encode`
        boxes_xyxy      B arrays float32 (n, 4), in pixels of the original image; n may be 0
        original_sizes  B times (height, width)
        """
        ...

    def outputs_of_images(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """All `outputs` of each image's boxes: float32 (n, *shape) by feature set."""
        ...


@runtime_checkable
class MaskingLocalizer(Localizer, Protocol):
    """A localizer that also computes masks."""

    def tokens_and_masks(
        self,
        embedding: Tensor,
        boxes_xyxy: NDArray[np.float32],
        original_size: tuple[int, int],
        mask_threshold: MaskThreshold = "sam",
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """float32 (n, C) and bool (n, h, w): tokens of one image's boxes, and masks at the original size."""
        ...


@runtime_checkable
class PointLocalizer(MaskingLocalizer, Protocol):
    """A localizer that also finds regions: around points, or everywhere."""

    def masks_of_points(
        self,
        embedding: Tensor,
        points_xy: NDArray[np.float32],
        labels: NDArray[np.int64],
        original_size: tuple[int, int],
    ) -> NDArray[np.bool_]:
        """bool (n, h, w): the masks that n prompts of k points select in one image; a mask may be empty.

        points_xy   (n, k, 2), in pixels of the original image
        labels      (n, k): 1 for a point of the region, 0 for one outside of it
        """
        ...

    def propose_boxes(self, embedding: Tensor, original_size: tuple[int, int]) -> NDArray[np.float32]:
        """float32 (n, 4): boxes around everything that is segmented in one image, best first."""
        ...


@runtime_checkable
class SemanticEncoder(Backbone, Protocol):
    """Computes an image's feature map.

    map_shape   (T, D); T is the class token, if there is one, and a square of patches in row-major order. Without a
                class token the provenance contains `"class_token": False`
    """

    map_shape: tuple[int, int]

    def encode(self, batch: Tensor) -> Tensor:
        """float32 (B, T, D): the maps of stacked preprocessed images."""
        ...


@runtime_checkable
class TextEncoder(SemanticEncoder, Protocol):
    """An encoder with a joint space for images and prompts, which training and evaluation need.

    weights_sha256  of the file with both towers
    text_dim        E
    logit_scale     factor of cosine similarities
    """

    weights_sha256: str
    text_dim: int
    logit_scale: float

    def embed_images(self, batch: Tensor) -> Tensor:
        """float32 (B, E): whole preprocessed images, not normalised."""
        ...

    def embed_prompts(self, prompts: Sequence[str], /) -> Tensor:
        """float32 (P, E): the prompts, not normalised. Raises InputError for a prompt that it cannot read."""
        ...


@runtime_checkable
class LimitedTextEncoder(TextEncoder, Protocol):
    """An encoder with a limited vocabulary, such as the toy one; `known_words` is empty if it reads all words."""

    known_words: tuple[str, ...]

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that it cannot read, in order."""
        ...


@runtime_checkable
class ProjectingEncoder(TextEncoder, Protocol):
    """An encoder that can project each token of its map into the joint space."""

    def project(self, feature_map: Tensor) -> Tensor:
        """float32 (..., D) -> (..., E), token by token."""
        ...


@runtime_checkable
class DenseEncoder(SemanticEncoder, Protocol):
    """An encoder that can also compute dense maps: its patches in the joint space, as `embed_images` embeds images.

    dense_shape  (P, E), the patches in row-major order; None if this model has no dense map (dense.py)
    logit_scale  factor of cosine similarities
    """

    dense_shape: tuple[int, int] | None
    logit_scale: float

    def encode_with_dense(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, T, D) and (B, P, E): what `encode` gives, and the dense maps, from one pass."""
        ...


def missing_members(model: object, protocol: type) -> str:
    """Names of the members of `protocol` that `model` lacks, separated by commas."""
    members = {name for base in protocol.__mro__ for name in (*vars(base).get("__annotations__", {}), *vars(base))}
    return ", ".join(sorted(name for name in members if not name.startswith("_") and not hasattr(model, name)))
