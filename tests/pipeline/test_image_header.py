"""Unreadable files are identified by their content, plugins are used if installed, and PNG texts are skipped."""

import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from image_files import encode, insert_chunks, png_chunk
from PIL import Image

from regionspot.cache.errors import ImageError
from regionspot.pipeline.images.decode import TURNS, read_image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
MEGABYTE = 2**20


def saved(format: str) -> bytes:
    return encode(NOISE, format)


def png_with(chunks: bytes, before: bytes) -> bytes:
    return insert_chunks(saved("PNG"), chunks, before)


def box(brand: bytes) -> bytes:
    return b"\0\0\0\x1cftyp" + brand + bytes(16) + b"meta" + bytes(100)


TEXTS = {
    "a profile of 3 MB": png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 * MEGABYTE))),
    "a compressed text of 3 MB": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3 * MEGABYTE)),
    "an international one": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"a" * 3 * MEGABYTE)),
    "XMP of 3 MB": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"a" * 3 * MEGABYTE)),
    "80 texts of 1 MB": b"".join(png_chunk(b"tEXt", b"%d\0" % k + b"a" * MEGABYTE) for k in range(80)),
    "a damaged text": png_chunk(b"tEXt", b"Comment\0text", checksum=1),
    "a damaged profile": png_chunk(b"iCCP", b"profile\0\0 not compressed"),
    "a profile compressed in an unknown way": png_chunk(b"iCCP", b"profile\0\7" + zlib.compress(b"a")),
    "damaged XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0 not compressed"),
    "damaged EXIF": png_chunk(b"eXIf", b"MM", checksum=1),
    "a damaged density": png_chunk(b"pHYs", bytes(9), checksum=1),
    "a gamma": png_chunk(b"gAMA", (100_000).to_bytes(4, "big")),
}


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("name", TEXTS)
def test_unused_chunks_of_a_png_are_ignored(name, before):
    assert np.array_equal(np.asarray(read_image(png_with(TEXTS[name], before))), np.asarray(NOISE))


def test_a_compression_bomb_in_a_text_is_not_decompressed():
    compressed = zlib.compress(bytes(64 * MEGABYTE))
    png = png_with(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + compressed), b"IDAT")
    tracemalloc.start()
    try:
        read_image(png)
        assert tracemalloc.get_traced_memory()[1] < 8 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_png_may_lack_its_end_chunk_or_have_bytes_after_it():
    png = saved("PNG")
    for other in (png[: png.index(b"IEND") - 4], png + b"anything", png + bytes(5000)):
        assert np.array_equal(np.asarray(read_image(other)), np.asarray(NOISE))


@pytest.mark.parametrize("kept", [20, 40, 60, 500, -200])
def test_a_png_with_missing_pixels_is_refused(kept):
    with pytest.raises(ImageError, match=r"is broken or cut off|cannot be read; it is cut off"):
        read_image(saved("PNG")[:kept])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.* `git lfs pull`"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is HTML or XML, not an image"),
        (b"\n\n<!DOCTYPE html><title>404</title>", "is HTML or XML, not an image"),
        (b'{"error": "not found"}', "is JSON, not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"is a drawing \(SVG\)"),
        (b"%PDF-1.7\n", "is a PDF document"),
        (b"\x1f\x8b\x08\0" + bytes(20), "is compressed with gzip"),
        (b"PK\3\4" + bytes(20), "is a ZIP archive"),
        (b"no image at all", "is not an image in a known format"),
        (bytes(1000), "is not an image in a known format"),
        (b"\xff\xd8\xff nothing more", "is in JPEG format but cannot be read"),
        (b"\n" + saved("JPEG"), "is in JPEG format but cannot be read"),
        (saved("PNG")[:12], "is in PNG format but cannot be read"),
        (saved("TIFF")[:60], "is in TIFF format but cannot be read"),
    ],
)
def test_an_unreadable_file_is_identified_in_the_error(tmp_path, content, reason):
    (tmp_path / "image.jpg").write_bytes(content)
    for source in (content, tmp_path / "image.jpg"):
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(source)
        assert "\n" not in str(caught.value)


