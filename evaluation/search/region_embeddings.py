"""Embeddings of a cache's regions in the space of its text encoder, from stored features: no image is opened.

head     a trained head, on the tokens and maps that it was trained on
dense    the mean of CLIP's dense map in the box
pooled   the mean of CLIP's feature map in the box, through its last layer norm and projection
"""

# n regions of an image, E text embedding, T map tokens, D width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from regionspot.cache.errors import InputError
from regionspot.cache.format.compatibility import description
from regionspot.cache.machine import compute_device
from regionspot.cache.reading.dask_arrays import read_decoded
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference.cache_vocabulary import EncoderOnDemand
from regionspot.evaluation.inference.head_features import head_features
from regionspot.evaluation.inference.scoring import batch_vectors
from regionspot.evaluation.inference.zero_shot import dense_embeddings, region_weights
from regionspot.fusion.checkpoint import load_checkpoint, weights_digest
from regionspot.fusion.heads.pooling import map_side, relative_boxes
from regionspot.fusion.templates import template_set
from regionspot.fusion.training.batches import DeviceDecoder
from regionspot.pipeline.backbones.batch_size import Halving
from regionspot.pipeline.backbones.dense import DENSE
from regionspot.pipeline.backbones.protocols import ProjectingEncoder

HEAD_BATCH = 16  # images


@dataclass(frozen=True)
class RegionEmbedder:
    """Computes the embeddings of a cache's regions.

    method        "head", "dense" or "pooled"
    feature_sets  that it reads
    identity      everything that decides the embeddings except images and boxes, JSON-able
    encoder       name and SHA-256 of the weights of the text encoder, into whose space it embeds
    templates     of the prompts that are compared with the embeddings
    width         E
    embed         the row and the embeddings float32 (n, E) of each of these images, which must be readable
    """

    method: str
    feature_sets: tuple[str, ...]
    identity: dict[str, Any]
    encoder: tuple[str, str]
    templates: tuple[str, ...]
    width: int
    embed: Callable[[NDArray[np.int64]], Iterator[tuple[int, Tensor]]]


def head_embedder(
    cache: FeatureCache,
    checkpoint: Path,
    preset: str | None = None,
    head_class: str | None = None,
    device: str | None = None,
) -> RegionEmbedder:
    """By a trained head. The arguments are those of `load_checkpoint`.

    Raises WeightsError for a file that is no head, ProvenanceMismatchError if the cache has other features than those
    that the head was trained on.
    """
    loaded = load_checkpoint(checkpoint, preset, head_class)
    features = head_features(checkpoint, loaded.info)
    features.require_cache(cache)
    place, names = compute_device(device), (features.tokens.name, features.maps.name)
    tokens, maps = (cache.feature_sets[name] for name in names)
    decode_tokens, decode_maps = DeviceDecoder(tokens, place), DeviceDecoder(maps, place)
    head, halving = loaded.head.to(place).eval(), Halving()

    def embed(rows: NDArray[np.int64]) -> Iterator[tuple[int, Tensor]]:
        for batch in cache.loader(HEAD_BATCH, shuffle="none", rows=rows, map_set=maps.name, token_set=tokens.name):
            sizes = cache.manifest.heights[batch.rows], cache.manifest.widths[batch.rows]
            boxes = torch.from_numpy(relative_boxes(batch.boxes_xyxy, *sizes)).to(place)
            of_regions = decode_tokens(batch.tokens, batch.token_scale).float()
            of_images = decode_maps(batch.feature_map, batch.map_scale).float()
            mask = torch.from_numpy(batch.region_mask).to(place)

            vectors = batch_vectors(head, of_regions, mask, of_images, boxes, halving)
            for row, of_image in zip(batch.rows.tolist(), vectors, strict=True):
                yield row, F.normalize(of_image.float(), dim=-1)

    return RegionEmbedder(
        "head",
        names,
        {"head_sha256": weights_digest(head.state_dict()), **_features(cache, names)},
        _text_encoder(cache, maps.name, maps.name),
        loaded.info.templates or template_set("reference"),
        loaded.spec.text_dim,
        embed,
    )


def map_embedder(
    cache: FeatureCache, map_set: str | None = None, weights: str | None = None, device: str | None = None
) -> RegionEmbedder:
    """Without a trained head: "dense" if the cache has a dense map, else "pooled".

    map_set   default: the only dense map of the cache, else its only feature map
    weights   of the encoder, which "pooled" takes the projection from

    Raises InputError for a cache without such a map, ProvenanceMismatchError for other weights than the cache's.
    """
    name = map_set or _only_map(cache)
    if name not in cache.feature_sets or cache.feature_sets[name].kind != "map":
        raise InputError(f"{cache.path}: has no map {name!r}; its feature sets are {', '.join(cache.feature_sets)}")
    place, reader, manifest = compute_device(device), cache.reader(name), cache.manifest
    dense = name.endswith(DENSE)
    encoder = _text_encoder(cache, name, name.removesuffix(DENSE))
    projection = None if dense else EncoderOnDemand(*encoder, weights, str(place)).loaded
    if projection is not None and not isinstance(projection, ProjectingEncoder):
        raise InputError(
            f"encoder {encoder[0]}: has no projection of its map into the text space; give --checkpoint, or extract "
            "dense maps into this cache with --map dense"
        )

    @torch.inference_mode()
    def embed(rows: NDArray[np.int64]) -> Iterator[tuple[int, Tensor]]:
        for row in rows.tolist():
            values = torch.from_numpy(read_decoded(reader, [row])[0]).to(place).float()
            boxes = relative_boxes(
                manifest.boxes_xyxy[manifest.regions(row)], manifest.heights[row], manifest.widths[row]
            )
            if projection is None:
                yield row, dense_embeddings(values, boxes)
            else:
                weights = region_weights(boxes, map_side(values[None])).to(values)
                yield row, F.normalize(projection.project(weights @ values[1:]), dim=-1)

    return RegionEmbedder(
        "dense" if dense else "pooled",
        (name,),
        _features(cache, (name,)),
        encoder,
        template_set("reference"),
        cache.feature_sets[name].shape[-1] if projection is None else projection.text_dim,
        embed,
    )


def _only_map(cache: FeatureCache) -> str:
    maps = [feature_set.name for feature_set in cache.feature_sets.values() if feature_set.kind == "map"]
    best = [name for name in maps if name.endswith(DENSE)] or maps
    if len(best) != 1:
        raise InputError(f"{cache.path}: its maps are {', '.join(best) or 'none'}; name one with --map-set")
    return best[0]


def _features(cache: FeatureCache, names: Sequence[str]) -> dict[str, Any]:
    return {"features": {name: description(cache.feature_sets[name]) for name in names}}


def _text_encoder(cache: FeatureCache, map_set: str, name: str) -> tuple[str, str]:
    return name, str(cache.feature_sets[map_set].provenance["weights_sha256"])
