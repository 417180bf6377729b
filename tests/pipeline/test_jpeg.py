"""simplejpeg decodes exactly Pillow's pixels, for intact and damaged files, or leaves the file to Pillow."""

import io
import random

import numpy as np
import pytest
import simplejpeg
from image_files import encode
from PIL import Image

from regionspot.cache.errors import ImageError
from regionspot.pipeline.images import decode, jpeg
from regionspot.pipeline.images.decode import read_image
from regionspot.pipeline.images.jpeg import decode_jpeg, matches_pillow

COARSE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
NOISE = COARSE.resize((131, 97), Image.Resampling.BICUBIC)


@pytest.fixture
def fresh_comparison():
    """Clears the cached comparison of the decoders, before and after the test."""
    matches_pillow.cache_clear()
    yield
    matches_pillow.cache_clear()


def jpeg_bytes(image: Image.Image = NOISE, **options) -> bytes:
    return encode(image, "JPEG", **options)


def pillows(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as stored:
        return np.asarray(stored.convert("RGB"))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (8, 8), (17, 33), (131, 97), (64, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_kind_of_jpeg_equals_pillow(mode, size):
    image = COARSE.resize(size, Image.Resampling.BICUBIC).convert(mode)
    for subsampling in (0, 1, 2):
        for quality in (30, 95):
            for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}):
                data = jpeg_bytes(image, quality=quality, subsampling=subsampling, **options)
                assert np.array_equal(decode_jpeg(data), pillows(data)), (subsampling, quality, options)


@pytest.mark.parametrize("subsampling", ["411", "440"])
def test_chroma_samplings_that_pillow_cannot_write_equal_pillow(subsampling):
    data = simplejpeg.encode_jpeg(np.asarray(NOISE).copy(), colorsubsampling=subsampling)
    pixels = decode_jpeg(data)
    assert pixels is None or np.array_equal(pixels, pillows(data))


def test_a_jpeg_stored_as_rgb_equals_pillow():
    data = jpeg_bytes(keep_rgb=True)
    assert np.array_equal(decode_jpeg(data), pillows(data))


def test_files_that_simplejpeg_decodes_differently_are_left_to_pillow(monkeypatch):
    assert decode_jpeg(jpeg_bytes(NOISE.convert("CMYK"))) is None
    assert decode_jpeg(jpeg_bytes()[:-300]) is None
    assert decode_jpeg(b"\xff\xd8\xff and no more") is None
    monkeypatch.setattr(jpeg, "MAX_PIXELS", 131 * 97)
    assert decode_jpeg(jpeg_bytes()) is None


KINDS = {
    "baseline": (NOISE, {}),
    "progressive": (NOISE, {"progressive": True}),
    "grey": (NOISE.convert("L"), {}),
    "restarts": (NOISE, {"restart_marker_blocks": 2}),
    "for print": (NOISE.convert("CMYK"), {}),
    "for print, progressive": (NOISE.convert("CMYK"), {"progressive": True}),
}
WITH_AND_WITHOUT_SIMPLEJPEG = pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])


@pytest.fixture
def read(monkeypatch):
    """The pixels of a JPEG's content, with one decoder or the other; the reason where it is refused."""

    def read(data: bytes, decoder: str) -> np.ndarray | str:
        with monkeypatch.context() as patch:
            if decoder == "Pillow":
                patch.setattr(decode, "decode_jpeg", lambda _: None)
            try:
                return np.asarray(read_image(data))
            except ImageError as error:
                return str(error)

    return read


@WITH_AND_WITHOUT_SIMPLEJPEG
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_marker_may_be_missing_but_no_pixels(read, kind, decoder):
    image, options = KINDS[kind]
    whole = jpeg_bytes(image, quality=90, **options)
    for tail in (b"", b"\xff", bytes(4096), b"\xff\xd9", b"\xff\xd9" + b"trailing bytes"):
        assert np.array_equal(read(whole[:-2] + tail, decoder), pillows(whole)), tail
    for kept in (len(whole) // 4, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 12):
        for tail in (b"", bytes(4096)):
            assert "is broken or cut off" in read(whole[:kept] + tail, decoder), (kept, tail)


@WITH_AND_WITHOUT_SIMPLEJPEG
@pytest.mark.parametrize("kind", ["baseline", "grey", "for print"])
def test_missing_rows_are_detected_before_an_end_marker(read, kind, decoder):
    whole = jpeg_bytes(KINDS[kind][0], quality=90)
    assert "its last rows are missing" in read(whole[: len(whole) // 2] + b"\xff\xd9", decoder)


@WITH_AND_WITHOUT_SIMPLEJPEG
@pytest.mark.parametrize("kind", ["progressive", "for print, progressive"])
def test_a_progressive_jpeg_cut_between_two_scans_is_refused(read, kind, decoder):
    whole = jpeg_bytes(KINDS[kind][0], quality=90, progressive=True)
    starts = [
        start for start in range(len(whole)) if whole[start : start + 2] == b"\xff\xc4"
    ]  # tables precede each scan
    assert len(starts) > 5
    for start in starts[1:]:
        assert "is broken or cut off" in read(whole[:start], decoder)


@WITH_AND_WITHOUT_SIMPLEJPEG
def test_the_first_of_two_images_in_a_file_is_decoded(read, decoder):
    whole = encode(NOISE, "MPO", quality=90, save_all=True, append_images=[NOISE.rotate(180)])
    assert np.array_equal(read(whole, decoder), pillows(whole))
    second = whole.rindex(b"\xff\xd8\xff")
    assert np.array_equal(read(whole[: second + 900], decoder), pillows(whole))
    assert np.array_equal(read(whole[: whole.rindex(b"\xff\xd9", 0, second)], decoder), pillows(whole))
    assert "is broken or cut off" in read(whole[: second - 300], decoder)


def outcome(path) -> np.ndarray | str:
    try:
        return np.asarray(read_image(path))
    except ImageError as error:
        return str(error)


def test_a_damaged_jpeg_is_decoded_as_by_pillow_alone(tmp_path, monkeypatch):
    rng, path = random.Random(0), tmp_path / "damaged.jpg"
    files = [jpeg_bytes(), jpeg_bytes(progressive=True), jpeg_bytes(NOISE.convert("L"), restart_marker_blocks=2)]
    broken = 0
    for _ in range(150):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(2, len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), len(data), len(data) - 2, rng.randrange(3, len(data))])])
        result = outcome(path)
        with monkeypatch.context() as without:
            without.setattr(decode, "decode_jpeg", lambda _: None)
            assert np.array_equal(result, outcome(path))
        broken += isinstance(result, str)
    assert 20 < broken < 130, "some must be decoded and some refused"


@pytest.mark.usefixtures("fresh_comparison")
def test_simplejpeg_is_not_used_if_its_pixels_differ_by_one(monkeypatch):
    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **options: original(*args, **options) ^ 1)
    assert not matches_pillow()
    assert decode_jpeg(jpeg_bytes()) is None


def test_an_intact_jpeg_is_decoded_by_simplejpeg(tmp_path, monkeypatch):
    NOISE.save(tmp_path / "image.jpg")
    monkeypatch.setattr(decode, "to_rgb", lambda *_: pytest.fail("Pillow decoded it"))
    assert read_image(tmp_path / "image.jpg").size == NOISE.size
