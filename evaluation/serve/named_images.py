"""The images that visitors of the page have opened, their regions, and the embeddings of the names that they typed.

An image is encoded once and a region once. Names are compared with the stored vectors of the regions, so that a new
name costs one batch of prompts and no image.
"""

# n regions, V names, E text embedding, h, w pixels

from __future__ import annotations

import base64
import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from regionspot.cache.errors import InputError
from regionspot.evaluation.inference.boxes import check_boxes
from regionspot.evaluation.inference.encoded_image import EncodedImage
from regionspot.evaluation.inference.naming import name_regions
from regionspot.evaluation.inference.prompts import boxes_of_points
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.inference.regions import Region
from regionspot.evaluation.inference.scoring import encode_masks
from regionspot.fusion.vocabulary import TextEncoder, Vocabulary, embed_texts
from regionspot.pipeline.backbones.protocols import MaskingLocalizer, PointLocalizer
from regionspot.pipeline.images.image_header import read_header

KEPT_IMAGES = 24  # of all visitors; a photo of 12 megapixels takes 40 MB with what SAM and CLIP compute of it
KEPT_NAMES = 4096
MAX_PIXELS = 40_000_000
MAX_REGIONS, MAX_PROPOSED = 300, 100  # of an image; of them, proposed by SAM at a time
MAX_NAMES, MAX_NAME_LENGTH = 300, 200
VIEW_SIDE = 1600  # pixels of the longer side of what the page shows
TOP = 5  # names listed for a region


class NameEmbeddings:
    """Embeddings of names, kept for the most recent ones. Thread-safe."""

    def __init__(self, encoder: TextEncoder, templates: Sequence[str]) -> None:
        self.encoder, self.templates = encoder, tuple(templates)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, names: Sequence[str]) -> Tensor:
        """float32 (V, E), of unit length. New names are encoded in one batch.

        Raises InputError for a name that the encoder cannot read.
        """
        with self._lock:
            new = [name for name in dict.fromkeys(names) if name not in self._kept]
            if new:
                embedded = F.normalize(embed_texts(new, self.templates, self.encoder), dim=-1)
                self._kept.update(zip(new, embedded, strict=True))
            for name in names:
                self._kept.move_to_end(name)
            result = torch.stack([self._kept[name] for name in names])
            while len(self._kept) > KEPT_NAMES:
                self._kept.popitem(last=False)
        return result

    def readable(self, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The names that the encoder can read, and the reason for each of the others."""
        try:
            if names:
                self.get(names)
            return list(names), {}
        except InputError as error:
            if len(names) == 1:
                return [], {names[0]: str(error)}
        halves = [self.readable(part) for part in (names[: len(names) // 2], names[len(names) // 2 :])]
        return halves[0][0] + halves[1][0], halves[0][1] | halves[1][1]


@dataclass
class OpenedImage:
    """An image and its regions so far: box (4,), vector (E,) of unit length and mask as RLE, or None, of each.

    `regions` is replaced, never changed: `name` reads it while others are added.
    """

    encoded: EncodedImage
    regions: tuple[tuple[list[float], Tensor, dict[str, Any] | None], ...] = ()


class NamedImages:
    """Everything that the first tab does. Thread-safe: the models serve one visitor at a time."""

    def __init__(self, spot: RegionSpot) -> None:
        self.spot, self.names = spot, NameEmbeddings(spot.encoder, spot.templates)
        self._images: OrderedDict[str, OpenedImage] = OrderedDict()
        self._models, self._kept = threading.Lock(), threading.Lock()

    def open(self, content: bytes) -> dict[str, Any]:
        """Read and encode an image. Returns its id and size.

        Raises ImageError for an image that cannot be read, InputError for one with more than MAX_PIXELS pixels.
        """
        _check_pixels(content)
        with self._models, torch.inference_mode():
            encoded = self.spot.encode(content)
        key = secrets.token_urlsafe(16)
        with self._kept:
            self._images[key] = OpenedImage(encoded)
            while len(self._images) > KEPT_IMAGES:
                self._images.popitem(last=False)
        return {"image": key, "width": encoded.image.width, "height": encoded.image.height}

    def view(self, key: str) -> bytes:
        """The upright image as JPEG, at most VIEW_SIDE pixels long. Raises KeyError for an image that is not kept."""
        return jpeg(self._get(key).encoded.image, VIEW_SIDE)

    def add_regions(self, key: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Add the regions of `boxes` (n, 4), of `points` (n, 2), or the best that SAM proposes.

        Returns number, box and mask of each. Raises KeyError for an image that is not kept, InputError for boxes or
        points that do not fit the image, and for more than MAX_REGIONS regions.
        """
        opened = self._get(key)
        encoded, localizer = opened.encoded, self.spot.localizer
        with self._models, torch.inference_mode():
            boxes = self._boxes(encoded, request)
            first = len(opened.regions)
            if first + len(boxes) > MAX_REGIONS:
                raise InputError(f"an image has at most {MAX_REGIONS} regions here; open it again to start over")
            if not len(boxes):
                return []
            vectors = self.spot.embed(encoded, boxes).cpu()
            if not torch.isfinite(vectors).all():
                raise InputError("the features of this image are not finite; start the page with --dtype float32")
            rles: list[dict[str, Any] | None] = [None] * len(boxes)
            if isinstance(localizer, MaskingLocalizer):
                every = np.arange(len(boxes))
                masks = encode_masks(localizer, encoded.embedding, boxes, encoded.size, every)
                rles = [masks[region] for region in every.tolist()]
            opened.regions += tuple(zip(boxes.tolist(), vectors, rles, strict=True))
        return [
            {"number": number, "box": box, "mask": _mask_png(rle)}
            for number, (box, _, rle) in enumerate(opened.regions[first : first + len(boxes)], start=first)
        ]

    def name(self, key: str, names: Any) -> dict[str, Any]:
        """The best of `names` for every region of an image, and the names that the encoder cannot read.

        Raises KeyError for an image that is not kept, InputError for names that are not texts, too many or too long.
        """
        of_image = self._get(key).regions
        readable, unreadable = self.names.readable(_checked_names(names))
        regions: list[Region] = []
        if readable and of_image:
            boxes, vectors, rles = zip(*of_image, strict=True)
            vocabulary = Vocabulary(tuple(readable), self.names.templates, self.names.get(readable), "")
            regions = name_regions(torch.stack(vectors), boxes, rles, vocabulary, self.spot.logit_scale, TOP, None)
        return {"regions": [region.as_json() for region in regions], "unreadable": unreadable}

    def _boxes(self, encoded: EncodedImage, request: dict[str, Any]) -> NDArray[np.float32]:
        localizer = self.spot.localizer
        if "boxes" in request:
            return check_boxes(request["boxes"], encoded.size)
        if not isinstance(localizer, PointLocalizer):
            raise InputError(f"{localizer.name} finds no regions by itself; draw a box")
        if "points" in request:
            points = request["points"]
            if not isinstance(points, list) or len(points) > MAX_REGIONS:
                raise InputError("points: expected a list of [x, y]")
            return boxes_of_points(points, localizer, encoded.embedding, encoded.size)
        return localizer.propose_boxes(encoded.embedding, encoded.size)[:MAX_PROPOSED]

    def _get(self, key: str) -> OpenedImage:
        with self._kept:
            self._images.move_to_end(key)
            return self._images[key]


def jpeg(image: Image.Image, side: int) -> bytes:
    """A JPEG file of the image, reduced to `side` pixels on its longer side if it is larger."""
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=90)
    return content.getvalue()


