"""Decode JPEG files with simplejpeg, twice as fast as Pillow and with exactly Pillow's pixels.

Pillow passes a file to libjpeg in pieces and copies every row twice. simplejpeg decodes directly into an array and
releases the GIL. Each of them bundles its own libjpeg-turbo, and Pillow may be built with another library. So before
the first image of a process both decode the same samples, one of every kind that simplejpeg is used for; if one pixel
differs, Pillow decodes everything. Features therefore never depend on the decoder.

Only simplejpeg is used to check whether a file is complete: Pillow refuses a file without an end marker, and fills
missing rows if any bytes follow the cut.
"""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)

MAGIC = b"\xff\xd8\xff"  # start of image, and the first byte of the next marker
END = b"\xff\xd9"  # end of image
# simplejpeg's names. Pillow decodes CMYK and YCCK: simplejpeg converts them to RGB in another way.
COLOUR_SPACES = ("YCbCr", "RGB", "Gray")
# The array and Pillow's copy of it (four bytes per pixel) are in memory together: 230 MB for the largest image.
MAX_PIXELS = 2**25
COEFFICIENTS = 64  # of a block of 8 x 8 pixels


def decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """uint8 (h, w, 3), equal to Pillow's convert("RGB"); None if Pillow has to decode the file.

    Pillow decodes damaged and truncated files, and images of MAX_PIXELS or more.
    """
    return _decode(data) if matches_pillow() else None


def with_end_marker(data: bytes) -> bytes:
    """`data` itself, or with the missing end marker added.

    Zeros after the pixels are removed: a program may reserve a file's space before it writes the file.

    Raises OSError if pixels are missing as well; Pillow would decode them from the bytes after the cut.
    """
    if data.endswith(END) or _scans(data)[1]:
        return data
    complete = data.rstrip(b"\0") + END
    if _first_warning(complete) is not None or not _scans(complete)[0]:
        raise OSError("its pixels end early")
    return complete


def rows_are_missing(data: bytes, last_row: NDArray[np.uint8]) -> bool:
    """Whether the pixels end early although Pillow decoded an image. `last_row`: (w, 3).

    libjpeg fills missing rows with grey and only warns. Damage elsewhere in a file leaves the last row intact.
    """
    uniform = bool((last_row == last_row[0]).all())
    return uniform and "premature end" in (_first_warning(data) or "")


@lru_cache(maxsize=1)
def matches_pillow() -> bool:
    """Whether simplejpeg and Pillow agree in every pixel of all samples. Computed once per process, in about 5 ms."""
    for sample in _samples():
        pixels = _decode(sample)
        with Image.open(io.BytesIO(sample)) as stored:
            expected = np.asarray(stored.convert("RGB"))
        if pixels is None or not np.array_equal(pixels, expected):
            log.info("simplejpeg and this Pillow decode different pixels; Pillow decodes every JPEG, which is slower")
            return False
    return True


def _decode(data: bytes) -> NDArray[np.uint8] | None:
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        if colour_space not in COLOUR_SPACES or height * width >= MAX_PIXELS:
            return None
        # The exact, slower DCT and chroma upsampling, which Pillow uses too.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None
    return pixels


def _first_warning(data: bytes) -> str | None:
    """libjpeg-turbo's first warning or error while decoding; None for an intact file."""
    try:
        colour_space = simplejpeg.decode_jpeg_header(data)[2]
        output = "RGB" if colour_space in COLOUR_SPACES else "CMYK"
        # Reads all data, but computes only an eighth of the width and height.
        simplejpeg.decode_jpeg(data, output, min_factor=8, strict=True)
    except ValueError as error:
        return str(error)
    return None


def _scans(data: bytes) -> tuple[bool, bool]:
    """Whether the scans contain every bit of every coefficient, and whether an end marker follows them.

    A progressive file that was cut between two scans would be a valid but blurred JPEG with an end marker. Markers and
    headers: ITU-T T.81, B.1.1 and B.2; progressive scans: G.1.1.
    """
    components, exact = 0, defaultdict[int, set[int]](set)
    start = 2
    while (start := data.find(b"\xff", start)) >= 0 and data[start : start + 2] not in (END, b"\xff"):
        marker = data[start + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7:  # stuffing, fill bytes and restarts have no length
            start += 1 if marker == 0xFF else 2
            continue
        segment = data[start + 4 : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(segment) > 5:  # a frame header
            components = segment[5]
        if marker == 0xDA and len(segment) > 5:  # a scan: components, first and last coefficient, their bits
            *_, first, last, bits = segment
            if bits & 0x0F == 0:
                for component in segment[1 : 1 + 2 * segment[0] : 2]:
                    exact[component].update(range(first, last + 1))
        start += 4 + len(segment)
    complete = len(exact) == components and all(len(coefficients) == COEFFICIENTS for coefficients in exact.values())
    return complete, data[start : start + 2] == END if start >= 0 else False


def _samples() -> list[bytes]:
    """Colour with each of Pillow's chroma samplings, and grey; each baseline and progressive, with odd sides."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    colour = Image.fromarray(noise).resize((67, 45), Image.Resampling.BILINEAR)
    samples = []
    for image, subsampling in [(colour, 0), (colour, 1), (colour, 2), (colour.convert("L"), 0)]:
        for progressive in (False, True):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
            samples.append(file.getvalue())
    return samples
