"""What a file is by its content, whatever its name says, and its header as Pillow reads it.

Three formats need a plugin, which is imported when the first such file is met. Of a PNG, Pillow is shown only what
matters here: it unpacks every text and colour profile before the first pixel, and gives up on the whole image where
one of them is large or damaged.
"""

from __future__ import annotations

import importlib
import os
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

HEAD_BYTES = 64  # of a file, enough to tell what it is
MAX_BYTES = 2**28  # a longer file is not read into memory at once
PNG = b"\x89PNG\r\n\x1a\n"
# The texts of a PNG in which Pillow looks for an orientation.
ORIENTING = (b"XML:com.adobe.xmp", b"Raw profile type exif")
MAX_TEXT = 2**20  # bytes; Pillow refuses a compressed text that unpacks to more (PngImagePlugin.MAX_TEXT_CHUNK)


@dataclass(frozen=True)
class Plugin:
    """A format that Pillow reads with the help of another package.

    name     the format, for people
    format   Pillow's name of it
    module   registers itself with Pillow when it is imported
    package  holds the module
    """

    name: str
    format: str
    module: str
    package: str


HEIC = Plugin("HEIC", "HEIF", "pillow_heif.HeifImagePlugin", "pillow-heif")
AVIF = Plugin("AVIF", "AVIF", "pillow_avif", "pillow-avif-plugin")  # Pillow reads it alone since 11.3
JPEG_XL = Plugin("JPEG XL", "JXL", "pillow_jxl", "pillow-jxl-plugin")
# Major brands of files made of boxes (ISO/IEC 23008-12, annex B; AV1 Image File Format, section 8).
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"), HEIC),
}
JPEG_XL_MAGIC = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")

IMAGES = {b"\xff\xd8\xff": "JPEG", PNG: "PNG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"GIF8": "GIF", b"BM": "BMP"}
# What lies among images under an image's name, by its first bytes.
OTHERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the image itself; fetch it with `git lfs pull`",
    b"<svg": "is a drawing (SVG), not an image of pixels",
    b"<": "is HTML or XML, not an image; it may be a server's error message saved under the image's name",
    b"{": "is JSON, not an image; it may be a server's error message saved under the image's name",
    b"%PDF": "is a PDF document, not an image",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"PK\3\4": "is a ZIP archive; unpack it first",
}


class NotAnImageError(ValueError):
    """The file is no image that can be read; the message says what it is instead, and what to do."""


def read_header(file: BinaryIO) -> Image.Image:
    """The image in `file`, of which Pillow has read the header only: size, mode and, for most formats, EXIF.

    Raises NotAnImageError for a file in no format that Pillow knows, and whatever trips Pillow over a broken one.
    """
    head = file.read(HEAD_BYTES)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if head.startswith(PNG) and size <= MAX_BYTES:
        file = BytesIO(_what_matters_of_png(file.read()))
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        plugin = _plugin(head)
    if plugin:
        if plugin.format not in Image.OPEN:
            try:
                importlib.import_module(plugin.module)
            except ImportError:
                raise NotAnImageError(
                    f"is in {plugin.name} format; to read it, `pip install {plugin.package}`"
                ) from None
        file.seek(0)
        with suppress(UnidentifiedImageError):  # another thread may have imported it just now, so try again anyway
            return Image.open(file)
    raise NotAnImageError(_what_it_is(head, plugin))


def _plugin(head: bytes) -> Plugin | None:
    if head.startswith(JPEG_XL_MAGIC):
        return JPEG_XL
    return BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None


def _what_it_is(head: bytes, plugin: Plugin | None) -> str:
    """Of a file that Pillow does not open."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark and white space
    name = plugin.name if plugin else next((name for magic, name in IMAGES.items() if start.startswith(magic)), None)
    if name:
        return f"is in {name} format but cannot be read; it is cut off, damaged, or of a kind that Pillow does not know"
    return next(
        (what for magic, what in OTHERS.items() if start.startswith(magic)), "is not an image in a known format"
    )


def _what_matters_of_png(png: bytes) -> bytes:
    """The PNG's chunks that pixels or orientation depend on; all others, and damaged ones of these, are left out."""
    view, kept, at = memoryview(png), [memoryview(PNG)], len(PNG)
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8].ljust(8, b"\0"))
        if not kind.isalpha():  # no chunk begins here: what is wrong is for Pillow to say
            kept.append(view[at:])
            break
        end = at + 12 + length  # length, kind and checksum take four bytes each
        if kind[:1].isupper() or (_may_orient(kind, png[at + 8 : end - 4]) and _is_intact(view[at + 4 : end])):
            kept.append(view[at:end])
        at = end
    return b"".join(kept)


def _is_intact(chunk: memoryview) -> bool:
    """Whether a chunk, from its kind on, ends in its checksum."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")


def _may_orient(kind: bytes, body: bytes) -> bool:
    """Whether a chunk may state an orientation in a form that Pillow reads."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return kind == b"eXIf"
    keyword, _, text = body.partition(b"\0")
    if keyword not in ORIENTING:
        return False
    if kind == b"zTXt":  # the method's number lies before the text
        packed = text[1:]
    elif kind == b"iTXt" and text[:1] == b"\1":  # a flag, the method's number, a language and a translated keyword
        packed = text[2:].split(b"\0", 2)[-1]
    else:
        return True
    inflater = zlib.decompressobj()
    try:
        inflater.decompress(packed, MAX_TEXT)
    except zlib.error:
        return False
    return not inflater.unconsumed_tail
