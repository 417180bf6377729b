"""Decode one image file to 8-bit RGB, in the orientation of its annotated boxes.

Every file is either decoded as docs/images.md says or refused with a one-line ImageError. Decoding never blocks, runs
no other program and allocates no more memory than the image header announces.

A camera may store an image rotated and record that in EXIF. Some datasets annotate the stored pixels, others the
rotated image. The image size in the annotation tells which one; in the wrong orientation all boxes are wrong.
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
from regionspot.pipeline.images.bit_depth import UnscalableError, is_deep, loses_low_bits, stretch_if_dark, to_grey
from regionspot.pipeline.images.image_header import MAX_BYTES, NotAnImageError, read_header
from regionspot.pipeline.images.jpeg import MAGIC, decode_jpeg, rows_are_missing, with_end_marker

Exif = Literal["auto", "apply", "ignore"]
ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image  # a path, a file's content, or a Pillow image

# Transform from the stored to the upright image, by EXIF orientation (EXIF 2.32, tag 0x0112; 1 is upright as stored).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INVERSE_TURNS = {**TURNS, 6: TURNS[8], 8: TURNS[6]}  # the others are their own inverses
QUARTER_TURNS = (5, 6, 7, 8)  # these swap height and width
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# TIFF 6.0, sections 5 and 8.
NEW_SUBFILE_TYPE, IMAGE_WIDTH, IMAGE_LENGTH, COLOR_MAP = 254, 256, 257, 320
# Pillow's own limit at its default MAX_IMAGE_PIXELS. An image of this size takes 0.9 GB.
MAX_PIXELS = 178_956_970
VECTOR_FORMATS = ("EPS", "WMF")  # Pillow runs other programs to render these

# Silences Pillow's warnings about damaged metadata, which is not used here, and about images larger than half of
# MAX_PIXELS. Set for the whole process, because warnings.catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class OrientedImage:
    """A decoded 8-bit RGB image. `orientation`: what was done with its EXIF orientation; "none" if it has none."""

    image: Image.Image
    orientation: Literal["none", "applied", "ignored"]


def parse_exif(rule: str) -> Exif:
    """The EXIF rule of that name. Raises InputError for an unknown one."""
    if rule not in get_args(Exif):
        raise unknown_name("exif", rule, get_args(Exif))
    return cast("Exif", rule)


def stored_exif(provenances: Iterable[Mapping[str, Any]]) -> Exif:
    """The EXIF rule in the provenance of these feature sets; "auto" if none of them has one."""
    return parse_exif(next((provenance["exif"] for provenance in provenances if "exif" in provenance), "auto"))


def read_image(source: ImageSource, stated_size: tuple[int, int] | None = None, exif: Exif = "auto") -> Image.Image:
    """Read an image as RGB; transparency is dropped.

    stated_size  (height, width) in the image's annotation
    exif         whether to apply the orientation in EXIF or XMP. "auto": only if the image has `stated_size` after the
                 rotation but not before it

    Raises ImageError if the image does not exist, is damaged, is too large, or does not have `stated_size`.
    """
    return decode_image(source, stated_size, exif).image


def decode_image(source: ImageSource, stated_size: tuple[int, int] | None = None, exif: Exif = "auto") -> OrientedImage:
    """Like `read_image`, but also reports what was done with the orientation."""
    name = _name(source)
    try:
        with _open(source) as (stored, jpeg):
            _check_supported(stored)
            deep_colour = loses_low_bits(stored)
            orientation = _orientation(stored)  # this loads the pixels of a PNG
            turns = orientation in TURNS
            applied = turns and _applies(exif, orientation, stored_size(stored), stated_size)
            image = _jpeg_pixels(stored, jpeg, name) if jpeg else to_rgb(stored, name, deep_colour)
            # Pillow applies the orientation of a TIFF while it loads the pixels, and then removes the tag.
            loaded_upright = turns and _orientation(stored) not in TURNS
    except Exception as error:  # Pillow's decoders raise any exception on damaged files
        raise ImageError(f"{name}: {_reason(error)}") from None
    if applied != loaded_upright:
        image = image.transpose((TURNS if applied else INVERSE_TURNS)[orientation])
    if turns:  # remove the orientation, so that nobody applies it again
        image = image.copy() if image is stored else image
        image.info = {}
    if stated_size is not None and (image.height, image.width) != tuple(stated_size):
        raise ImageError(
            f"{name}: is {image.width} x {image.height} pixels (width x height), its annotation states "
            f"{stated_size[1]} x {stated_size[0]}; boxes would not fit: is this another copy of the images?"
        )
    return OrientedImage(image, "applied" if applied else "ignored" if turns else "none")


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as stored. The image need not be loaded.

    `image.size` of a rotated TIFF is the size before rotation up to Pillow 10, and after rotation since Pillow 11.
    """
    tags = getattr(image, "tag_v2", {})
    return (tags[IMAGE_WIDTH], tags[IMAGE_LENGTH]) if IMAGE_WIDTH in tags else image.size


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Raises OSError for an empty file and for anything else than a regular file: reading from a pipe would block.
    """
    with open(path, "rb", opener=_open_nonblocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a named pipe or a device, not a file")
        if not file.peek(1):
            raise _EmptyFileError
        yield file


def _name(source: ImageSource) -> str:
    if isinstance(source, Image.Image):
        return "the image"
    return f"the image of {len(source):,} bytes" if isinstance(source, bytes) else str(Path(source))


@contextmanager
def _open(source: ImageSource) -> Iterator[tuple[Image.Image, bytes | None]]:
    """The image with its header read; for a JPEG also the file's content."""
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


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither this flag nor named pipes