PLUGINS = [
    (box(b"heic"), "HEIC", "pillow_heif", "pillow-heif"),
    (box(b"mif1"), "HEIC", "pillow_heif", "pillow-heif"),
    (b"\xff\x0a" + bytes(50), "JPEG XL", "pillow_jxl", "pillow-jxl-plugin"),
    (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL", "pillow_jxl", "pillow-jxl-plugin"),
]


@pytest.mark.parametrize(("content", "format", "module", "package"), PLUGINS)
def test_a_missing_plugin_is_named_in_the_error(monkeypatch, content, format, module, package):
    # Simulate that it is not installed, even if another test has registered it.
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.HeifImagePlugin", None)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name not in ("HEIF", "JXL")])
    monkeypatch.setattr(Image, "OPEN", {name: how for name, how in Image.OPEN.items() if name not in ("HEIF", "JXL")})
    with pytest.raises(ImageError, match=f"is in {format} format; to read it, `pip install {package}`$"):
        read_image(content)


FAKE_PLUGIN = """
import time
from PIL import Image

def opened(file, name):
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    image.format = "HEIF"
    return image

time.sleep(0.05)
Image.register_open("HEIF", opened, lambda head: head[4:12] == b"ftypheic")
"""


def test_an_installed_plugin_is_used_by_all_threads(tmp_path):
    (tmp_path / "pillow_heif").mkdir()
    (tmp_path / "pillow_heif" / "__init__.py").touch()
    (tmp_path / "pillow_heif" / "HeifImagePlugin.py").write_text(FAKE_PLUGIN)
    (tmp_path / "image.jpg").write_bytes(box(b"heic"))
    script = """
import sys
from concurrent.futures import ThreadPoolExecutor
from regionspot.pipeline.images.decode import read_image
sys.path.insert(0, sys.argv[1])
with ThreadPoolExecutor(16) as pool:
    print({read.getpixel((0, 0)) for read in pool.map(read_image, [sys.argv[1] + "/image.jpg"] * 64)})
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.stdout == "{(10, 20, 30)}\n", done.stderr


def test_damaged_metadata_causes_no_warning(tmp_path):
    NOISE.save(tmp_path / "image.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05 not what EXIF looks like")
    (tmp_path / "image.tif").write_bytes(saved("TIFF")[:60])
    script = (
        "import sys\nfrom regionspot.pipeline.images.decode import read_image\nread_image(sys.argv[1], exif='apply')"
    )
    done = [
        subprocess.run([sys.executable, "-c", script, tmp_path / name], capture_output=True, text=True)
        for name in ("image.jpg", "image.tif")
    ]
    assert done[0].stderr == ""
    assert "Warning" not in done[1].stderr


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_upright_under_every_exif_rule(orientation):
    """The HEIC format itself stores the rotation, and its decoder applies it."""
    plugin = pytest.importorskip("pillow_heif")
    plugin.register_heif_opener()
    colours = np.array([[[230, 30, 30], [30, 220, 40]], [[40, 50, 230], [240, 240, 240]]], np.uint8)
    stored = Image.fromarray(colours.repeat(32, 0).repeat(64, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(stored, "HEIF", quality=95, exif=exif.tobytes())
    with_rule = [np.asarray(read_image(content, exif=rule)) for rule in ("auto", "apply", "ignore")]
    assert all(np.array_equal(one, with_rule[0]) for one in with_rule)
    expected = stored.transpose(TURNS[orientation]) if orientation > 1 else stored
    upright = Image.fromarray(with_rule[0])
    assert upright.size == expected.size
    points = [(x, y) for x in (10, upright.width - 10) for y in (10, upright.height - 10)]
    difference = np.array([upright.getpixel(p) for p in points]) - [expected.getpixel(p) for p in points]
    assert np.abs(difference).max() < 30
