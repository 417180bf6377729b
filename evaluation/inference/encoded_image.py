"""One image of a caller: read from whatever form it has, and what the frozen models compute of it."""

# C width of SAM's embedding, g its side, T map tokens, D width, P patches, E text embedding, h, w pixels

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.pipeline.images.decode import Exif, ImageSource, read_image

AnyImage: TypeAlias = ImageSource | NDArray[np.uint8]


class EncodedImage:
    """What the frozen models compute once for an image, so that other boxes, points or names need no model of images.

    image        upright, RGB
    name         of its file, for messages
    feature_map  float32 (T, D), the encoder's; a dense map (P, E) for the method "dense", None for "crop"
    """

    def __init__(
        self, image: Image.Image, name: str, feature_map: Tensor | None, localize: Callable[[Image.Image], Tensor]
    ) -> None:
        self.image, self.name, self.feature_map, self._localize = image, name, feature_map, localize

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width

    @cached_property
    def embedding(self) -> Tensor:
        """float32 (C, g, g): the localizer's, computed when it is needed first."""
        return self._localize(self.image)


def is_one_image(image: AnyImage | EncodedImage | Iterable[AnyImage]) -> TypeGuard[AnyImage | EncodedImage]:
    """Whether this is an image, or so wrong that reading it gives the error; else it is an iterable of images."""
    return isinstance(image, str | os.PathLike | bytes | Image.Image | np.ndarray | EncodedImage) or not isinstance(
        image, Iterable
    )


def read_any(image: AnyImage, exif: Exif) -> Image.Image:
    """The upright image as RGB. Raises InputError for an array that is no image, else the errors of `read_image`."""
    if isinstance(image, str | os.PathLike | bytes | Image.Image):
        return read_image(image, exif=exif)
    grey_or_rgb = isinstance(image, np.ndarray) and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
    if not grey_or_rgb or image.dtype != np.uint8 or not image.size:
        actual = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(
            f"image is {actual}, expected a path, bytes, a PIL image, or uint8 of shape (h, w, 3) or (h, w)"
        )
    return Image.fromarray(image).convert("RGB")
