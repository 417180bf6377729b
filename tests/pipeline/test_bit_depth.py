"""Images of more than 8 bits, or of floats, keep their brightness in 8 bits, or are refused."""

import struct

import numpy as np
import pytest
from image_files import encode, png
from PIL import Image

from regionspot.cache.errors import ImageError
from regionspot.pipeline.images import bit_depth
from regionspot.pipeline.images.decode import read_image

HEIGHT, WIDTH = 32, 48
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)  # black at the top left to white at the bottom right
EIGHT_BITS = RAMP * 255
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
BLACK_IS_ZERO, RGB = 1, 2
ASCII_TYPES = {"H": 3, "I": 4, "f": 11}  # TIFF's numbers of struct's types


@pytest.fixture(autouse=True)
def _reset_warnings(monkeypatch):
    monkeypatch.setattr(bit_depth, "_warned", set())


def tiff(samples: np.ndarray, sample_format=UNSIGNED, bits=None, photometric=BLACK_IS_ZERO, tags=()) -> bytes:
    """An uncompressed TIFF of `samples`, (h, w) or (h, w, 3). `bits` per sample if they are packed."""
    height, width = HEIGHT, WIDTH
    order = ">" if samples.dtype.byteorder == ">" else "<"
    channels = samples.shape[2] if samples.ndim == 3 else 1
    bits = bits or samples.itemsize * 8
    entries = [(256, "I", (width,)), (257, "I", (height,)), (258, "H", (bits,) * channels), (259, "H", (1,))]
    entries += [(262, "H", (photometric,)), (273, "I", (8,)), (277, "H", (channels,)), (278, "I", (height,))]
    entries += [(279, "I", (samples.nbytes,)), (339, "H", (sample_format,) * channels), *tags]
    directory = 8 + samples.nbytes
    after = directory + 2 + 12 * len(entries) + 4
    table, outside = struct.pack(order + "H", len(entries)), b""
    for tag, kind, values in sorted(entries):
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(packed) > 4:
            packed, outside = struct.pack(order + "I", after + len(outside)), outside + packed
        table += struct.pack(order + "HHI", tag, ASCII_TYPES[kind], len(values)) + packed.ljust(4, b"\0")
    start = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, directory)
    return start + samples.tobytes() + table + bytes(4) + outside


def png_of(samples: np.ndarray) -> bytes:
    return encode(Image.fromarray(samples))


def ramp(white: float, dtype, black: float = 0) -> np.ndarray:
    return (black + RAMP * (white - black)).astype(dtype)


def colour_png(white: float) -> bytes:
    """16 bits per channel, which Pillow cannot write."""
    rows = ramp(white, np.uint16)[..., None].repeat(3, 2).astype(">u2")
    return png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


def packed_12_bits() -> np.ndarray:
    pairs = ramp(4095, np.uint16).reshape(-1, 2).astype(np.uint32)
    whole = pairs[:, 0] << 12 | pairs[:, 1]
    return np.stack([whole >> 16, whole >> 8 & 255, whole & 255], 1).astype(np.uint8)


def with_hot_pixel(samples: np.ndarray, value: float) -> np.ndarray:
    samples[3, 5] = value
    return samples


# The file states white, or it is the usual value.
STATED = {
    "16 bits": png_of(ramp(65535, np.uint16)),
    "16 bits, TIFF": tiff(ramp(65535, np.uint16)),
    "16 bits, TIFF, other byte order": tiff(ramp(65535, ">u2")),
    "12 bits, packed": tiff(packed_12_bits(), bits=12),
    "12 bits in 16, stated": tiff(ramp(4095, np.uint16), tags=[(281, "H", (4095,))]),
    "8 bits in 16": png_of(ramp(255, np.uint16)),
    "8 bits in 32": tiff(ramp(255, np.int32), SIGNED),
    "16 bits, signed": tiff(ramp(32767, np.int16), SIGNED),
    "16 bits in 32": tiff(ramp(65535, np.int32), SIGNED),
    "32 bits, unsigned": tiff(ramp(2**32 - 1, np.uint32)),
    "7 bits, signed": tiff(ramp(127, np.int8), SIGNED),
    "float, 0 to 1": tiff(ramp(1, np.float32), FLOAT),
    "float, 0 to 1, other byte order": tiff(ramp(1, ">f4"), FLOAT),
    "float, 0 to 255": tiff(ramp(255, np.float32), FLOAT),
    "float, 0 to 65535": tiff(ramp(65535, np.float32), FLOAT),
    "float, stated": tiff(ramp(40, np.float32), FLOAT, tags=[(341, "f", (40.0,))]),
    "float, PFM": b"Pf\n%d %d\n-1.0\n" % (WIDTH, HEIGHT) + ramp(1, np.float32)[::-1].tobytes(),
    "12 bits, PGM": b"P5\n%d %d\n4095\n" % (WIDTH, HEIGHT) + ramp(4095, ">u2").tobytes(),
    "16 bits, white is 0": tiff(ramp(0, np.uint16, 65535), photometric=0),
    "float, white is 0": tiff(ramp(0, np.float32, 1), FLOAT, photometric=0),
    "8 bits, white is 0": tiff(ramp(0, np.uint8, 255), photometric=0),
    "16 bits a channel, PNG": colour_png(65535),
    "16 bits a channel": tiff(ramp(65535, np.uint16)[..., None].repeat(3, 2), photometric=RGB),
}
# White is guessed from the values.
GUESSED = {
    **{f"{bits} bits in 16": png_of(ramp(2**bits - 1, np.uint16)) for bits in (9, 12, 14)},
    "12 bits in 16, TIFF": tiff(ramp(4095, np.uint16)),
    "12 bits in 16, 16 stated": tiff(ramp(4095, np.uint16), tags=[(281, "H", (65535,))]),
    "12 bits in 16 with a hot pixel": png_of(with_hot_pixel(ramp(4095, np.uint16), 65535)),
    "12 bits in 16, white is 0": tiff(ramp(0, np.uint16, 4095), photometric=0),
    "6 bits in 16": png_of(ramp(63, np.uint16)),
    "24 bits in 32": tiff(ramp(2**24 - 1, np.int32), SIGNED),
    "far from 0": png_of(ramp(8000, np.uint16, 7000)),
    "signed": tiff(ramp(2000, np.int16, -2000), SIGNED),
    "signed, 8 bits": tiff(ramp(127, np.int8, -128), SIGNED),
    "float, -1 to 1": tiff(ramp(1, np.float32, -1), FLOAT),
    "float, 0 to 0.01": tiff(ramp(0.01, np.float32), FLOAT),
    "float, 0 to 12": tiff(ramp(12, np.float32), FLOAT),
    "float, 0 to 1e30": tiff(ramp(1e30, np.float32), FLOAT),
    "float with a hot pixel": tiff(with_hot_pixel(ramp(1, np.float32), 1e4), FLOAT),
    "14 bits in 16, three channels, PNG": colour_png(16383),
    "14 bits in 16, three channels": tiff(ramp(16383, np.uint16)[..., None].repeat(3, 2), photometric=RGB),
}


