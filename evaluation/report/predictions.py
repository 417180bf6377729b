"""Name the regions of many images, and write the results: JSON to a stream, labelled images into a folder.

An image that fails does not stop the others.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regionspot.cache.errors import ImageError, InputError
from regionspot.cache.outputs import check_output_file
from regionspot.cache.progress import Progress
from regionspot.evaluation.inference.regions import Regions
from regionspot.evaluation.report.drawing import labelled, save_image
from regionspot.pipeline.images.decode import read_image

log = logging.getLogger(__name__)

Form = Literal["regions", "coco"]


@dataclass(frozen=True)
class PredictionWriter:
    """Writes the regions of images as one JSON list.

    write         takes the text, piece by piece
    form          "regions": an object for each image, on a line of its own; "coco": an object for each region, COCO's
                  results format. Its image id is the file name without suffix, as a number if it is one
    with_masks    masks as COCO's compressed RLE
    category_ids  for "coco", of the names; None: their positions among the given names, from 1 on
    """

    write: Callable[[str], object]
    form: Form = "regions"
    with_masks: bool = False
    category_ids: Mapping[str, int] | None = None

    def single(self, image: Path, regions: Regions) -> None:
        """Write the regions of the only image, without its path."""
        results = regions.as_json(self.with_masks) if self.form == "regions" else self._coco(image, regions)
        self.write(json.dumps(results, indent=1, allow_nan=False) + "\n")

    def all(self, results: Iterator[tuple[Path, Image.Image, Regions]]) -> None:
        """Write the results as they come: what is written of a stopped run is complete but for the last bracket."""
        separator = "["
        for path, image, regions in results:
            for item in self._items(path, image, regions):
                self.write(f"{separator}\n{json.dumps(item, allow_nan=False)}")
                separator = ","
        self.write("[]\n" if separator == "[" else "\n]\n")

    def _items(self, path: Path, image: Image.Image, regions: Regions) -> list[dict[str, Any]]:
        if self.form == "coco":
            return self._coco(path, regions)
        size = {"width": image.width, "height": image.height}
        return [{"image": str(path), **size, "regions": regions.as_json(self.with_masks)}]

    def _coco(self, path: Path, regions: Regions) -> list[dict[str, Any]]:
        number = path.stem.isascii() and path.stem.isdigit()
        results = regions.to_coco(int(path.stem) if number else path.stem, self.category_ids)
        if not self.with_masks:
            for result in results:
                result.pop("segmentation", None)
        return results


@dataclass
class Predictions:
    """The results of images, one after the other; `failures` are messages about those that are left out.

    predict   names the regions of an image: its pixels, and its boxes float32 (n, 4) or None
    targets   a file for each labelled image; None: none are drawn
    """

    predict: Callable[[Image.Image, NDArray[np.float32] | None], Regions]
    images: Sequence[Path]
    boxes: Sequence[NDArray[np.float32] | None]
    targets: Sequence[Path] | None = None
    failures: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Path, Image.Image, Regions]]:
        progress = Progress(len(self.images), "images")
        for index, (path, boxes) in enumerate(zip(self.images, self.boxes, strict=True)):
            try:
                pixels = read_image(path, exif="apply")
                regions = self.predict(pixels, boxes)
                if self.targets is not None:
                    draw_into(self.targets[index], pixels, regions)
                yield path, pixels, regions
            except (ImageError, InputError) as error:
                message = str(error)
                self.failures.append(message if message.startswith(str(path)) else f"{path}: {message}")
            progress.step()


def labelled_paths(folder: Path, images: Sequence[Path]) -> list[Path]:
    """A path in `folder` for each labelled image: as among the images, from the folder that all of them share.

    A suffix other than .jpg and .png becomes .png. Raises InputError for one that would replace an image.
    """
    absolute = [Path(os.path.abspath(image)) for image in images]
    shared = Path(os.path.commonpath([path.parent for path in absolute]))
    targets = []
    for path in absolute:
        target = folder / path.relative_to(shared)
        kept = target.suffix.lower() in (".jpg", ".jpeg", ".png")
        targets.append(target if kept else target.with_name(f"{target.name}.png"))
    for target in targets:
        if target.exists():
            check_output_file(target, images)
    return targets


def draw_into(target: Path, pixels: Image.Image, regions: Regions) -> None:
    """Write the image with its regions. Raises InputError where that is not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    save_image(labelled(pixels, regions), target)
