"""Identify an image file by its content, not its name, and read its header with Pillow.

HEIC, AVIF and JPEG XL need a Pillow plugin, which is imported for the first such file. Of a PNG, Pillow gets only the
chunks used here: it would decompress every text and colour profile before the pixels, and refuse the whole image if
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

HEAD_BYTES = 64  # enough to identify a file
MAX_BYTES = 2**28  # a larger file is not read into memory at once
PNG = b"\x89PNG\r\n\x1a\n"
# Keywords of the PNG texts in which Pillow looks for an orientation.
ORIENTATION_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
MAX_TEXT = 2**20  # bytes; Pillow refuses a compressed text that is larger (PngImagePlugin.MAX_TEXT_CHUNK)


@dataclass(frozen=True)
class Plugin:
    """A format that Pillow reads only with another package.

    name     of the format, for messages
    format   Pillow's name for it
    module   registers the format with Pillow on import
    package  on PyPI, contains the module
    """

    name: str
    format: str
    module: str
    package: str


HEIC = Plugin("HEIC", "HEIF", "pillow_heif.HeifImagePlugin", "pillow-heif")
AVIF = Plugin("AVIF", "AVIF", "pillow_avif", "pillow-avif-plugin")  # Pillow 11.3 and later need no plugin
JPEG_XL = Plugin("JPEG XL", "JXL", "pillow_jxl", "pillow-jxl-plugin")
# Major brands of files made of boxes (ISO/IEC 23008-12, annex B; AV1 Image File Format, section 8).
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"), HEIC),
}
JPEG_XL_MAGIC = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")

IMAGES = {b"\xff\xd8\xff": "JPEG", PNG: "PNG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"GIF8": "GIF", b"BM": "BMP"}
# Other files that are found under an image's name, by their first bytes.
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
    """The file is not a readable image; the message says what it is instead, and what to do."""


def read_header(file: BinaryIO) -> Image.Image:
    """Open an image, reading only its header: size, mode and, for most formats, EXIF.

    Raises NotAnImageError for a format that Pillow does not know, and any exception of Pillow for a damaged file.
    """
    head = file.read(HEAD_BYTES)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if head.startswith(PNG) and size <= MAX_BYTES:
        file = BytesIO(_without_unused_chunks(file.read()))
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
        with suppress(UnidentifiedImageError):  # try again even if the plugin was known: another thread may import it
            return Image.open(file)
    raise NotAnImageError(_why_unreadable(head, plugin))


def _plugin(head: bytes) -> Plugin | None:
    if head.startswith(JPEG_XL_MAGIC):
        return JPEG_XL
    return BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None


def _why_unreadable(head: bytes, plugin: Plugin | None) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark and white space
    name = plugin.name if plugin else next((name for magic, name in IMAGES.items() if start.startswith(magic)), None)
    if name:
        return f"is in {name} format but cannot be read; it is cut off, damaged, or of a kind that Pillow does not know"
    return next(
        (reason for magic, reason in OTHERS.items() if start.startswith(magic)), "is not an image in a known format"
    )


def _without_unused_chunks(png: bytes) -> bytes:
    """The PNG with its critical chunks and the intact chunks that may hold an orientation."""
    view, kept, start = memoryview(png), [memoryview(PNG)], len(PNG)
    while start < len(png):
        length, kind = struct.unpack(">I4s", png[start : start + 8].ljust(8, b"\0"))
        if not kind.isalpha():  # not a chunk; Pillow reports the error
            kept.append(view[start:])
            break
        end = start + 12 + length  # length, kind and checksum take four bytes each
        # An upper case letter marks a critical chunk.
        if kind[:1].isupper() or (_may_orient(kind, png[start + 8 : end - 4]) and _is_intact(view[start + 4 : end])):
            kept.append(view[start:end])
        start = end
    return b"".join(kept)


def _is_intact(chunk: memoryview) -> bool:
    """Whether the checksum of a chunk, given from its kind on, is right."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")


def _may_orient(kind: bytes, body: bytes) -> bool:
    """Whether Pillow may read an orientation from a chunk."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return kind == b"eXIf"
    keyword, _, text = body.partition(b"\0")
    if keyword not in ORIENTATION_KEYWORDS:
        return False
    if kind == b"zTXt":  # compression method, text
        compressed = text[1:]
    elif kind == b"iTXt" and text[:1] == b"\1":  # compression flag and method, language, translated keyword, text
        compressed = text[2:].split(b"\0", 2)[-1]
    else:
        return True
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(compressed, MAX_TEXT)
    except zlib.error:
        return False
    return not decompressor.unconsumed_tail
