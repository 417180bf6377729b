"""Creates every image file in the table of docs/images.md, extracts them, and compares the results with the table."""

import ctypes
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, insert_chunks, png, png_chunk
from PIL import Image, ImageCms, ImageOps

from regionspot.cache.errors import ImageError
from regionspot.cache.tools.resume import open_or_create
from regionspot.pipeline.datasets.failure_limit import FailureLimit
from regionspot.pipeline.datasets.image_sizes import ABSENT, UNREADABLE, image_sizes
from regionspot.pipeline.datasets.registry import read_dataset
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import extract
from regionspot.pipeline.images import decode
from regionspot.pipeline.images.decode import TURNS, decode_image

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "images.md"
HEIGHT, WIDTH = 45, 64
ALL_MAY_FAIL = FailureLimit(share=1.0)
EXIF_ORIENTATION = 0x0112
SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")

COARSE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
COLOUR = Image.fromarray(COARSE).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
OTHER = COLOUR.transpose(Image.Transpose.ROTATE_180)
ALPHA = Image.fromarray(np.full((HEIGHT, WIDTH), 40, np.uint8))

Make = Callable[[Path], Image.Image | None]  # writes the file and returns the expected image; None: Pillow's result


def table() -> list[list[str]]:
    """The cells of the table of images, without its header."""
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Images\n")[1].split("\n##")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def in_backticks(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def saved(image: Image.Image = COLOUR, expected: Image.Image | None = None, **options) -> Make:
    def make(path: Path) -> Image.Image | None:
        image.save(path, **options)
        return expected

    return make


def rotated(orientation: int, expected_rotated: bool) -> Make:
    def make(path: Path) -> Image.Image:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        COLOUR.save(path, exif=exif)
        with Image.open(path) as stored:
            return ImageOps.exif_transpose(stored) if expected_rotated else stored.convert("RGB")

    return make


def with_content(content: bytes) -> Make:
    return lambda path: path.write_bytes(content) and None


