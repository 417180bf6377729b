"""Reading one image: any format and mode to RGB of 8 bits, in the orientation that its boxes were drawn in.

A folder of millions of images holds everything that was ever given an image's name. Each file is either read as
docs/images.md says or refused in one line: nothing here blocks, runs another program or takes memory that the
header did not announce.

A camera may store an image sideways and say so in EXIF. Some datasets annotate the stored pixels, others what a
viewer shows; the size in the annotation tells which, and boxes on the other one would be silently wrong.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast, get_args

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from regionspot.cache.errors import ImageError, unknown_name
from regionspot.pipeline.images.image_kinds import MAX_BYTES, NotAnImageError, read_header
from regionspot.pipeline.images.jpeg import MAGIC, decode_jpeg, ended, lacks_rows
from regionspot.pipeline.images.pixel_depth import UnscalableError, grey_of, is_deep, loses_low_bits, rgb_of_upper_bits

Exif = Literal["auto", "apply", "ignore"]
Source: TypeAlias = str | os.PathLike[str] | bytes | Image.Image  # a file, its content, or what Pillow opened

# What makes a stored image upright, by its orientation (EXIF 2.32, tag 0x0112; 1 is upright as stored).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNS_BACK = {**TURNS, 6: TURNS[8], 8: TURNS[6]}  # the others are their own inverses
QUARTER_TURNS = (5, 6, 7, 8)  # these swap height and width
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# TIFF 6.0, sections 5 and 8.
NEW_SUBFILE_TYPE, IMAGE_WIDTH, IMAGE_LENGTH, COLOR_MAP = 254, 256, 257, 320
# Where Pillow itself refuses, too, as long as nobody changes its MAX_IMAGE_PIXELS. Such an image takes 0.9 GB.
MAX_PIXELS = 178_956_970
DRAWINGS = ("EPS", "WMF")  # Pillow would have other programs draw these

# Of damaged metadata, on which nothing here depends, and of images larger than half of MAX_PIXELS; each takes two lines
# on the terminal. Set for the whole process, because the filters of a block of code are shared between threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class OrientedImage:
    """A decoded image: RGB, 8 bits a channel. `orientation` is what became of EXIF's, "none" where it states none."""

    image: Image.Image
    orientation: Literal["none", "applied", "ignored"]


def check_exif(rule: str) -> Exif:
    """The rule itself. Raises InputError for one that does not exist."""
    if rule not in get_args(Exif):
        raise unknown_name("exif", rule, get_args(Exif))
    return cast("Exif", rule)


def exif_of(provenances: Iterable[Mapping[str, Any]]) -> Exif:
    """The rule by which the images of these feature sets were turned; "auto" where none states it."""
    return check_exif(next((each["exif"] for each in provenances if "exif" in each), "auto"))


def read_image(source: Source, stated_size: tuple[int, int] | None = None, exif: Exif = "auto") -> Image.Image:
    """The image as RGB; transparency is dropped.

    source       a path, a file's content, or an image that Pillow opened or made
    stated_size  (height, width) of the original as its annotation gives it
    exif         whether to apply the orientation that EXIF or XMP states. "auto": exactly when that makes the image
                 of `stated_size`, so not where no size is stated

    Raises ImageError when it is absent, broken, too large to be an image, or of another size than stated.
    """
    return decode_image(source, stated_size, exif).image


