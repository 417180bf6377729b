"""What is kept of a mask decoder: of each box the location token, and when asked for all that it says of the box.

The published method takes the first of the four mask tokens, that of the single mask. The other three stand for whole,
part and subpart, and the IoU token for how good each mask would be; all come out of the same pass.
"""

# B images, n boxes of an image, N boxes of all, C token width, g side of the embedding

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regionspot.cache.errors import unknown_name
from regionspot.pipeline.backbones.protocols import ALL, TOKENS
from regionspot.pipeline.backbones.sam_token_decoder import FIRST_MASK_TOKEN, IOU_TOKEN, MASK_TOKENS, TokenDecoder

TOKEN_SLOT = 0  # the single-mask output of the mask decoder's four; the paper's choice
EVERY_QUERY = [IOU_TOKEN, *range(FIRST_MASK_TOKEN, FIRST_MASK_TOKEN + MASK_TOKENS)]


class RegionTokens:
    """The token decoder of one SAM, and what of it is kept.

    name    of the feature set of location tokens
    sam     has `prompt_encoder` and `mask_decoder` as segment_anything's Sam has them
    tokens  one of models.TOKENS

    outputs  feature set to shape: the location token (C,); with "all" also `NAME_slots`, the four mask tokens one
             after another, (4 * C,), and `NAME_iou`, the IoU predicted of each of the four masks, (4,)

    Raises InputError for other `tokens`.
    """

    def __init__(self, name: str, sam: Any, tokens: str) -> None:
        if tokens not in TOKENS:
            raise unknown_name("tokens", tokens, TOKENS)
        self.decoder = TokenDecoder(sam)
        self.width: int = self.decoder.width
        self._name, self._iou_head = name, sam.mask_decoder.iou_prediction_head
        self.outputs: dict[str, tuple[int, ...]] = {name: (self.width,)}
        if tokens == ALL:
            self.outputs |= {f"{name}_slots": (MASK_TOKENS * self.width,), f"{name}_iou": (MASK_TOKENS,)}

    @torch.no_grad()
    def first(self, embeddings: Tensor, boxes: Sequence[Tensor]) -> list[Tensor]:
        """B tensors float32 (n, C): the location tokens.

        embeddings  (B, C, g, g)  of the image encoder
        boxes       float32 (n, 4) each, in pixels of its input
        """
        queries = self._queries(embeddings, boxes, [FIRST_MASK_TOKEN + TOKEN_SLOT])
        return list(torch.split(queries[:, 0], [len(each) for each in boxes]))

    @torch.no_grad()
    def kept(self, embeddings: Tensor, boxes: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """All that `outputs` names: of each image, float32 (n, *shape) by feature set."""
        if len(self.outputs) == 1:
            return [{self._name: tokens} for tokens in self.first(embeddings, boxes)]
        queries = self._queries(embeddings, boxes, EVERY_QUERY)
        slots = queries[:, FIRST_MASK_TOKEN:]
        found = (slots[:, TOKEN_SLOT], slots.flatten(1), self._iou_head(queries[:, IOU_TOKEN]))
        counts = [len(each) for each in boxes]
        images = zip(*(torch.split(values, counts) for values in found), strict=True)
        return [dict(zip(self.outputs, image, strict=True)) for image in images]

    def _queries(self, embeddings: Tensor, boxes: Sequence[Tensor], wanted: Sequence[int]) -> Tensor:
        """float32 (N, wanted, C). The boxes of all images go through the decoder together."""
        together = torch.cat(list(boxes))
        image = [row for row, each in enumerate(boxes) for _ in range(len(each))]
        decoded = self.decoder.decode(embeddings.to(together.device).float(), together, image, wanted)
        none = torch.zeros(0, len(wanted), self.width, device=together.device)
        return torch.cat([none, *(part.queries for part in decoded)])