def _check_pixels(content: bytes) -> None:
    """Raises InputError for too many pixels, by the header; whatever else is wrong is found when the image is read."""
    try:
        with read_header(io.BytesIO(content)) as stored:
            width, height = stored.size
    except Exception:  # Pillow raises any exception on damaged files
        return
    if width * height > MAX_PIXELS:
        raise InputError(f"the image has {width:,} x {height:,} pixels, at most {MAX_PIXELS:,} are allowed here")


def _checked_names(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("names: expected a list of texts")
    cleaned = list(dict.fromkeys(" ".join(name.split()) for name in names if name.strip()))
    if len(cleaned) > MAX_NAMES:
        raise InputError(f"names: {len(cleaned)}, at most {MAX_NAMES} are allowed here")
    if longest := next((name for name in cleaned if len(name) > MAX_NAME_LENGTH), None):
        raise InputError(f"names: {longest[:30]!r}... is longer than {MAX_NAME_LENGTH} characters")
    return cleaned


def _mask_png(rle: dict[str, Any] | None) -> dict[str, Any] | None:
    """The part of a mask with pixels: its position and size x, y, w, h in the image, and a PNG file, white where the
    mask is and transparent elsewhere."""
    if rle is None:
        return None
    from pycocotools import mask as coco_mask

    bits = np.asarray(coco_mask.decode(rle), np.uint8)
    rows, columns = np.flatnonzero(bits.any(axis=1)), np.flatnonzero(bits.any(axis=0))
    if not len(rows):
        return None
    top, left, height, width = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    alpha = Image.fromarray(bits[top : top + height, left : left + width] * 255)
    content = io.BytesIO()
    Image.merge("LA", (Image.new("L", alpha.size, 255), alpha)).save(content, "PNG")
    position = [int(value) for value in (left, top, width, height)]
    return {"box": position, "png": base64.b64encode(content.getvalue()).decode("ascii")}
