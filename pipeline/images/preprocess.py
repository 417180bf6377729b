"""From an image to what each image encoder takes, by one of two named presets.

direct      the image straight to SAM's longer side and to CLIP's square, both antialiased: what the models' own
            authors do, and the sharpest that their input sizes allow
reference   what the authors of RegionSpot do: the image is first brought to detectron2's size (shorter edge 800,
            longer at most 1333, in 8 bits), and SAM and CLIP both start from that; CLIP without antialiasing

SAM keeps the aspect and resizes by PIL's bilinear filter; CLIP gets a square, aspect not kept, by torch's bilinear
filter on floats. The two differ by more than rounding, so each keeps its own. The preset is part of a model's
provenance: features of different presets are features of different images.
"""

# h, w pixels of the resized image, n boxes, p pixels of CLIP's square

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from regionspot.cache.errors import unknown_name

# As stated in provenance; a cache made by another rule is another cache.
SAM_RESIZE = "PIL bilinear, long side {pixels}, sizes int(x + 0.5), zero padding at right and bottom"
CLIP_RESIZE = "{filter} bilinear on floats to {pixels} x {pixels}, aspect not kept"
FIRST_RESIZE = "PIL bilinear, shorter edge {shorter}, longer at most {longer}, sizes int(x + 0.5); then "

# An image of more is made narrow strip by strip. As floats in one piece, one 30,000 pixels wide would take gigabytes.
STRIP_PIXELS = 2**21

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Preprocess:
    """A rule from images to inputs. Made by `preprocess_named`.

    name          the preset's name
    first_edges   (shorter, longer): the size that an image is brought to before either encoder's; None: none
    antialiased   whether CLIP's square is filtered against aliasing
    """

    name: str
    first_edges: tuple[int, int] | None
    antialiased: bool

    def first_size(self, original_size: Size) -> Size:
        """(height, width) of the image that both encoders start from, by the rule of detectron2's ResizeShortestEdge.

        The shorter edge becomes the first number; where the longer would then exceed the second, both shrink again.
        """
        if self.first_edges is None:
            return original_size
        shorter, longer = self.first_edges
        scale = shorter / min(original_size)
        # In its order of operations: another one rounds some sizes to one pixel more or less.
        edges = [shorter if edge == min(original_size) else scale * edge for edge in original_size]
        if max(edges) > longer:
            shrink = longer / max(edges)
            edges = [edge * shrink for edge in edges]
        return _rounded(edges[0]), _rounded(edges[1])

    def sam_size(self, original_size: Size, long_side: int) -> Size:
        """(height, width) of `sam_input`'s image."""
        return sam_size(self.first_size(original_size), long_side)

    def sam_input(self, image: Image.Image, long_side: int) -> Tensor:
        """uint8 (3, h, w): the image with its longer side at `long_side` pixels, neither normalised nor padded."""
        return sam_input(self._first(image), long_side)

    def scale_boxes(self, boxes_xyxy: NDArray[np.float32], original_size: Size, long_side: int) -> NDArray[np.float32]:
        """Boxes in pixels of the original, float32 (n, 4), in pixels of `sam_input`'s image.

        By each step's own ratio, rounded to float32 after each, as the authors' annotations and prompts are.
        """
        first = self.first_size(original_size)
        if first != original_size:
            boxes_xyxy = _scaled(boxes_xyxy, original_size, first)
        return scale_boxes(boxes_xyxy, first, long_side)

    def clip_input(self, image: Image.Image, pixels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """float32 (3, p, p): the whole image squeezed into a square, normalised channel by channel."""
        return clip_input(self._first(image), pixels, mean, std, self.antialiased)

    def sam_provenance(self, long_side: int) -> dict[str, Any]:
        """What a localizer's provenance says of its input."""
        return {"preprocess": self.name, "resize": self._first_words() + SAM_RESIZE.format(pixels=long_side)}

    def clip_provenance(self, pixels: int) -> dict[str, Any]:
        """What an encoder's provenance says of its input."""
        filtered = "antialiased" if self.antialiased else "not antialiased"
        return {
            "preprocess": self.name,
            "resize": self._first_words() + CLIP_RESIZE.format(filter=filtered, pixels=pixels),
        }

    def _first(self, image: Image.Image) -> Image.Image:
        if self.first_edges is None:
            return image
        height, width = self.first_size((image.height, image.width))
        return _rgb(image).resize((width, height), Image.Resampling.BILINEAR)

    def _first_words(self) -> str:
        if self.first_edges is None:
            return ""
        return FIRST_RESIZE.format(shorter=self.first_edges[0], longer=self.first_edges[1])


PREPROCESS = {
    "direct": Preprocess("direct", first_edges=None, antialiased=True),
    # detectron2's defaults of INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, which RegionSpot's configurations leave as they
    # are; its CLIP input goes through torchvision's resize of a tensor, which before 0.17 was not antialiased.
    "reference": Preprocess("reference", first_edges=(800, 1333), antialiased=False),
}


def preprocess_named(name: str) -> Preprocess:
    """Raises InputError for a name that is none of PREPROCESS."""
    if name not in PREPROCESS:
        raise unknown_name("preprocess", name, PREPROCESS)
    return PREPROCESS[name]


def sam_size(original_size: Size, long_side: int) -> Size:
    """(height, width) after resizing so that the longer side has `long_side` pixels, rounded half up as SAM does."""
    scale = long_side / max(original_size)
    return _rounded(original_size[0] * scale), _rounded(original_size[1] * scale)


def sam_input(image: Image.Image, long_side: int) -> Tensor:
    """uint8 (3, h, w): the image with its longer side at `long_side` pixels, neither normalised nor padded."""
    height, width = sam_size((image.height, image.width), long_side)
    resized = _rgb(image).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def scale_boxes(boxes_xyxy: NDArray[np.float32], original_size: Size, long_side: int) -> NDArray[np.float32]:
    """Boxes in pixels of the original, float32 (n, 4), in pixels of `sam_input`'s values.

    Multiplied in float64 and then rounded, as segment_anything's ResizeLongestSide.apply_boxes does.
    """
    return _scaled(boxes_xyxy, original_size, sam_size(original_size, long_side))


def clip_input(
    image: Image.Image, pixels: int, mean: tuple[float, ...], std: tuple[float, ...], antialiased: bool = True
) -> Tensor:
    """float32 (3, p, p): the whole image squeezed into a square, normalised channel by channel."""
    rows = max(STRIP_PIXELS // image.width, 1)
    if rows >= image.height:
        values = _floats(image)
    else:
        strips = (
            image.crop((0, top, image.width, min(top + rows, image.height))) for top in range(0, image.height, rows)
        )
        # The filter is separable and its horizontal pass comes first: the same bits as in one piece.
        narrow = [transforms.resize(_floats(each), [each.height, pixels], antialias=antialiased) for each in strips]
        values = torch.cat(narrow, dim=1)
    square: Tensor = transforms.resize(values, [pixels, pixels], antialias=antialiased)
    return square.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


def _floats(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1).float().div_(255)


def _rgb(image: Image.Image) -> Image.Image:
    """Itself where it is RGB; `convert` would copy it."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _rounded(edge: float) -> int:
    # A sliver of an image would round to no pixels at all.
    return max(int(edge + 0.5), 1)


def _scaled(boxes_xyxy: NDArray[np.float32], from_size: Size, to_size: Size) -> NDArray[np.float32]:
    x, y = to_size[1] / from_size[1], to_size[0] / from_size[0]
    return (np.asarray(boxes_xyxy, np.float64).reshape(-1, 4) * [x, y, x, y]).astype(np.float32)
