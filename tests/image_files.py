"""Image files for tests: encoded images, and PNG files put together chunk by chunk."""

import io
import zlib

from PIL import Image


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return len(body).to_bytes(4, "big") + kind + body + checksum.to_bytes(4, "big")


def insert_chunks(png: bytes, chunks: bytes, before: bytes = b"IDAT") -> bytes:
    start = png.index(before) - 4
    return png[:start] + chunks + png[start:]


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG of these rows, each with its filter byte; it may state another size than they have."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour_type, 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in chunks)
