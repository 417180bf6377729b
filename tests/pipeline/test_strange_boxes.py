"""Extracts every box in the table of docs/images.md: kept boxes get their own token, others are counted as dropped."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from regionspot.cache.tools.resume import open_or_create
from regionspot.pipeline.datasets.registry import read_dataset
from regionspot.pipeline.extraction.extract import extract
from regionspot.pipeline.images.decode import read_image

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "images.md"
HEIGHT, WIDTH = 120, 200  # of all images, as in the document
MANY = 1500


def table() -> list[tuple[list[float | None], list[float | None] | str]]:
    """For each row of the table: the box in the file, and its corners or the name of its count."""
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Boxes\n")[1]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return [(numbers(given), numbers(outcome) if "`" in outcome else outcome.strip()) for given, outcome in rows]


def numbers(cell: str) -> list[float | None]:
    values = re.findall(r"`([^`]*)`", cell)[0].split(",")
    return [None if value.strip() == "null" else float(value) for value in values]


def annotation_file(path: Path, boxes: dict[str, list[list[float | None]]]) -> Path:
    """A COCO file of images by name, each with boxes as x, y, width, height."""
    images = [{"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH} for n, name in enumerate(boxes)]
    annotations = [
        {"image_id": n, "category_id": 1, "bbox": box} for n, of_image in enumerate(boxes.values()) for box in of_image
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path.write_text(json.dumps(content))  # NaN and Infinity are written as Python does
    return path


def test_boxes_are_kept_clipped_or_dropped_as_in_the_table_and_kept_ones_get_their_own_token(backbones, tmp_path):
    rng = np.random.default_rng(2)
    many = np.concatenate([rng.uniform(0, 90, (MANY, 2)), rng.uniform(2, 25, (MANY, 2))], axis=1).round(2)
    rows = table()
    boxes = {"odd.png": [given for given, _ in rows], "none.png": [], "many.png": many.tolist()}
    boxes["all_dropped.png"] = [[10, 20, 0, 0]]
    for name in boxes:
        noise = Image.fromarray(rng.integers(0, 256, (6, 10, 3), np.uint8))
        noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(tmp_path / name)

    manifest = read_dataset("coco", tmp_path, "train", annotations=annotation_file(tmp_path / "boxes.json", boxes))
    kept = [outcome for _, outcome in rows if isinstance(outcome, list)]
    assert manifest.region_count.tolist() == [len(kept), 0, MANY, 0]
    assert manifest.boxes_xyxy[manifest.regions(0)].tolist() == kept
    dropped = Counter(outcome for _, outcome in rows if isinstance(outcome, str))
    dropped["dropped_under_1_px"] += 1  # that of the last image
    for given, outcome in rows:
        if isinstance(outcome, list):
            x, y, width, height = given
            dropped["clipped"] += outcome != [x, y, x + width, y + height]
    dropped["repeated_boxes"] = len(kept) - len({tuple(box) for box in kept})
    assert manifest.report == dropped

    cache = open_or_create(tmp_path / "c.zarr", manifest, backbones.feature_sets(), 2)
    assert extract(cache, tmp_path, backbones).failed == 0
    assert cache.valid_rows().tolist() == [0, 1, 2, 3]
    batch, localizer = cache.read(np.arange(4)), backbones.localizer
    assert batch.region_mask.sum(axis=1).tolist() == [len(kept), 0, MANY, 0]
    corners = np.concatenate([many[:, :2], many[:, :2] + many[:, 2:]], axis=1)
    for row, expected, regions in [
        (0, np.array(kept), range(len(kept))),
        (2, corners, rng.choice(MANY, 15, replace=False)),
    ]:
        embedding = localizer.encode([localizer.preprocess(read_image(tmp_path / str(manifest.paths[row])))])[0]
        for region in regions:  # one at a time, so that it cannot be another box's token
            box = expected[region : region + 1].astype(np.float32)
            token = localizer.tokens_of_images(embedding[None], [box], [(HEIGHT, WIDTH)])[0].numpy()
            assert np.abs(batch.tokens[row, region] - token).max() <= 2e-3 * np.abs(token).max(), (row, region)
