"""JPEG files to pixels by libjpeg-turbo's own interface, where that gives exactly Pillow's pixels in half the time.

Pillow hands a file's bytes to libjpeg in pieces and moves every row twice. simplejpeg decodes straight into an array
and releases the GIL. The two carry their own copies of libjpeg-turbo, and a Pillow may have been built with another
library altogether; so before the first image of a process they are compared on samples of every kind that is left to
simplejpeg, and where one pixel differs, Pillow decodes everything. The features never depend on which one it was.

Whether a file holds all its pixels is asked of simplejpeg alone, because Pillow cannot tell: it refuses a file that
lacks nothing but its end marker, and makes up missing rows where anything at all follows the cut.
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

MAGIC = b"\xff\xd8\xff"  # start of image, and the first byte of the marker behind it
END = b"\xff\xd9"  # end of image
# simplejpeg's names. CMYK and YCCK are left to Pillow: simplejpeg cannot make RGB of them as Pillow does.
COLOUR_SPACES = ("YCbCr", "RGB", "Gray")
# The array and Pillow's copy of it (four bytes a pixel) are held at once: 230 MB for the largest.
MAX_PIXELS = 2**25
COEFFICIENTS = 64  # of a block of 8 x 8 pixels


def decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """uint8 (h, w, 3), as Pillow's convert("RGB"); None for what Pillow has to decode, or to say what is wrong with.

    A file that is cut off or damaged in the least is left to Pillow, and so is one of MAX_PIXELS or more.
    """
    return _decoded(data) if gives_pillows_pixels() else None


def ended(data: bytes) -> bytes:
    """`data` up to an end marker, which is added where it is all that is missing.

    Zeros behind the pixels, as in a file whose space was reserved before it was written, are dropped.

    Raises OSError where pixels are missing, too. Pillow would read them from whatever lies behind the cut.
    """
    if data.endswith(END) or _scans(data)[1]:
        return data
    whole = data.rstrip(b"\0") + END
    if _complaint(whole) is not None or not _scans(whole)[0]:
        raise OSError("its pixels end early")
    return whole


def lacks_rows(data: bytes, last_row: NDArray[np.uint8]) -> bool:
    """Whether the pixels end early, although Pillow decoded an image that ends in `last_row`, (w, 3).

    libjpeg fills what is missing with grey and only warns; a file with damage elsewhere has a last row of its own.
    """
    flat = bool((last_row == last_row[0]).all())
    return flat and "premature end" in (_complaint(data) or "")


@lru_cache(maxsize=1)
def gives_pillows_pixels() -> bool:
    """Whether simplejpeg and Pillow agree in every pixel of every sample. Computed once a process, in some 5 ms."""
    for sample in _samples():
        pixels = _decoded(sample)
        with Image.open(io.BytesIO(sample)) as stored:
            expected = np.asarray(stored.convert("RGB"))
        if pixels is None or not np.array_equal(pixels, expected):
            log.info("simplejpeg does not give this Pillow's pixels, so Pillow decodes every JPEG, more slowly")
            return False
    return True


def _decoded(data: bytes) -> NDArray[np.uint8] | None:
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        if colour_space not in COLOUR_SPACES or height * width >= MAX_PIXELS:
            return None
        # The slow, exact forms of the transform and of chroma upsampling, which are Pillow's too.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None
    return pixels


def _complaint(data: bytes) -> str | None:
    """The first thing libjpeg-turbo warns of or fails on while decoding; None for a file without a flaw."""
    try:
        colour_space = simplejpeg.decode_jpeg_header(data)[2]
        output = "RGB" if colour_space in COLOUR_SPACES else "CMYK"
        # All of the data are read, but an eighth of the width and height is computed.
        simplejpeg.decode_jpeg(data, output, min_factor=8, strict=True)
    except ValueError as error:
        return str(error)
    return None


def _scans(data: bytes) -> tuple[bool, bool]:
    """Whether the scans state every coefficient to its last bit, and whether an end marker follows them.

    A progressive file that was cut between two scans is a valid, blurred JPEG once it has an end marker. Markers and
    headers: ITU-T T.81, B.1.1 and B.2; progressive scans: G.1.1.
    """
    components, exact = 0, defaultdict[int, set[int]](set)
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and data[at : at + 2] not in (END, b"\xff"):
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7:  # stuffing, fill bytes and restarts have no length
            at += 1 if marker == 0xFF else 2
            continue
        segment = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(segment) > 5:  # a frame header
            components = segment[5]
        if marker == 0xDA and len(segment) > 5:  # a scan: components, first and last coefficient, which of their bits
            *_, first, last, bits = segment
            if bits & 0x0F == 0:
                for component in segment[1 : 1 + 2 * segment[0] : 2]:
                    exact[component].update(range(first, last + 1))
        at += 4 + len(segment)
    every = len(exact) == components and all(len(stated) == COEFFICIENTS for stated in exact.values())
    return every, data[at : at + 2] == END if at >= 0 else False


def _samples() -> list[bytes]:
    """Colour in each of Pillow's chroma samplings, and grey; each baseline and progressive, with odd sides."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    colour = Image.fromarray(noise).resize((67, 45), Image.Resampling.BILINEAR)
    samples = []
    for image, subsampling in [(colour, 0), (colour, 1), (colour, 2), (colour.convert("L"), 0)]:
        for progressive in (False, True):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
            samples.append(file.getvalue())
    return samples
