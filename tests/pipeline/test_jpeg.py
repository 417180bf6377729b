"""JPEGs have Pillow's pixels whoever decodes them, whole or damaged, or are left to Pillow."""

import io
import random

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from regionspot.cache.errors import ImageError
from regionspot.pipeline.images import decode as images
from regionspot.pipeline.images import jpeg
from regionspot.pipeline.images.decode import read_image
from regionspot.pipeline.images.jpeg import decode_jpeg, gives_pillows_pixels

COARSE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
NOISE = COARSE.resize((131, 97), Image.Resampling.BICUBIC)


@pytest.fixture
def compared():
    """The comparison of both decoders is made anew, before and after."""
    gives_pillows_pixels.cache_clear()
    yield
    gives_pillows_pixels.cache_clear()


def jpeg_bytes(image: Image.Image = NOISE, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def pillows(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as stored:
        return np.asarray(stored.convert("RGB"))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (8, 8), (17, 33), (131, 97), (64, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_kind_of_jpeg_has_pillows_pixels(mode, size):
    image = COARSE.resize(size, Image.Resampling.BICUBIC).convert(mode)
    for subsampling in (0, 1, 2):
        for quality in (30, 95):
            for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}):
                data = jpeg_bytes(image, quality=quality, subsampling=subsampling, **options)
                assert np.array_equal(decode_jpeg(data), pillows(data)), (subsampling, quality, options)


@pytest.mark.parametrize("subsampling", ["411", "440"])
def test_chroma_samplings_that_pillow_does_not_write_have_its_pixels_too(subsampling):
    data = simplejpeg.encode_jpeg(np.asarray(NOISE).copy(), colorsubsampling=subsampling)
    found = decode_jpeg(data)
    assert found is None or np.array_equal(found, pillows(data))


def test_rgb_stored_as_such_has_pillows_pixels():
    data = jpeg_bytes(keep_rgb=True)
    assert np.array_equal(decode_jpeg(data), pillows(data))


def test_what_simplejpeg_cannot_do_as_pillow_does_is_left_to_it(monkeypatch):
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
                patch.setattr(images, "decode_jpeg", lambda _: None)
            try:
                return np.asarray(read_image(data))
            except ImageError as error:
                return str(error)

    return read


@WITH_AND_WITHOUT_SIMPLEJPEG
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_may_lack_its_end_marker_but_no_pixels(read, kind, decoder):
    image, options = KINDS[kind]
    whole = jpeg_bytes(image, quality=90, **options)
    for tail in (b"", b"\xff", bytes(4096), b"\xff\xd9", b"\xff\xd9" + b"anything behind it"):
        assert np.array_equal(read(whole[:-2] + tail, decoder), pillows(whole)), tail
    for kept in (len(whole) // 4, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 12):
        for tail in (b"", bytes(4096)):
            assert "is broken or cut off" in read(whole[:kept] + tail, decoder), (kept, tail)


@WITH_AND_WITHOUT_SIMPLEJPEG
@pytest.mark.parametrize("kind", ["baseline", "grey", "for print"])
def test_rows_that_are_missing_are_noticed_although_the_end_marker_is_there(read, kind, decoder):
    whole = jpeg_bytes(KINDS[kind][0], quality=90)
    assert "its last rows are missing" in read(whole[: len(whole) // 2] + b"\xff\xd9", decoder)


@WITH_AND_WITHOUT_SIMPLEJPEG
@pytest.mark.parametrize("kind", ["progressive", "for print, progressive"])
def test_a_progressive_jpeg_that_ends_between_two_scans_is_cut_off(read, kind, decoder):
    whole = jpeg_bytes(KINDS[kind][0], quality=90, progressive=True)
    starts = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xc4"]  # the tables before each scan
    assert len(starts) > 5
    for start in starts[1:]:
        assert "is broken or cut off" in read(whole[:start], decoder)


@WITH_AND_WITHOUT_SIMPLEJPEG
def test_of_two_images_in_a_file_the_first_counts(read, decoder):
    file = io.BytesIO()
    NOISE.save(file, "MPO", quality=90, save_all=True, append_images=[NOISE.rotate(180)])
    whole = file.getvalue()
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


def test_a_damaged_jpeg_comes_out_as_it_would_of_pillow_alone(tmp_path, monkeypatch):
    drawn, path = random.Random(0), tmp_path / "damaged.jpg"
    files = [jpeg_bytes(), jpeg_bytes(progressive=True), jpeg_bytes(NOISE.convert("L"), restart_marker_blocks=2)]
    broken = 0
    for _ in range(150):
        data = bytearray(drawn.choice(files))
        for _ in range(drawn.choice([1, 1, 2, 5])):
            data[drawn.randrange(2, len(data))] = drawn.randrange(256)
        path.write_bytes(data[: drawn.choice([len(data), len(data), len(data) - 2, drawn.randrange(3, len(data))])])
        found = outcome(path)
        with monkeypatch.context() as without:
            without.setattr(images, "decode_jpeg", lambda _: None)
            assert np.array_equal(found, outcome(path))
        broken += isinstance(found, str)
    assert 20 < broken < 130, "some are read, some are not"


@pytest.mark.usefixtures("compared")
def test_a_decoder_whose_pixels_are_off_by_one_is_not_used(monkeypatch):
    honest = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *given, **options: honest(*given, **options) ^ 1)
    assert not gives_pillows_pixels()
    assert decode_jpeg(jpeg_bytes()) is None


def test_a_jpeg_is_decoded_by_simplejpeg_where_it_may_be(tmp_path, monkeypatch):
    NOISE.save(tmp_path / "image.jpg")
    monkeypatch.setattr(images, "to_rgb", lambda *_: pytest.fail("Pillow decoded it"))
    assert read_image(tmp_path / "image.jpg").size == NOISE.size
