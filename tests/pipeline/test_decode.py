"""Every image is decoded to RGB in the orientation of its boxes, or refused with a one-line error."""

import os
import struct

import numpy as np
import pytest
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide

from regionspot.cache.errors import ImageError
from regionspot.pipeline.images import decode
from regionspot.pipeline.images.decode import decode_image, read_image
from regionspot.pipeline.images.preprocess import get_preprocess

HEIGHT, WIDTH = 20, 30
DIRECT = get_preprocess("direct")
QUARTER_TURN = 6  # EXIF: rotated 90 degrees clockwise for display


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_every_mode_is_converted_to_rgb(tmp_path, mode):
    grey = np.zeros((HEIGHT, WIDTH), np.uint8)
    grey[:, 15:] = 255
    deep = mode == "I;16"
    image = Image.fromarray(grey.astype(np.uint16) * 257) if deep else Image.fromarray(grey).convert(mode)
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr", "F", "I") else "image.png")
    image.save(path)
    upright = read_image(path)
    assert (upright.mode, upright.size) == ("RGB", (WIDTH, HEIGHT))
    assert max(upright.getpixel((2, 2))) < 10
    assert min(upright.getpixel((27, 2))) > 245


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparent_colours_is_read_without_a_warning(tmp_path):
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "sign.png", transparency=bytes([0, 128]))
    assert read_image(tmp_path / "sign.png").getpixel((3, 3)) == (200, 100, 50)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_palette_may_have_8_bits_per_value_instead_of_16(tmp_path, bits):
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "sign.tif")
    with Image.open(tmp_path / "sign.tif") as stored:
        values = [value // 256 << (bits - 8) for value in stored.tag_v2[320]]
    content = (tmp_path / "sign.tif").read_bytes()
    written = b"".join(struct.pack("<H", value) for value in stored.tag_v2[320])
    changed = content.replace(written, b"".join(struct.pack("<H", value) for value in values))
    assert read_image(changed).getpixel((3, 3)) == (200, 100, 50)


def test_an_image_of_another_size_is_refused_with_both_sizes(tmp_path):
    path = tmp_path / "small_copy.jpg"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    with pytest.raises(ImageError, match=r"small_copy.jpg: is 30 x 20 pixels .*states 300 x 200"):
        read_image(path, (200, 300))


def test_a_square_image_is_not_rotated_because_its_size_cannot_tell(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = QUARTER_TURN
    Image.new("RGB", (HEIGHT, HEIGHT)).save(tmp_path / "square.jpg", exif=exif)
    assert decode_image(tmp_path / "square.jpg", (HEIGHT, HEIGHT)).orientation == "ignored"


def test_an_image_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "image.png")
    monkeypatch.setattr(decode, "to_rgb", full)
    with pytest.raises(ImageError, match=r"image.png: does not fit into the free memory"):
        read_image(tmp_path / "image.png")


def test_unreadable_images_leave_no_file_open(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    Image.effect_noise((WIDTH, HEIGHT), 50).save(tmp_path / "cut.jpg", quality=100)
    os.truncate(tmp_path / "cut.jpg", 650)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 50)
    before = len(os.listdir("/dev/fd"))
    for path in tmp_path.iterdir():
        with pytest.raises(ImageError):
            read_image(path)
    assert len(os.listdir("/dev/fd")) == before


def test_sam_sizes_and_boxes_equal_the_official_transform():
    official = ResizeLongestSide(1024)
    rng = np.random.default_rng(0)
    for size in [(426, 640), (640, 426), (333, 1000), (1024, 1024), (7, 2001)]:
        boxes = rng.uniform(0, min(size), (9, 4)).astype(np.float32)
        assert DIRECT.sam_size(size, 1024) == official.get_preprocess_shape(*size, 1024)
        assert np.array_equal(
            DIRECT.scale_boxes(boxes, size, 1024), official.apply_boxes(boxes, size).astype(np.float32)
        )


def test_the_sam_input_equals_the_official_transform():
    pixels = np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8)
    expected = ResizeLongestSide(64).apply_image(pixels)
    assert np.array_equal(DIRECT.sam_input(Image.fromarray(pixels), 64).permute(1, 2, 0).numpy(), expected)


def test_a_very_narrow_image_keeps_one_pixel():
    assert DIRECT.sam_input(Image.new("RGB", (5000, 1)), 256).shape == (3, 1, 256)


def test_the_clip_input_is_a_normalised_square():
    image = Image.new("RGB", (90, 30), (255, 0, 51))
    square = DIRECT.clip_input(image, 16, (0.5, 0.5, 0.2), (0.5, 0.25, 1.0))
    assert square.shape == (3, 16, 16)
    assert np.allclose(square.mean((1, 2)).numpy(), [1.0, -2.0, 0.0], atol=1e-5)
