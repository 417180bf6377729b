"""What a dtype of the image encoders costs: tokens and maps against those of float32, by the trained toy backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.goals import Report
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.images.decode import read_image
from regionspot.pipeline.toy.world import make_toy_world

TABLE = "Error of a dtype against float32, trained toy backbones (values have rms 1)"
WORLD = 40  # images: the fewest that it can be made of
HALF = ("bfloat16", "float16")


def measure_errors(report: Report, folder: Path, count: int) -> None:
    """A row of the tokens and one of the maps for each dtype but float32. The token decoder is float32 always."""
    world = make_toy_world(folder, WORLD, seed=0)
    manifest = read_dataset("toy", world, "train").head(count)
    images = [read_image(image_folder_of("toy", world) / str(path)) for path in manifest.paths]
    boxes = [manifest.boxes_xyxy[manifest.regions(row)] for row in range(len(images))]
    for title, features in (("location tokens", _tokens), ("feature maps", _maps)):
        exact = features(images, boxes, "float32")
        for dtype in HALF:
            rms, largest = error_of(features(images, boxes, dtype), exact)
            report.add_row(TABLE, of=title, **{"image encoder": dtype}, rms=rms, largest=largest)


def error_of(found: NDArray[np.float32], exact: NDArray[np.float32]) -> tuple[float, float]:
    """Root mean square and largest difference, in root mean squares of the exact values."""
    scale, off = np.sqrt((exact**2).mean()), found - exact
    return float(np.sqrt((off**2).mean()) / scale), float(np.abs(off).max() / scale)


def _tokens(images: list[Any], boxes: list[NDArray[np.float32]], dtype: str) -> NDArray[np.float32]:
    localizer = load_localizer("toy_sam", None, "cpu", dtype)
    embeddings = localizer.encode([localizer.preprocess(image) for image in images])
    sizes = [(image.height, image.width) for image in images]
    return torch.cat(localizer.tokens_of_images(embeddings, boxes, sizes)).numpy()


def _maps(images: list[Any], boxes: list[NDArray[np.float32]], dtype: str) -> NDArray[np.float32]:
    encoder = load_encoder("toy_clip", None, "cpu", dtype)
    return encoder.encode(torch.stack([encoder.preprocess(image) for image in images])).numpy()
