"""MobileSAM's image encoder: the TinyViT with 5 million weights, at 1024 pixels, with SAM's neck.

MobileSAM's own package is not on PyPI; timm, which open_clip depends on, has the TinyViT. MobileSAM changed two things
(mobile_sam/modeling/tiny_vit_sam.py, Zhang et al. 2023): the last stage does not reduce its grid of 64 x 64 cells, and
a neck replaces the classifier. Prompt encoder and mask decoder are SAM's.
"""

from __future__ import annotations

import re
from typing import Any

from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn

from regionspot.pipeline.backbones.state_dicts import StateDict

PIXELS = 1024
# tiny_vit_5m_224 (Wu et al. 2022, table 1), windows as in mobile_sam/build_sam.py.
WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)

# From the names in mobile_sam.pt, after `image_encoder.`, to timm's.
RENAMED = (
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"\.c\.weight$", ".conv.weight"),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
)
# The classifier, and a table that is computed from the window sizes.
UNUSED = re.compile(r"^(norm_head|head)\.|attention_bias_idxs$")


class TinyVitEncoder(nn.Module):
    """float32 (B, 3, 1024, 1024), normalised and padded as for SAM, to (B, width, 64, 64)."""

    img_size = PIXELS

    def __init__(self, width: int = 256) -> None:
        # Slow to import, and needed for this model only.
        from segment_anything.modeling.common import LayerNorm2d

        super().__init__()
        vit: Any = TinyVit(
            num_classes=0,
            embed_dims=WIDTHS,
            depths=DEPTHS,
            num_heads=HEADS,
            window_sizes=WINDOWS,
            drop_path_rate=0.0,
        )
        vit.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.patch_embed, self.stages = vit.patch_embed, vit.stages
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], width, 1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            LayerNorm2d(width),
        )

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.neck(self.stages(self.patch_embed(images)))
        return embedding


def convert_mobile_sam(weights: StateDict) -> StateDict:
    """Convert the content of mobile_sam.pt to the state dict of a Sam with this encoder. Other files are unchanged."""
    converted = {}
    for name, tensor in weights.items():
        encoder_name = name.removeprefix("image_encoder.")
        if encoder_name == name:
            converted[name] = tensor
        elif not UNUSED.search(encoder_name):
            converted[f"image_encoder.{_timm_name(encoder_name)}"] = tensor
    return converted


def _timm_name(name: str) -> str:
    # MobileSAM's layers end with the downsampling, timm's stages start with it.
    downsample = re.match(r"^layers\.(\d+)\.downsample\.", name)
    if downsample:
        name = f"stages.{int(downsample[1]) + 1}.downsample.{name[downsample.end() :]}"
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
