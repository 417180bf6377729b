"""Dense maps: each patch in the joint space of images and prompts, so that regions are named without training.

CLIP's last block gathers what its class token needs. Its plain output is poor for patches: a mean IoU of 14 over eight
segmentation sets, where the same weights with other attention in that block reach 38 (Wang et al. 2023, "SCLIP").
A dense map is the value path (Zhou et al. 2022, "Extract free dense labels from CLIP"): what the last block's attention
would read at each patch, without the block's mixing, residual and MLP, then the last layer norm and the projection.
The input of that block is at hand in the pass that computes the feature map.

SCLIP's and ClearCLIP's attention of queries to queries and keys to keys was measured in its place: it names 53 of 100
regions of the toy world by the mean in their boxes, the value path 68. It makes segmentation smoother, and the mean
over a region is smooth already. The two were not compared on released weights.
"""

# B images, P patches, D map width, E width of the joint space

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.format.schema import FLIP
from regionspot.pipeline.backbones.protocols import DenseEncoder, SemanticEncoder

DENSE = "_dense_map"  # ends the name of the feature set of dense maps


def dense_set(encoder: str) -> str:
    """The name of the feature set of an encoder's dense maps; those of mirrored images end in `.flip` too."""
    name = encoder.removesuffix(FLIP)
    return name + DENSE + encoder[len(name) :]


def require_dense(encoder: SemanticEncoder) -> DenseEncoder:
    """The encoder, if it computes dense maps. Raises InputError if it does not."""
    if isinstance(encoder, DenseEncoder) and encoder.dense_shape is not None:
        return encoder
    raise InputError(
        f"encoder {encoder.name}: has no dense map, which takes a vision transformer that projects each token alone, "
        "such as CLIP's; leave out --map dense, or use --baseline crop"
    )


def dense_provenance(encoder: SemanticEncoder) -> dict[str, Any]:
    """What the provenance of dense maps has beside that of the encoder; with the logit scale, no CLIP is needed."""
    return {"output": "dense map", "class_token": False, "logit_scale": require_dense(encoder).logit_scale}


def dense_path(visual: Any) -> Callable[[Tensor], Tensor] | None:
    """From patches (B, P, D), as they enter the last block of an open_clip image tower, to their dense map (B, P, E).

    None for towers without one: convolutions, those that pool by attention (SigLIP, CoCa, PE), those of one block, and
    blocks of unusual kinds.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
    from timm.models.eva import Eva, EvaBlock
    from timm.models.vision_transformer import Block
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    trunk = getattr(visual, "trunk", visual)
    if not isinstance(trunk, VisionTransformer | TimmTransformer | Eva) or trunk.attn_pool is not None:
        return None
    *before, block = trunk.transformer.resblocks if isinstance(trunk, VisionTransformer) else trunk.blocks
    if not before or not isinstance(block, ResidualAttentionBlock | Block | EvaBlock):
        return None

    def dense(patches: Tensor) -> Tensor:
        if isinstance(block, ResidualAttentionBlock):
            values = block.ls_1(block.attention(block.ln_1(patches), attn_mask=_itself_only(patches)))
            projected: Tensor = visual.ln_post(values) @ visual.proj
            return projected
        values = block.attn(block.norm1(patches), attn_mask=_itself_only(patches))
        if isinstance(block, Block):
            values = block.ls1(values)
        elif block.gamma_1 is not None:
            values = values * block.gamma_1
        projected = visual.head(trunk.head(trunk.fc_norm(trunk.norm(values))))
        return projected

    return dense


def _itself_only(patches: Tensor) -> Tensor:
    """(P, P), added to attention's logits: each patch attends to itself, so it gets its own value.

    This way any class of attention computes its value path, with its own biases, inner norms and gates.
    """
    count = patches.shape[1]
    mask = torch.full((count, count), -torch.inf, dtype=patches.dtype, device=patches.device)
    return mask.fill_diagonal_(0)
