"""Convert an image to the input tensors of SAM and CLIP, by one of two presets.

direct      resized directly to SAM's longer side and to CLIP's square, both antialiased, as the models' authors do;
            the sharpest result at these input sizes
reference   as the authors of RegionSpot do: first resized to detectron2's size (shorter edge 800, longer at most 1333,
            in 8 bits), then to SAM's and CLIP's input, CLIP's without antialiasing

SAM's input keeps the aspect ratio and is resized by PIL's bilinear filter; CLIP's is a square, aspect ratio not kept,
resized by torch's bilinear filter on floats. The filters differ by more than rounding. The preset is part of a model's
provenance, and features of different presets are not comparable.
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

# Written into the provenance: a cache accepts features of one resize rule only.
SAM_RESIZE = "PIL bilinear, long side {pixels}, sizes int(x + 0.5), zero padding at right and bottom"
CLIP_RESIZE = "{filter} bilinear on floats to {pixels} x {pixels}, aspect not kept"
FIRST_RESIZE = "PIL bilinear, shorter edge {shorter}, longer at most {longer}, sizes int(x + 0.5); then "

# Larger images are resized in width strip by strip: as floats, an image 30,000 pixels wide would take gigabytes.
STRIP_PIXELS = 2**21

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Preprocess:
    """One preset. Use `get_preprocess`.

    first_edges   (shorter, longer) edge to which an image is resized first, for both encoders; None: no first resize
    antialiased   whether CLIP's input is antialiased
    """

    name: str
    first_edges: tuple[int, int] | None
    antialiased: bool

    def first_size(self, original_size: Size) -> Size:
        """(height, width) after the first resize, by the rule of detectron2's ResizeShortestEdge.

        The shorter edge is resized to the first number; if the longer edge then exceeds the second, both shrink.
        """
        if self.first_edges is None:
            return original_size
        shorter, longer = self.first_edges
        scale = shorter / min(original_size)
        # In detectron2's order of operations: another order changes some sizes by one pixel.
        edges = [shorter if edge == min(original_size) else scale * edge for edge in original_size]
        if max(edges) > longer:
            shrink = longer / max(edges)
            edges = [edge * shrink for edge in edges]
        return _rounded(edges[0]), _rounded(edges[1])

    def sam_size(self, original_size: Size, long_side: int) -> Size:
        """(height, width) with the longer side at `long_side` pixels, rounded half up as in SAM."""
        first = self.first_size(original_size)
        scale = long_side / max(first)
        return _rounded(first[0] * scale), _rounded(first[1] * scale)

    def sam_input(self, image: Image.Image, long_side: int) -> Tensor:
        """uint8 (3, h, w): the image with its longer side at `long_side` pixels, neither normalised nor padded."""
        height, width = self.sam_size((image.height, image.width), long_side)
        resized = self._first_resize(image).resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def scale_boxes(self, boxes_xyxy: NDArray[np.float32], original_size: Size, long_side: int) -> NDArray[np.float32]:
        """Scale boxes, float32 (n, 4), from pixels of the original to pixels of `sam_input`'s result.

        Each resize multiplies in float64 and rounds to float32, as the authors' code and segment_anything's
        ResizeLongestSide.apply_boxes do.
        """
        first = self.first_size(original_size)
        if first != original_size:
            boxes_xyxy = _scaled(boxes_xyxy, original_size, first)
        return _scaled(boxes_xyxy, first, self.sam_size(original_size, long_side))

    def clip_input(self, image: Image.Image, pixels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """float32 (3, p, p): the whole image resized to a square, normalised per channel."""
        image = self._first_resize(image)
        rows = max(STRIP_PIXELS // image.width, 1)
        if rows >= image.height:
            values = _floats(image)
        else:
            strips = (
                image.crop((0, top, image.width, min(top + rows, image.height))) for top in range(0, image.height, rows)
            )
            # Bit-identical to resizing in one piece: the filter is separable, horizontal first.
            values = torch.cat([self._resize(_floats(strip), strip.height, pixels) for strip in strips], dim=1)
        square = self._resize(values, pixels, pixels)
        return square.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))

    def _resize(self, values: Tensor, height: int, width: int) -> Tensor:
        resized: Tensor = transforms.resize(values, [height, width], antialias=self.antialiased)
        return resized

    def sam_provenance(self, long_side: int) -> dict[str, Any]:
        """The input fields of a localizer's provenance."""
        return {"preprocess": self.name, "resize": self._first_rule() + SAM_RESIZE.format(pixels=long_side)}

    def clip_provenance(self, pixels: int) -> dict[str, Any]:
        """The input fields of an encoder's provenance."""
        antialiased = "antialiased" if self.antialiased else "not antialiased"
        resize = self._first_rule() + CLIP_RESIZE.format(filter=antialiased, pixels=pixels)
        return {"preprocess": self.name, "resize": resize}

    def _first_resize(self, image: Image.Image) -> Image.Image:
        image = image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy an RGB image
        height, width = self.first_size((image.height, image.width))
        return image if self.first_edges is None else image.resize((width, height), Image.Resampling.BILINEAR)

    def _first_rule(self) -> str:
        if self.first_edges is None:
            return ""
        return FIRST_RESIZE.format(shorter=self.first_edges[0], longer=self.first_edges[1])


PREPROCESS = {
    "direct": Preprocess("direct", first_edges=None, antialiased=True),
    # detectron2's defaults of INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, which RegionSpot's configurations do not change.
    # Its CLIP input is resized by torchvision on a tensor, which was not antialiased before version 0.17.
    "reference": Preprocess("reference", first_edges=(800, 1333), antialiased=False),
}


def get_preprocess(name: str) -> Preprocess:
    """The preset of that name. Raises InputError for an unknown one."""
    if name not in PREPROCESS:
        raise unknown_name("preprocess", name, PREPROCESS)
    return PREPROCESS[name]


def _floats(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def _rounded(edge: float) -> int:
    # At least 1: the short side of a very narrow image would round to 0.
    return max(int(edge + 0.5), 1)


def _scaled(boxes_xyxy: NDArray[np.float32], from_size: Size, to_size: Size) -> NDArray[np.float32]:
    x, y = to_size[1] / from_size[1], to_size[0] / from_size[0]
    return (np.asarray(boxes_xyxy, np.float64).reshape(-1, 4) * [x, y, x, y]).astype(np.float32)
