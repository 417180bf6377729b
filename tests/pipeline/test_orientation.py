"""The EXIF rule holds for every image format, orientation and kind of input."""

import io
import zlib

import numpy as np
import pytest
from image_files import encode, insert_chunks, png_chunk
from PIL import Image, ImageOps, features

from regionspot.cache.errors import ImageError
from regionspot.pipeline.datasets.image_sizes import image_sizes
from regionspot.pipeline.images.decode import decode_image

ORIENTATION = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)
BLOCK = 16  # pixels of one colour, which lossy formats keep
COLOURS = np.array(
    [[[230, 30, 30], [30, 220, 40], [40, 50, 230]], [[240, 230, 40], [20, 20, 20], [240, 240, 240]]], np.uint8
)
STORED = COLOURS.repeat(BLOCK, 0).repeat(BLOCK, 1)  # all rotations and flips of it differ
HEIGHT, WIDTH = STORED.shape[:2]
# From stored to displayed pixels (EXIF 2.32, tag 0x0112). 6: row 0 is displayed at the right, column 0 at the top.
DISPLAYED = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def xmp_of(orientation: int) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def saved(format: str, **options) -> bytes:
    return encode(Image.fromarray(STORED), format, **options)


def in_exif(format: str, **options):
    return lambda orientation: saved(format, exif=exif_of(orientation), **options)


def jpeg_with_xmp(orientation: int) -> bytes:
    jpeg, body = saved("JPEG", quality=95, subsampling=0), b"http://ns.adobe.com/xap/1.0/\0" + xmp_of(orientation)
    return jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


def png_with(kind: bytes, body: bytes, before: bytes = b"IDAT") -> bytes:
    return insert_chunks(saved("PNG"), png_chunk(kind, body), before)


def png_with_xmp(orientation: int) -> bytes:
    return png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(orientation))


def png_with_compressed_xmp(orientation: int) -> bytes:
    return png_with(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp_of(orientation)))


def png_with_profile(orientation: int) -> bytes:  # as ImageMagick writes EXIF
    exif = exif_of(orientation).tobytes()
    return png_with(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n%s" % (len(exif), exif.hex().encode()))
    )


def png_with_late_exif(orientation: int) -> bytes:
    return png_with(b"eXIf", exif_of(orientation).tobytes()[6:], before=b"IEND")


def tiff_with_xmp(orientation: int) -> bytes:
    return saved("TIFF", tiffinfo={700: xmp_of(orientation)})


FORMATS = {
    "JPEG": in_exif("JPEG", quality=95, subsampling=0),
    "JPEG, progressive": in_exif("JPEG", quality=95, subsampling=0, progressive=True),
    "JPEG, no end marker": lambda orientation: FORMATS["JPEG"](orientation)[:-2],
    "JPEG, XMP": jpeg_with_xmp,
    "MPO": in_exif("MPO", quality=95, subsampling=0, save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
    "PNG": in_exif("PNG"),
    "PNG, after the pixels": png_with_late_exif,
    "PNG, XMP": png_with_xmp,
    "PNG, XMP compressed": png_with_compressed_xmp,
    "PNG, EXIF as text": png_with_profile,
    "TIFF": in_exif("TIFF"),
    "TIFF, deflate": in_exif("TIFF", compression="tiff_adobe_deflate"),
    "TIFF, LZW": in_exif("TIFF", compression="tiff_lzw"),
    "TIFF, BigTIFF": in_exif("TIFF", big_tiff=True),
    "TIFF, XMP": tiff_with_xmp,
    "TIFF, two pages": in_exif("TIFF", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
    "WebP": in_exif("WEBP", lossless=True),
}
if "AVIF" in Image.registered_extensions().values() and features.check("avif"):
    FORMATS["AVIF"] = in_exif("AVIF", quality=95, subsampling="4:4:4")
# (height, width) in the annotation, the EXIF rule, and the orientations that are applied.
RULES = [
    (None, "apply", range(2, 9)),
    (None, "ignore", ()),
    (None, "auto", ()),
    ((WIDTH, HEIGHT), "auto", QUARTER_TURNS),
    ((HEIGHT, WIDTH), "auto", ()),
    ((HEIGHT, WIDTH), "ignore", ()),
    ((WIDTH, HEIGHT), "apply", range(2, 9)),
    ((HEIGHT, WIDTH), "apply", range(2, 9)),
]


def assert_displayed(image: Image.Image, orientation: int) -> None:
    expected = DISPLAYED[orientation](STORED)
    assert (image.mode, image.height, image.width) == ("RGB", *expected.shape[:2])
    blocks = (slice(BLOCK // 2, None, BLOCK),) * 2
    assert np.abs(np.asarray(image)[blocks].astype(int) - expected[blocks]).max() < 16


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_orientation_follows_the_exif_rule(tmp_path, format, orientation):
    content = FORMATS[format](orientation)
    path = tmp_path / "image.x"
    path.write_bytes(content)
    for size, rule, applied in RULES:
        displayed = orientation if orientation in applied else 1
        fits = size in (None, DISPLAYED[displayed](STORED).shape[:2])
        for source in (path, str(path), content, Image.open(path)):
            if not fits:
                with pytest.raises(ImageError, match="boxes would not fit"):
                    decode_image(source, size, rule)
                continue
            image = decode_image(source, size, rule)
            assert_displayed(image.image, displayed)
            expected = "none" if orientation == 1 else "applied" if orientation in applied else "ignored"
            assert image.orientation == expected, (size, rule, type(source))
            assert decode_image(image.image, exif="apply").orientation == "none"


@pytest.mark.parametrize("format", FORMATS)
def test_header_sizes_are_those_of_the_stored_image(tmp_path, format):
    for orientation in DISPLAYED:
        (tmp_path / f"{orientation}.x").write_bytes(FORMATS[format](orientation))
    sizes = image_sizes(tmp_path, [f"{orientation}.x" for orientation in DISPLAYED])
    assert sizes.tolist() == [[HEIGHT, WIDTH]] * 8


@pytest.mark.parametrize("orientation", [0, 9, 65535])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WebP"])
def test_an_invalid_orientation_is_ignored(format, orientation):
    image = decode_image(FORMATS[format](orientation), exif="apply")
    assert image.orientation == "none"
    assert_displayed(image.image, 1)


def test_exif_takes_precedence_over_xmp():
    exif, xmp = exif_of(3).tobytes(), xmp_of(6)
    jpeg = saved("JPEG", quality=95, subsampling=0, exif=exif)
    body = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    both = jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]
    assert_displayed(decode_image(both, exif="apply").image, 3)


def test_an_image_that_was_rotated_in_memory_is_not_rotated_again():
    for format in ("JPEG", "TIFF", "PNG"):
        with Image.open(io.BytesIO(FORMATS[format](6))) as opened:
            upright = ImageOps.exif_transpose(opened)
        assert_displayed(decode_image(upright, exif="apply").image, 6)


def test_the_given_pillow_image_is_not_changed():
    opened = Image.open(io.BytesIO(FORMATS["JPEG"](6)))
    for rule in ("apply", "ignore"):
        decode_image(opened, exif=rule)
        assert np.asarray(opened).shape == STORED.shape
        assert opened.getexif()[ORIENTATION] == 6
