"""Fitting the head of type "prototypes": one pass over the caches instead of training steps.

B images, R regions (padded), T map tokens, D width, V classes of all caches together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from regionspot.cache.progress import Progress
from regionspot.fusion.heads.prototypes import PrototypeHead, PrototypeSums
from regionspot.fusion.heads.spec import HeadSpec
from regionspot.fusion.training.batches import DeviceDecoder
from regionspot.fusion.training.training_sets import TrainingSet
from regionspot.fusion.vocabulary import Vocabulary

BATCH = 64


def fit_prototypes(
    training_sets: Sequence[TrainingSet], vocabularies: Sequence[Vocabulary], spec: HeadSpec, device: torch.device
) -> tuple[HeadSpec, PrototypeHead]:
    """The head with a prototype for every class of every cache that has examples, and its spec.

    Classes of the same name in two caches keep a prototype each; they have the same text embedding.
    """
    texts = torch.cat([vocabulary.embeddings for vocabulary in vocabularies]).to(device)
    sums = PrototypeSums(len(texts), spec.width, device)
    progress = Progress(sum(len(training_set.rows) for training_set in training_sets), "images")
    first_class = 0
    for training_set, vocabulary in zip(training_sets, vocabularies, strict=True):
        maps = training_set.maps
        decode = DeviceDecoder(maps, device)
        loader = training_set.cache.loader(
            BATCH,
            rows=training_set.rows,
            shuffle="none",
            map_set=maps.name,
            token_set=training_set.tokens.name,
            pin_memory=False,
        )
        for batch in loader:
            boxes = training_set.relative_boxes(batch.rows, batch.boxes_xyxy, batch.region_mask)
            categories = torch.from_numpy(batch.categories).to(device)
            categories = torch.where(categories >= 0, categories + first_class, categories)
            sums.add(decode(batch.feature_map, batch.map_scale), torch.from_numpy(boxes).to(device), categories)
            progress.step(len(batch))
        first_class += len(vocabulary)
    spec = replace(spec, options={**spec.options, "classes": int((sums.counts > 0).sum())})
    head = spec.build().to(device)
    assert isinstance(head, PrototypeHead)
    sums.fill(head, texts)
    return spec, head
