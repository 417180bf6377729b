"""What a localizer and a semantic encoder are: all that extraction, training and evaluation ask of them.

They are Protocols, so a class of somebody else's becomes one by having these names; nothing is inherited. What only
some can do (masks, text) is a Protocol of its own, which is asked for where it is needed. docs/backbones.md adds one.
"""

# B images, n boxes of an image, C token width, T map tokens, D map width, P prompts, E width of the text space

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.pipeline.images.preprocess import Preprocess

FIRST, ALL = TOKENS = ("first", "all")  # which outputs of a mask decoder are kept


@dataclass(frozen=True)
class BackboneConfig:
    """What somebody wants of a backbone; the one argument of whatever builds it.

    name        the name it was asked for by; use `registry.stored_name(name)` as the model's own
    weights     a source that `weights.load_weights` knows; None: the official ones
    device      as torch names it
    dtype       of the image encoder: float32, bfloat16 or float16
    preprocess  the preset's rule from images to inputs
    tokens      "first", or "all": a localizer's other mask tokens and predicted IoUs as well
    """

    name: str
    weights: str | None
    device: str
    dtype: str
    preprocess: Preprocess
    tokens: str = FIRST


class Backbone(Protocol):
    """What localizers and encoders have in common.

    name        of the feature set: letters, digits, `_`, `-` and `.`
    provenance  JSON-able, all that decides the numbers: "model", "weights_sha256", "input_pixels", "resize",
                "preprocess", "dtype"; under "versions" what is told and never compared
    device      where it computes
    """

    name: str
    provenance: dict[str, Any]
    device: torch.device

    @property
    def batch_size(self) -> int:
        """Images to encode at a time, where nobody says otherwise."""
        ...

    def preprocess(self, image: Image.Image) -> Tensor:
        """One image's input, on the CPU. Called from several threads at once."""
        ...

    def encode(self, images: Any, /) -> Tensor:
        """(B, ...): image embeddings or feature maps of preprocessed images."""
        ...


@runtime_checkable
class Localizer(Backbone, Protocol):
    """Boxes to location tokens.

    pixels     side of the square that the image encoder takes
    token_dim  C
    """

    pixels: int
    token_dim: int

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """What a region gets, by feature set: its shape. The first is `name`, the location token, (C,)."""
        ...

    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """(B, ...): the embeddings of images as `preprocess` gives them, one or several."""
        ...

    def tokens_of_images(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """B tensors float32 (n, C): the location tokens of each image's boxes, in order.

        embeddings      (B, ...)       as `encode` gives them
        boxes_xyxy      float32 (n, 4) each, in pixels of the original; n may be 0
        original_sizes  (height, width) each
        """
        ...

    def outputs_of_images(
        self, embeddings: Tensor, boxes_xyxy: Sequence[NDArray[np.float32]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The same with all that `outputs` names: of each image, float32 (n, *shape) by feature set."""
        ...


@runtime_checkable
class MaskingLocalizer(Localizer, Protocol):
    """A localizer that can also draw what it found."""

    def tokens_and_masks(
        self, embedding: Tensor, boxes_xyxy: NDArray[np.float32], original_size: tuple[int, int]
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """float32 (n, C) and bool (n, h, w): tokens and masks at the original size, of one image's boxes."""
        ...


@runtime_checkable
class SemanticEncoder(Backbone, Protocol):
    """An image to its feature map.

    map_shape   (T, D); T is the class token, where there is one, and a square of patches row by row. One without says
                `"class_token": False` in its provenance
    """

    map_shape: tuple[int, int]

    def encode(self, batch: Tensor) -> Tensor:
        """float32 (B, T, D): the maps of preprocessed images, stacked."""
        ...


@runtime_checkable
class TextEncoder(SemanticEncoder, Protocol):
    """An encoder whose images and prompts meet in one space, as training and evaluation need.

    weights_sha256  of the file that holds both towers
    text_dim        E
    logit_scale     what cosines are multiplied by
    """

    weights_sha256: str
    text_dim: int
    logit_scale: float

    def embed_images(self, batch: Tensor) -> Tensor:
        """float32 (B, E): whole preprocessed images, not normalised."""
        ...

    def embed_prompts(self, prompts: Sequence[str], /) -> Tensor:
        """float32 (P, E): the prompts, in order, not normalised. Raises InputError for one that it cannot read."""
        ...


@runtime_checkable
class LimitedTextEncoder(TextEncoder, Protocol):
    """An encoder that reads some words only, such as the toy one; `known_words` is empty where it reads any."""

    known_words: tuple[str, ...]

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that it cannot read, in their order."""
        ...


@runtime_checkable
class ProjectingEncoder(TextEncoder, Protocol):
    """An encoder that takes each token of its map into the text's space, not whole images alone."""

    def project(self, feature_map: Tensor) -> Tensor:
        """float32 (..., D) -> (..., E), token by token."""
        ...


def missing_members(model: object, protocol: type) -> str:
    """The names that `protocol` has and `model` lacks, for people."""
    wanted = {name for each in protocol.__mro__ for name in (*vars(each).get("__annotations__", {}), *vars(each))}
    return ", ".join(sorted(name for name in wanted if not name.startswith("_") and not hasattr(model, name)))
