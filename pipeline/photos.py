"""Opening one photo: any mode to RGB, in the orientation that its boxes were drawn in.

A camera may store a picture sideways and say so in EXIF. Some datasets annotate the stored pixels, others what a
viewer shows; the size that the annotation states tells which, and boxes on the other one would be silently wrong.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from regionspot.cache.errors import InputError, PhotoError

Exif = Literal["auto", "apply", "ignore"]

# What makes a picture upright, by its orientation (EXIF 2.32, tag 0x0112; 1 is upright as stored).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)  # these swap height and width


@dataclass(frozen=True)
class Photo:
    """A decoded picture: RGB, 8 bits a channel. `orientation` is what became of EXIF's, "none" where it states none."""

    image: Image.Image
    orientation: Literal["none", "applied", "ignored"]


def check_exif(rule: str) -> Exif:
    """The rule itself. Raises InputError for one that is none."""
    if rule not in get_args(Exif):
        raise InputError(f"exif {rule!r}: expected one of {', '.join(get_args(Exif))}")
    return cast("Exif", rule)


def read_photo(
    path: str | os.PathLike[str], stated_size: tuple[int, int] | None = None, exif: Exif = "auto"
) -> Image.Image:
    """The picture at `path` as RGB; transparency is dropped.

    `stated_size` is (height, width) of the original as its annotation gives it. With "auto" the EXIF orientation is
    applied exactly when that makes the picture this size, and ignored where no size is stated.

    Raises PhotoError when it is absent, broken, too large to be a photo, or of another size than stated.
    """
    return decode_photo(path, stated_size, exif).image


def decode_photo(
    path: str | os.PathLike[str], stated_size: tuple[int, int] | None = None, exif: Exif = "auto"
) -> Photo:
    """As `read_photo`, and what became of the EXIF orientation."""
    path = Path(path)
    try:
        with Image.open(path) as stored:
            orientation = _orientation(stored)
            applied = orientation in TURNS and _applies(exif, orientation, stored.size, stated_size)
            image = to_rgb(stored)
    except Exception as error:  # PIL's decoders pass on whatever broken bytes trip them into
        raise PhotoError(f"{path}: {_reason(path, error)}") from None
    if applied:
        image = image.transpose(TURNS[orientation])
    if stated_size is not None and (image.height, image.width) != tuple(stated_size):
        raise PhotoError(
            f"{path}: is {image.width} x {image.height} pixels (width x height), its annotation states "
            f"{stated_size[1]} x {stated_size[0]}; boxes would not fit: is this another copy of the photos?"
        )
    return Photo(image, "applied" if applied else "ignored" if orientation in TURNS else "none")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels, and PIL raises all kinds of errors on it
        return 1


def _applies(exif: Exif, orientation: int, size: tuple[int, int], stated_size: tuple[int, int] | None) -> bool:
    """Whether to turn a picture stored as `size`, which is PIL's (width, height)."""
    if exif != "auto" or stated_size is None:
        return exif == "apply"
    height, width = stated_size
    return orientation in QUARTER_TURNS and size != (width, height) and size == (height, width)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if path.is_file() and path.stat().st_size == 0:
        return "is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture in a format that is known"
    if isinstance(error, Image.DecompressionBombError):
        return f"has too many pixels for a photo (more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,})"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"is broken or cut off ({' '.join(str(error).split()) or type(error).__name__})"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of PIL as 8-bit RGB; transparency is dropped, 16-bit grey keeps its upper 8 bits."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        # PIL would clip 16-bit values to 255, a white picture; a 32-bit one may hold 8-bit values all the same.
        image = Image.fromarray((grey >> 8 if grey.max(initial=0) > 255 else grey).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