def decode_image(source: Source, stated_size: tuple[int, int] | None = None, exif: Exif = "auto") -> OrientedImage:
    """As `read_image`, and what became of the orientation, which the image itself no longer states."""
    name = _name(source)
    try:
        with _opened(source) as (stored, jpeg):
            _check_kind(stored)
            deep_colour = loses_low_bits(stored)
            orientation = _orientation(stored)  # of a PNG, this loads the pixels
            turns = orientation in TURNS
            applied = turns and _applies(exif, orientation, stored_size(stored), stated_size)
            image = _jpeg_pixels(stored, jpeg, name) if jpeg else to_rgb(stored, name, deep_colour)
            # Pillow applies the orientation of a TIFF while it loads the pixels, and then removes the tag.
            loaded_upright = turns and _orientation(stored) not in TURNS
    except Exception as error:  # PIL's decoders pass on whatever broken bytes trip them into
        raise ImageError(f"{name}: {_reason(error)}") from None
    if applied != loaded_upright:
        image = image.transpose((TURNS if applied else TURNS_BACK)[orientation])
    if turns:  # whoever is given this image must not find the orientation and apply it again
        image = image.copy() if image is stored else image
        image.info = {}
    if stated_size is not None and (image.height, image.width) != tuple(stated_size):
        raise ImageError(
            f"{name}: is {image.width} x {image.height} pixels (width x height), its annotation states "
            f"{stated_size[1]} x {stated_size[0]}; boxes would not fit: is this another copy of the images?"
        )
    return OrientedImage(image, "applied" if applied else "ignored" if turns else "none")


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as stored, for an image that may not be loaded yet.

    Of a TIFF that is to be turned, Pillow gives the size before turning (until 10) or after it (since 11).
    """
    tags = getattr(image, "tag_v2", {})
    return (tags[IMAGE_WIDTH], tags[IMAGE_LENGTH]) if IMAGE_WIDTH in tags else image.size


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file, open for reading.

    Raises OSError, also for an empty file and for anything that is not a regular file, such as a pipe, whose reader
    would wait until somebody writes into it.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is a named pipe or a device, not a file")
        if not file.peek(1):
            raise _EmptyFileError
        yield file


def _name(source: Source) -> str:
    if isinstance(source, Image.Image):
        return "the image"
    return f"the image of {len(source):,} bytes" if isinstance(source, bytes) else str(Path(source))


@contextmanager
def _opened(source: Source) -> Iterator[tuple[Image.Image, bytes | None]]:
    """The image with its header read, and of a JPEG its content."""
    if isinstance(source, Image.Image):
        yield source, None
        return
    with BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        magic = file.read(len(MAGIC))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        jpeg = file.read() if magic == MAGIC and size <= MAX_BYTES else None
        with read_header(BytesIO(jpeg) if jpeg else file) as stored:
            yield stored, jpeg


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag, nor pipes among its files


class _EmptyFileError(OSError):
    """The file has no bytes."""


def _check_kind(stored: Image.Image) -> None:
    """Refuse, by its header alone, what must not be decoded."""
    if stored.format in DRAWINGS:
        raise NotAnImageError(f"is a drawing ({stored.format}), not an image of pixels")
    if stored.width * stored.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if getattr(stored, "tag_v2", {}).get(NEW_SUBFILE_TYPE, 0) & 1:
        raise NotAnImageError(
            f"has a thumbnail of {stored.width} x {stored.height} pixels for its first page, as a camera's raw file; "
            "convert the whole image to JPEG or PNG"
        )


def _jpeg_pixels(stored: Image.Image, data: bytes, name: str) -> Image.Image:
    """The first image of a JPEG file as RGB, by the fastest decoder that gives Pillow's pixels.

    A file may lack its end marker, but no pixels.
    """
    pixels = decode_jpeg(data)
    # Pillow's header is the one that everything else believes.
    if pixels is not None and pixels.shape == (stored.height, stored.width, 3):
        return Image.fromarray(pixels)
    whole = ended(data)
    if whole is not data:
        with Image.open(BytesIO(whole)) as again:
            return _jpeg_pixels(again, whole, name)
    image = to_rgb(stored, name)
    last_row = np.asarray(image.crop((0, image.height - 1, image.width, image.height)))[0]
    if lacks_rows(data, last_row):
        raise OSError("its last rows are missing")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        stated = image.getexif().get(ExifTags.Base.Orientation)
        if stated is None:  # a Pillow older than 11.3 looks for XMP in PNG only
            xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
            match = XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
            stated = match[1] if match else 1
        return int(stated)
    except Exception:  # a damaged EXIF block says nothing about the pixels, and PIL raises all kinds of errors on it
        return 1


def _applies(exif: Exif, orientation: int, size: tuple[int, int], stated_size: tuple[int, int] | None) -> bool:
    """Whether to turn an image stored as `size`, which is PIL's (width, height)."""
    if exif != "auto" or stated_size is None:
        return exif == "apply"
    height, width = stated_size
    return orientation in QUARTER_TURNS and size != (width, height) and size == (height, width)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, _EmptyFileError):
        return "is empty (0 bytes)"
    if isinstance(error, NotAnImageError | UnscalableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "is not an image in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"has too many pixels for an image (more than {MAX_PIXELS:,})"
    if isinstance(error, MemoryError):
        return "does not fit into the memory that is left"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"is broken or cut off ({' '.join(str(error).split()) or type(error).__name__})"


def to_rgb(image: Image.Image, name: str, deep_colour: bool = False) -> Image.Image:
    """Any mode of PIL as 8-bit RGB; transparency is dropped. Warnings call the image `name`.

    deep_colour  `loses_low_bits` of the image before it was loaded

    What is RGB already comes back itself, decoded. Raises UnscalableError for values that 8 bits cannot show.
    """
    image.load()
    if is_deep(image):
        image = grey_of(image, name)
    elif image.mode == "P" and (values := getattr(image, "tag_v2", {}).get(COLOR_MAP)) and max(values) < 256:
        # Written with 8 bits a value instead of 16, of which Pillow takes the upper 8: all black.
        image = image.copy()
        image.putpalette(np.reshape(values, (3, -1)).T.astype(np.uint8).tobytes())
    elif image.mode in ("La", "RGBa"):  # alpha is multiplied in; only these conversions divide by it
        image = image.convert(image.mode.upper())
    if image.mode != "RGB":  # `convert` would copy it
        image = image.convert("RGB")
    return rgb_of_upper_bits(image, name) if deep_colour else image