def assert_ramp(image: Image.Image, max_wrong: int = 1) -> None:
    """The image is the ramp in 8 bits, except for `max_wrong` pixels."""
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    difference = np.abs(np.asarray(image) - EIGHT_BITS[..., None]).max(axis=2)
    assert (difference > 5).sum() <= max_wrong, difference.max()


@pytest.mark.parametrize("name", STATED)
def test_a_stated_or_usual_white_is_used(name, caplog):
    assert_ramp(read_image(STATED[name]), max_wrong=0)
    assert not caplog.records


@pytest.mark.parametrize("name", GUESSED)
def test_an_unstated_white_is_guessed_with_a_warning(name, caplog):
    assert_ramp(read_image(GUESSED[name]))
    (message,) = caplog.messages
    assert message.startswith(f"the image of {len(GUESSED[name]):,} bytes: has ")


def test_each_kind_of_image_is_warned_about_once(caplog, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(GUESSED["12 bits in 16"])
        read_image(tmp_path / name)
    (message,) = caplog.messages
    assert f"{tmp_path / 'a.png'}: has values from 0 to 4095 and does not state white; 4095 is used" in message


def test_12_bits_keep_their_upper_8():
    dim = (ramp(4095, np.uint16) * 0.7).astype(np.uint16)
    assert np.array_equal(np.asarray(read_image(png_of(dim)))[..., 0], dim >> 4)


@pytest.mark.parametrize("value", [0, 65535])
def test_a_16_bit_image_may_be_all_black_or_all_white(value, caplog):
    image = read_image(png_of(np.full((HEIGHT, WIDTH), value, np.uint16)))
    assert np.asarray(image).max() == np.asarray(image).min() == value >> 8
    assert not caplog.records


def test_a_few_bright_pixels_on_black_stay_visible():
    sky = np.zeros((100, 100), np.uint16)
    sky[50, 50] = 3000
    assert read_image(png_of(sky)).getpixel((50, 50)) == (255, 255, 255)


def test_non_finite_values_become_black_or_white_with_a_warning(caplog):
    samples = ramp(1, np.float32)
    samples[0, :4] = samples[9, 9] = np.nan
    samples[1, 1], samples[1, 2] = np.inf, -np.inf
    image = read_image(tiff(samples, FLOAT))
    assert [image.getpixel(at)[0] for at in [(0, 0), (9, 9), (1, 1), (2, 1)]] == [0, 0, 255, 0]
    assert_ramp(image, max_wrong=5)
    assert "7 of its values are not finite" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.full((HEIGHT, WIDTH), np.nan, np.float32), FLOAT), "has no finite values"),
        (
            tiff(np.where(RAMP < 0.9, RAMP, 1e4).astype(np.float32), FLOAT),
            "has values from 0 to 10000, of which 8 bits",
        ),
        (colour_png(4095), "has 16 bits a channel but no values above 4,095"),
        (tiff(ramp(255, np.uint16)[..., None].repeat(3, 2), photometric=RGB), "no values above 255"),
    ],
    ids=["nothing but NaN", "a few lights in the dark", "12 bits in 16, colour", "8 bits in 16, colour"],
)
def test_an_image_that_cannot_be_shown_in_8_bits_is_refused(content, reason):
    with pytest.raises(ImageError, match=reason):
        read_image(content)


def test_images_made_in_python_are_scaled_in_the_same_way():
    assert_ramp(read_image(Image.fromarray(ramp(1, np.float32))))
    assert_ramp(read_image(Image.fromarray(ramp(4095, np.uint16))))
    assert_ramp(read_image(Image.fromarray(ramp(65535, np.int32))))
