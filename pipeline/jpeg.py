"""JPEG files to pixels by libjpeg-turbo's own interface, where that gives Pillow's very pixels in half the time.

Pillow hands a file's bytes to libjpeg in pieces and moves every row twice. simplejpeg decodes straight into an array,
without holding the interpreter. The two carry their own copies of libjpeg-turbo, and a Pillow may have been built
with another library altogether; so before the first picture they are compared on samples of every kind that is left
to simplejpeg, and where one pixel differs, Pillow decodes everything. What a cache holds never depends on which it was.
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)

MAGIC = b"\xff\xd8\xff"  # start of image, and the first byte of the marker behind it
# What simplejpeg calls them; the rest is Pillow's: CMYK and YCCK, of which it cannot make RGB as Pillow does.
COLOUR_SPACES = ("YCbCr", "RGB", "Gray")
# The array and Pillow's copy of it (four bytes a pixel) are held at once: 230 MB for the largest.
MAX_PIXELS = 2**25


def decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """uint8 (h, w, 3), as Pillow's convert("RGB"); None for what Pillow has to decode, or to say what is wrong with.

    A file that is cut off or damaged in the least is left to Pillow, and so is one of MAX_PIXELS or more.
    """
    return _decoded(data) if gives_pillows_pixels() else None


@lru_cache(maxsize=1)
def gives_pillows_pixels() -> bool:
    """Whether simplejpeg and Pillow agree in every pixel of every sample. Asked once a process; takes some 5 ms."""
    for sample in _samples():
        found = _decoded(sample)
        with Image.open(io.BytesIO(sample)) as stored:
            expected = np.asarray(stored.convert("RGB"))
        if found is None or not np.array_equal(found, expected):
            log.info(
                "simplejpeg does not give the pixels of this Pillow, which decodes all JPEGs by itself, but slower"
            )
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


def _samples() -> list[bytes]:
    """Colour in each of Pillow's chroma samplings, and grey; each baseline and progressive, with odd sides."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    colour = Image.fromarray(noise).resize((67, 45), Image.Resampling.BILINEAR)
    samples = []
    for picture, subsampling in [(colour, 0), (colour, 1), (colour, 2), (colour.convert("L"), 0)]:
        for progressive in (False, True):
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
            samples.append(file.getvalue())
    return samples
