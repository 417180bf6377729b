"""Opening one photo: any mode to RGB, in the orientation that its boxes were drawn in.

A folder of millions of pictures holds everything that has ever been given a picture's name. Whatever is found, it is
either read as docs/pictures.md says or refused in one line: nothing here waits, runs a program or takes memory that
the header did not announce.

A camera may store a picture sideways and say so in EXIF. Some datasets annotate the stored pixels, others what a
viewer shows; the size that the annotation states tells which, and boxes on the other one would be silently wrong.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, cast, get_args

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from regionspot.cache.errors import PhotoError, unknown_name
from regionspot.pipeline.jpeg import MAGIC, decode_jpeg

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
# Where Pillow itself refuses, too, as long as nobody changes its MAX_IMAGE_PIXELS. Such a picture takes 0.9 GB.
MAX_PIXELS = 178_956_970
DRAWINGS = ("EPS", "WMF")  # Pillow would have other programs draw these
JPEG_BYTES = 2**28  # a longer file is not read into memory at once


@dataclass(frozen=True)
class Photo:
    """A decoded picture: RGB, 8 bits a channel. `orientation` is what became of EXIF's, "none" where it states none."""

    image: Image.Image
    orientation: Literal["none", "applied", "ignored"]


def check_exif(rule: str) -> Exif:
    """The rule itself. Raises InputError for one that is none."""
    if rule not in get_args(Exif):
        raise unknown_name("exif", rule, get_args(Exif))
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
        with open_regular(path) as file, Image.open(content := _bytes_of_jpeg(file)) as stored:
            _check_kind(path, stored)
            orientation = _orientation(stored)
            applied = orientation in TURNS and _applies(exif, orientation, stored.size, stated_size)
            image = _pixels(content, stored)
    except PhotoError:
        raise
    except Exception as error:  # PIL's decoders pass on whatever broken bytes trip them into
        raise PhotoError(f"{path}: {_reason(error)}") from None
    if applied:
        image = image.transpose(TURNS[orientation])
    if stated_size is not None and (image.height, image.width) != tuple(stated_size):
        raise PhotoError(
            f"{path}: is {image.width} x {image.height} pixels (width x height), its annotation states "
            f"{stated_size[1]} x {stated_size[0]}; boxes would not fit: is this another copy of the photos?"
        )
    return Photo(image, "applied" if applied else "ignored" if orientation in TURNS else "none")


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file, open for reading.

    Raises OSError, also for what is empty or no file: a pipe would be waited for until somebody writes into it.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is a named pipe or a device, not a file")
        if not file.peek(1):
            raise _EmptyFileError
        yield file


def _bytes_of_jpeg(file: BinaryIO) -> BinaryIO:
    """A JPEG as all its bytes, any other file as it is."""
    magic = file.read(len(MAGIC))
    file.seek(0)
    return BytesIO(file.read()) if magic == MAGIC and os.fstat(file.fileno()).st_size <= JPEG_BYTES else file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag, nor pipes among its files


class _EmptyFileError(OSError):
    """The file has no bytes."""


def _check_kind(path: Path, stored: Image.Image) -> None:
    """Refuse, by its header alone, what may not be decoded."""
    if stored.format in DRAWINGS:
        raise PhotoError(f"{path}: is a drawing ({stored.format}), not a picture of pixels")
    if stored.width * stored.height > MAX_PIXELS:
        raise PhotoError(f"{path}: {_too_large()}")


def _pixels(content: BinaryIO, stored: Image.Image) -> Image.Image:
    """The picture as RGB, of several frames the first."""
    if stored.format == "JPEG" and isinstance(content, BytesIO):
        pixels = decode_jpeg(content.getvalue())
        # Pillow's header is the one that everything else believes.
        if pixels is not None and pixels.shape == (stored.height, stored.width, 3):
            return Image.fromarray(pixels)
    return to_rgb(stored)


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


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, _EmptyFileError):
        return "is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture in a format that is known"
    if isinstance(error, Image.DecompressionBombError):
        return _too_large()
    if isinstance(error, MemoryError):
        return "does not fit into the memory that is left"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"is broken or cut off ({' '.join(str(error).split()) or type(error).__name__})"


def _too_large() -> str:
    return f"has too many pixels for a photo (more than {MAX_PIXELS:,})"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of PIL as 8-bit RGB; transparency is dropped, 16-bit grey keeps its upper 8 bits.

    What is RGB already comes back itself, decoded.
    """
    image.load()
    if image.mode == "RGB":
        return image  # `convert` would copy it
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        # PIL would clip 16-bit values to 255, a white picture; a 32-bit one may hold 8-bit values all the same.
        image = Image.fromarray((grey >> 8 if grey.max(initial=0) > 255 else grey).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