def half(format: str) -> Make:
    content = encode(COLOUR, format, quality=100)
    return with_content(content[: len(content) // 2])


def damaged_in_the_middle(path: Path) -> None:
    COLOUR.save(path, quality=95)
    data = bytearray(path.read_bytes())
    data[-300:-290] = bytes(10)
    path.write_bytes(data)


def linked(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere.png"
    OTHER.save(elsewhere)
    path.symlink_to(elsewhere)


def link_to(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def without_permission(path: Path) -> None:
    COLOUR.save(path)
    path.chmod(0)


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG whose frame header states another size."""
    return encode(COLOUR, "JPEG").replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", height, width), 1)


def sixteen_bits(path: Path) -> Image.Image:
    deep = np.asarray(COLOUR.convert("L")).astype(np.uint16) * 256 + 77
    Image.fromarray(deep).save(path)
    return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")


def with_alpha() -> Image.Image:
    image = COLOUR.copy()
    image.putalpha(ALPHA)
    return image


def transparent_palette(path: Path) -> Image.Image:
    image = COLOUR.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    image.save(path, transparency=bytes([0, 128]))
    return image.convert("RGB")


def rotated_as(format: str, orientation: int, expected_rotated: bool) -> Make:
    """In a lossless format. The expected pixels are rotated here, because Pillow rotates a TIFF while reading it."""

    def make(path: Path) -> Image.Image:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        COLOUR.save(path, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
        return COLOUR.transpose(TURNS[orientation]) if expected_rotated else COLOUR

    return make


GREY = np.asarray(COLOUR.convert("L"))


def of_values(values: np.ndarray, **options) -> Make:
    """A file with these values; 8-bit grey is expected."""
    return saved(Image.fromarray(values), Image.fromarray(GREY).convert("RGB"), **options)


def floats_of_any_range(path: Path) -> Image.Image:
    flat = GREY.clip(*np.percentile(GREY, (5, 95), method="nearest")).astype(np.float32)  # no outliers
    Image.fromarray(flat - 300).save(path)
    stretched = (flat - flat.min()) * 255 / (flat.max() - flat.min())
    return Image.fromarray(stretched.round().astype(np.uint8)).convert("RGB")


def as_jpeg(change: Callable[[bytes], bytes], image: Image.Image = COLOUR) -> Make:
    """A JPEG with changed bytes; the pixels of the unchanged file are expected."""

    def make(path: Path) -> Image.Image:
        content = encode(image, "JPEG")
        path.write_bytes(change(content))
        with Image.open(io.BytesIO(content)) as whole:
            return whole.convert("RGB")

    return make


def png_with(kind: bytes, body: bytes, checksum: int | None = None) -> Make:
    def make(path: Path) -> Image.Image:
        path.write_bytes(insert_chunks(encode(COLOUR), png_chunk(kind, body, checksum)))
        return COLOUR

    return make


def dim_colours(path: Path) -> None:
    """A PNG with 16 bits per channel that uses 12 of them; Pillow cannot write one."""
    rows = (np.asarray(COLOUR).astype(np.uint16) * 16).astype(">u2")
    path.write_bytes(png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows)))


def with_grey_alpha(path: Path) -> Image.Image:
    rows = np.stack([GREY.astype(np.uint16) * 257, np.full(GREY.shape, 9)], 2).astype(">u2")
    path.write_bytes(png(WIDTH, HEIGHT, 16, 4, b"".join(b"\0" + row.tobytes() for row in rows)))
    return Image.fromarray(GREY).convert("RGB")


WIDE = Image.fromarray(COARSE).resize((30_000, 1_000), Image.Resampling.NEAREST)
STATED = {"one_pixel.png": (1, 1), "wide.jpg": (1_000, 30_000), "other_size.jpg": (HEIGHT + 1, WIDTH)}
STATED |= dict.fromkeys(["exif_6.tif", "exif_6.png", "exif_6.webp"], (WIDTH, HEIGHT))
STATED |= {f"exif_{turn}.jpg": (WIDTH, HEIGHT) for turn in (5, 6, 7, 8)}  # height and width, (HEIGHT, WIDTH) for others

MAKE: dict[str, Make] = {
    "plain.jpg": saved(),
    "grey.jpg": saved(COLOUR.convert("L")),
    "progressive.jpg": saved(progressive=True),
    "sharp_colours.jpg": saved(subsampling=0),
    "cmyk.jpg": saved(COLOUR.convert("CMYK")),
    "two_frames.mpo": saved(save_all=True, append_images=[OTHER]),
    "image.webp": saved(),
    "image.tif": saved(expected=COLOUR),
    "image.bmp": saved(expected=COLOUR),
    "png_in_truth.jpg": saved(expected=COLOUR, format="PNG"),
    "no_ending": saved(expected=COLOUR, format="PNG"),
    "spaces and ümläuts.jpg": saved(OTHER),
    "linked.jpg": linked,
    "one_bit.png": saved(COLOUR.convert("1"), COLOUR.convert("1").convert("RGB")),
    "grey.png": saved(COLOUR.convert("L"), COLOUR.convert("L").convert("RGB")),
    "palette.png": saved(COLOUR.convert("P"), COLOUR.convert("P").convert("RGB")),
    "sixteen_bit.png": sixteen_bits,
    "twelve_bits.png": of_values(GREY.astype(np.uint16) * 16),
    "floats.tif": of_values((GREY / 255).astype(np.float32)),
    "floats_of_any_range.tif": floats_of_any_range,
    "lab.tif": saved(ImageCms.profileToProfile(COLOUR, SRGB, LAB, outputMode="LAB")),
    "cmyk.tif": saved(COLOUR.convert("CMYK")),
    "alpha_sixteen_bit.png": with_grey_alpha,
    "profile.png": saved(COLOUR, COLOUR, icc_profile=ImageCms.ImageCmsProfile(SRGB).tobytes()),
    "large_profile.png": png_with(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 * 2**20))),
    "damaged_text.png": png_with(b"tEXt", b"Comment\0text", checksum=1),
    "gamma.png": png_with(b"gAMA", struct.pack(">I", 100_000)),
    "no_end_marker.jpg": as_jpeg(lambda whole: whole[:-2]),
    "more_behind_the_end.jpg": as_jpeg(lambda whole: whole + b"anything"),
    "alpha.png": saved(with_alpha(), COLOUR),
    "transparent_palette.png": transparent_palette,
    "animated.gif": saved(
        COLOUR.convert("P"), COLOUR.convert("P").convert("RGB"), save_all=True, append_images=[OTHER]
    ),
    "animated.webp": saved(COLOUR, COLOUR, save_all=True, append_images=[OTHER], lossless=True),
    # Copies: an image that was saved as JPEG keeps settings that TIFF cannot take.
    "two_pages.tif": saved(COLOUR.copy(), COLOUR, save_all=True, append_images=[OTHER.copy()]),
    "animated.png": saved(COLOUR, COLOUR, save_all=True, append_images=[OTHER]),
    **{f"exif_{turn}.jpg": rotated(turn, turn >= 5) for turn in range(1, 9)},
    "exif_6_annotated_as_stored.jpg": rotated(6, False),
    "exif_6.tif": rotated_as("TIFF", 6, True),
    "exif_6.png": rotated_as("PNG", 6, True),
    "exif_6.webp": rotated_as("WEBP", 6, True),
    "exif_8_annotated_as_stored.tif": rotated_as("TIFF", 8, False),
    "exif_3.tif": rotated_as("TIFF", 3, False),
    "broken_exif.jpg": saved(exif=b"Exif\0\0 not what EXIF looks like"),
    "scratched.jpg": damaged_in_the_middle,
    "one_pixel.png": saved(COLOUR.crop((0, 0, 1, 1)), COLOUR.crop((0, 0, 1, 1))),
    "wide.jpg": saved(WIDE, quality=30),
    "removed_while_read.jpg": saved(COLOUR, COLOUR, format="PNG"),
    "missing.jpg": lambda path: None,
    "dangling.jpg": link_to("nowhere.jpg"),
    "empty.jpg": lambda path: path.touch(),
    "page.jpg": with_content(b"<html>404 Not Found</html>"),
    "pointer.jpg": with_content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "drawing.svg": with_content(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "image.jxl": with_content(b"\xff\x0a" + bytes(50)),
    "raw_image.tif": saved(tiffinfo={254: 1}),
    "dim_colours.png": dim_colours,
    "nothing_but_nan.tif": saved(Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32))),
    "rows_missing.jpg": as_jpeg(lambda whole: whole[: len(whole) * 3 // 4] + b"\xff\xd9"),
    "half.jpg": half("JPEG"),
    "half.png": half("PNG"),
    "cut_while_read.jpg": saved(),
    "other_size.jpg": saved(),
    "bomb.jpg": with_content(jpeg_of(65_000, 65_000)),
    "bomb.png": with_content(png(65_000, 65_000, 1, 0, bytes(1000))),
    "drawing.eps": saved(),
    "folder.jpg": lambda path: path.mkdir(),
    "pipe.jpg": lambda path: os.mkfifo(path),
    "device.jpg": link_to("/dev/zero"),
    "secret.jpg": without_permission,
    "loop.jpg": link_to("loop.jpg"),
    "bad_disk.jpg": link_to("/proc/self/mem"),  # its first page is never mapped: reading it gives EIO
}


@contextmanager
def without_root_privileges() -> Iterator[None]:
    """Root may read every file: drop this capability in this thread and in threads it starts (capabilities(7))."""
    if os.geteuid() != 0:
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), struct.pack("Ii", 0x20080522, 0)
    saved_capabilities = ctypes.create_string_buffer(24)
    assert libc.capget(header, saved_capabilities) == 0
    effective, *rest = struct.unpack("6I", saved_capabilities.raw)
    lowered = struct.pack("6I", effective & ~0b110, *rest)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, lowered) == 0
    try:
        yield
    finally:
        assert libc.capset(header, saved_capabilities.raw) == 0


def changing_files(opener: Callable[[str, int], int]) -> Callable[[str, int], int]:
    """An opener that deletes or truncates two of the files directly after opening them."""

    def open_it(path: str, flags: int) -> int:
        descriptor = opener(path, flags)
        if path.endswith("removed_while_read.jpg"):
            os.unlink(path)
        if path.endswith("cut_while_read.jpg"):
            os.truncate(path, 500)
        return descriptor

    return open_it


def annotation_file(path: Path) -> Path:
    """A COCO file: every image with one box around the whole image."""
    images, annotations = [], []
    for number, name in enumerate(MAKE):
        height, width = STATED.get(name, (HEIGHT, WIDTH))
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, width, height]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, backbones):
    """The cache, the summary, and the expected image by file name, for all files in MAKE."""
    root = tmp_path_factory.mktemp("strange")
    folder = root / "photos"
    folder.mkdir()
    expected = {name: make(folder / name) for name, make in MAKE.items()}
    manifest = read_dataset("coco", root, "train", annotations=annotation_file(root / "boxes.json"))
    cache = open_or_create(root / "c.zarr", manifest, backbones.feature_sets(), 16)
    with pytest.MonkeyPatch.context() as patch, without_root_privileges():
        patch.setattr(decode, "_open_nonblocking", changing_files(decode._open_nonblocking))
        summary = extract(cache, folder, backbones, ExtractConfig(max_failures=ALL_MAY_FAIL))
    return cache, summary, expected


def pillows(path: Path) -> Image.Image:
    with Image.open(path) as stored:
        return stored.convert("RGB")


def test_the_table_lists_exactly_these_files():
    named = [name for row in table() for name in in_backticks(row[0])]
    assert sorted(named) == sorted(MAKE)


def test_extracted_features_are_those_of_the_expected_image(extracted, backbones):
    cache, _, expected = extracted
    folder, rows = cache.path.parent / "photos", {str(name): row for row, name in enumerate(cache.manifest.paths)}
    names = [name for row in table() if row[2] == "extracted" for name in in_backticks(row[0])]
    assert sorted(rows[name] for name in names) == cache.valid_rows().tolist()
    localizer, (encoder,) = backbones.localizer, backbones.encoders
    for name in names:
        image = expected[name] or pillows(folder / name)
        assert (image.height, image.width) == STATED.get(name, (HEIGHT, WIDTH)), name
        box = np.array([[0, 0, image.width, image.height]], np.float32)
        embedding = localizer.encode([localizer.preprocess(image)])[0]
        size = (image.height, image.width)
        tokens = localizer.tokens_of_images(embedding[None], [box], [size])[0].numpy()
        feature_map = encoder.encode(encoder.preprocess(image)[None])[0].numpy()
        batch = cache.read(np.array([rows[name]]))
        assert np.abs(batch.tokens[0, :1] - tokens).max() <= 2e-3 * np.abs(tokens).max(), name
        assert np.abs(batch.feature_map[0] - feature_map).max() <= 2e-3 * np.abs(feature_map).max(), name


def test_failures_are_recorded_with_the_reason_in_the_table(extracted):
    cache, summary, _ = extracted
    reasons = {Path(failure.path).name: failure.reason for failure in cache.failures()}
    expected = {name: in_backticks(row[3])[0] for row in table() if row[2] == "failed" for name in in_backticks(row[0])}
    assert sorted(reasons) == sorted(expected)
    assert [(name, reasons[name]) for name, reason in expected.items() if reason not in reasons[name]] == []
    assert not any("\n" in reason for reason in reasons.values())
    assert summary.failed == len(expected)


def test_ignored_orientations_are_counted(extracted):
    assert extracted[1].ignored_orientations == 6


def test_reading_sizes_from_the_headers_neither_blocks_nor_fails(extracted):
    folder = extracted[0].path.parent / "photos"
    expected = {
        **dict.fromkeys(["missing.jpg", "dangling.jpg", "loop.jpg"], (ABSENT, ABSENT)),
        **dict.fromkeys(
            ["pipe.jpg", "device.jpg", "folder.jpg", "empty.jpg", "page.jpg", "bomb.png"], (UNREADABLE,) * 2
        ),
        **dict.fromkeys(["plain.jpg", "linked.jpg", "png_in_truth.jpg", "half.jpg"], (HEIGHT, WIDTH)),
        "wide.jpg": (1_000, 30_000),
    }
    assert dict(zip(expected, map(tuple, image_sizes(folder, list(expected)).tolist()), strict=True)) == expected


def peak_bytes() -> int:
    """Peak resident memory since the last `reset_peak`."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    except OSError:
        pytest.skip("this kernel cannot reset the peak memory")


def test_a_wide_image_and_decompression_bombs_take_little_memory(extracted, backbones):
    folder, (encoder,) = extracted[0].path.parent / "photos", backbones.encoders
    reset_peak()
    before = peak_bytes()
    for bomb in ("bomb.jpg", "bomb.png"):
        with pytest.raises(ImageError):
            decode_image(folder / bomb)
    image = decode_image(folder / "wide.jpg").image
    backbones.localizer.preprocess(image)
    encoder.preprocess(image)
    # The pixels are 90 MB, 120 MB in Pillow's layout, 360 MB as floats; the bombs would be 12 GB and 0.5 GB.
    assert peak_bytes() - before < 320e6
