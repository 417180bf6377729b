"""The named regions of one image, and their forms for other programs: JSON, COCO results, supervision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from regionspot.cache.errors import InputError

if TYPE_CHECKING:
    import supervision

UNKNOWN = "unknown"  # the name of a region that no given name fits


@dataclass(frozen=True)
class Region:
    """One region and its name.

    box_xyxy    x1, y1, x2, y2 in pixels of the image
    name        the most probable of the given names, or UNKNOWN
    score       softmax probability of the most probable name among the given ones
    scores      the most probable names with their probabilities, best first
    similarity  cosine of the region's embedding and that of the most probable name, -1 to 1; does not depend on the
                other names
    embedding   float32 (E,) of unit length, in the space of the text embeddings
    rle         the mask, run-length encoded as by pycocotools: {"size": [h, w], "counts": bytes}; None if no masks were
                requested or the localizer cannot make any
    """

    box_xyxy: tuple[float, float, float, float]
    name: str
    score: float
    scores: tuple[tuple[str, float], ...]
    similarity: float
    embedding: NDArray[np.float32] = field(compare=False, repr=False)
    rle: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """bool (h, w), decoded anew at each access: a hundred masks of a large image do not fit into memory."""
        return None if self.rle is None else np.asarray(coco_mask.decode(self.rle), np.bool_)

    def as_json(self, with_mask: bool = False) -> dict[str, Any]:
        """All fields except the embedding, as JSON-able values. With its mask: "mask", COCO's compressed RLE."""
        scores = [{"name": name, "score": score} for name, score in self.scores]
        values = {
            "box": list(self.box_xyxy),
            "name": self.name,
            "score": self.score,
            "similarity": self.similarity,
            "scores": scores,
        }
        return {**values, "mask": self._ascii_rle()} if with_mask else values

    def _ascii_rle(self) -> dict[str, Any] | None:
        return None if self.rle is None else {**self.rle, "counts": self.rle["counts"].decode("ascii")}


class Regions(list[Region]):
    """The regions of one image in the order of the boxes, points or masks, with the candidate names."""

    def __init__(self, regions: Iterable[Region], names: Sequence[str]) -> None:
        super().__init__(regions)
        self.names = tuple(names)

    def as_json(self, with_masks: bool = False) -> list[dict[str, Any]]:
        """One JSON-able object for each region."""
        return [region.as_json(with_masks) for region in self]

    def to_coco(self, image_id: int | str, category_ids: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """COCO's results format, one JSON-able object for each region that has a name.

        image_id      of the image in the annotations
        category_ids  of the names; default: their positions among the given names, from 1 on

        Raises InputError for a name without an id.
        """
        ids = category_ids or {name: number for number, name in enumerate(self.names, start=1)}
        results = []
        for region in self:
            if region.name == UNKNOWN:
                continue
            if region.name not in ids:
                raise InputError(f"name {region.name!r}: has no category id; category_ids has {len(ids)} other names")
            x1, y1, x2, y2 = region.box_xyxy
            result = {"image_id": image_id, "category_id": ids[region.name], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            mask = {} if region.rle is None else {"segmentation": region._ascii_rle()}
            results.append({**result, "score": region.score, **mask})
        return results

    def to_supervision(self) -> supervision.Detections:
        """supervision's Detections. `class_id` is the position of the name among the given ones, -1 for UNKNOWN.

        `data` has "class_name", which supervision's annotators print, and "embedding", float32 (n, E). Raises
        InputError if the package is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise InputError(
                "to_supervision needs the package supervision; pip install 'regionspot[supervision]'"
            ) from None
        if not self:
            return supervision.Detections.empty()
        class_ids = {name: number for number, name in enumerate(self.names)}
        masks = [mask for region in self if (mask := region.mask) is not None]
        return supervision.Detections(
            xyxy=np.array([region.box_xyxy for region in self], np.float32),
            mask=np.stack(masks) if masks else None,
            confidence=np.array([region.score for region in self], np.float32),
            class_id=np.array([class_ids.get(region.name, -1) for region in self]),
            data={
                "class_name": np.array([region.name for region in self]),
                "embedding": np.stack([region.embedding for region in self]),
            },
        )