class _EmptyFileError(OSError):
    """The file has no bytes."""


def _check_supported(stored: Image.Image) -> None:
    """Refuse files that must not be decoded, by the header only."""
    if stored.format in VECTOR_FORMATS:
        raise NotAnImageError(f"is a drawing ({stored.format}), not an image of pixels")
    if stored.width * stored.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if getattr(stored, "tag_v2", {}).get(NEW_SUBFILE_TYPE, 0) & 1:
        raise NotAnImageError(
            f"has a thumbnail of {stored.width} x {stored.height} pixels for its first page, as a camera's raw file; "
            "convert the whole image to JPEG or PNG"
        )


def _jpeg_pixels(stored: Image.Image, data: bytes, name: str) -> Image.Image:
    """The first image of a JPEG file as RGB, by the fastest decoder with Pillow's pixels.

    The end marker may be missing, but no pixels.
    """
    pixels = decode_jpeg(data)
    # All other code uses the size in Pillow's header.
    if pixels is not None and pixels.shape == (stored.height, stored.width, 3):
        return Image.fromarray(pixels)
    complete = with_end_marker(data)
    if complete is not data:
        with Image.open(BytesIO(complete)) as reopened:
            return _jpeg_pixels(reopened, complete, name)
    image = to_rgb(stored, name)
    last_row = np.asarray(image.crop((0, image.height - 1, image.width, image.height)))[0]
    if rows_are_missing(data, last_row):
        raise OSError("its last rows are missing")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        stated = image.getexif().get(ExifTags.Base.Orientation)
        if stated is None:  # Pillow before 11.3 reads XMP from PNG only
            xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
            match = XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
            stated = match[1] if match else 1
        return int(stated)
    except Exception:  # Pillow raises any exception on a damaged EXIF block; the pixels may be intact
        return 1


def _applies(exif: Exif, orientation: int, size: tuple[int, int], stated_size: tuple[int, int] | None) -> bool:
    """Whether to apply the orientation to an image stored as `size`, (width, height)."""
    if exif != "auto" or stated_size is None:
        return exif == "apply"
    height, width = stated_size
    return orientation in QUARTER_TURNS and size != (width, height) and size == (height, width)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, _EmptyFileError):
        return "is empty (0 bytes)"
    if isinstance(error, NotAnImageError | UnscalableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "is not an image in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"has too many pixels for an image (more than {MAX_PIXELS:,})"
    if isinstance(error, MemoryError):
        return "does not fit into the free memory"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"is broken or cut off ({' '.join(str(error).split()) or type(error).__name__})"


def to_rgb(image: Image.Image, name: str, deep_colour: bool = False) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB; transparency is dropped. An RGB image is returned itself, loaded.

    name         of the image, for warnings
    deep_colour  `loses_low_bits(image)` before it was loaded

    Raises UnscalableError for values that 8 bits cannot show.
    """
    image.load()
    if is_deep(image):
        image = to_grey(image, name)
    elif image.mode == "P" and (values := getattr(image, "tag_v2", {}).get(COLOR_MAP)) and max(values) < 256:
        # The palette was written with 8 bits per value instead of 16; Pillow takes the upper 8, all black.
        image = image.copy()
        image.putpalette(np.reshape(values, (3, -1)).T.astype(np.uint8).tobytes())
    elif image.mode in ("La", "RGBa"):  # premultiplied alpha; only these conversions divide by it
        image = image.convert(image.mode.upper())
    if image.mode != "RGB":  # `convert` would copy an RGB image
        image = image.convert("RGB")
    return stretch_if_dark(image, name) if deep_colour else image
