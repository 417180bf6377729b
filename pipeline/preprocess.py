"""From a photo to what each image encoder takes, exactly as the authors of the models do it.

SAM keeps the aspect and resizes by PIL's bilinear filter; CLIP gets a square, aspect not kept, by torchvision's
antialiased bilinear filter on floats. The two differ by more than rounding, so each keeps its own.
"""

# h, w pixels of the resized picture, n boxes, p pixels of CLIP's square

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

# As stated in provenance; a cache made by another rule is another cache.
SAM_RESIZE = "PIL bilinear, long side {pixels}, sizes int(x + 0.5), zero padding at right and bottom"
CLIP_RESIZE = "antialiased bilinear on floats to {pixels} x {pixels}, aspect not kept"


def sam_size(original_size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """(height, width) after resizing so that the longer side has `long_side` pixels, rounded half up as SAM does."""
    scale = long_side / max(original_size)
    # A sliver of a picture would round to no pixels at all.
    return max(int(original_size[0] * scale + 0.5), 1), max(int(original_size[1] * scale + 0.5), 1)


def sam_input(photo: Image.Image, long_side: int) -> Tensor:
    """uint8 (3, h, w): the photo with its longer side at `long_side` pixels, neither normalised nor padded."""
    height, width = sam_size((photo.height, photo.width), long_side)
    resized = photo.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def scale_boxes(boxes_xyxy: NDArray[np.float32], original_size: tuple[int, int], long_side: int) -> NDArray[np.float32]:
    """Boxes in pixels of the original, float32 (n, 4), in pixels of `sam_input`'s picture.

    Multiplied in float64 and then rounded, as segment_anything's ResizeLongestSide.apply_boxes does.
    """
    height, width = sam_size(original_size, long_side)
    x, y = width / original_size[1], height / original_size[0]
    return (np.asarray(boxes_xyxy, np.float64).reshape(-1, 4) * [x, y, x, y]).astype(np.float32)


def clip_input(photo: Image.Image, pixels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """float32 (3, p, p): the whole photo squeezed into a square, normalised channel by channel."""
    picture = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1).float().div_(255)
    square: Tensor = transforms.resize(picture, [pixels, pixels], antialias=True)
    return square.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))
