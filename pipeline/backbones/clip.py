"""The CLIP encoder: feature maps and dense maps of images, and embeddings of prompts and whole images.

The feature map is the output before the last layer norm and the projection. `project` applies both.
"""

# B images, T map tokens (class token first, then patches row by row), D map width, P prompts, p pixels

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from regionspot.cache.errors import InputError
from regionspot.cache.machine import compute_device
from regionspot.pipeline.backbones.builders import base_provenance, build_clip
from regionspot.pipeline.backbones.dense import dense_path
from regionspot.pipeline.backbones.dtypes import autocast, resolve_dtype
from regionspot.pipeline.backbones.open_clip_models import Tokenizer, contiguous_attention
from regionspot.pipeline.backbones.protocols import (
    BackboneConfig,
    LimitedTextEncoder,
    SemanticEncoder,
    TextEncoder,
    missing_members,
)
from regionspot.pipeline.backbones.registry import ENCODERS, stored_name
from regionspot.pipeline.backbones.weights import load_weights
from regionspot.pipeline.images.preprocess import get_preprocess

log = logging.getLogger(__name__)

PROMPT_BATCH = 256
NAMES_SHOWN = 3  # in a warning


class ClipEncoder:
    """A frozen CLIP with a class token, a `ProjectingEncoder`. Use `load_encoder`.

    name            of the registry entry and of the feature set
    pixels          side of the square input
    map_shape       (T, D)
    text_dim        width of the joint space of prompts and projected images
    dense_shape     (P, text_dim) of the dense map
    logit_scale     factor of cosine similarities (about 100)
    provenance      JSON-serialisable, everything that determines the values of the maps
    weights_sha256  of the file with both towers; "random:SEED" for random weights
    known_words     of the toy CLIP: the words that it was trained on; empty if it accepts all words
    """

    def __init__(self, config: BackboneConfig) -> None:
        clip = build_clip(config.name)
        self.name = stored_name(config.name)
        loaded = load_weights(self.name, config.weights, clip.model.state_dict(), clip.official, clip.convert)
        clip.model.load_state_dict(loaded.state_dict)
        self.weights_sha256 = loaded.sha256
        self.device = torch.device(config.device)
        self._clip = clip.model.to(self.device).eval().requires_grad_(False)
        contiguous_attention(self._clip.visual, self.device, config.dtype)
        self._tokenizer: Tokenizer = clip.tokenizer
        self._normalisation = (tuple(clip.mean), tuple(clip.std))
        self._dtype, self._preprocess = config.dtype, config.preprocess
        self.pixels: int = self._clip.visual.image_size[0]
        self.provenance: dict[str, Any] = {
            **base_provenance(config, loaded, self.pixels, "open_clip_torch"),
            **config.preprocess.clip_provenance(self.pixels),
            "mean": list(clip.mean),
            "std": list(clip.std),
        }
        self.map_shape: tuple[int, int] = tuple(self._clip.visual.positional_embedding.shape)
        self.text_dim: int = self._clip.visual.proj.shape[1]
        self._dense = dense_path(self._clip.visual)
        self.dense_shape = None if self._dense is None else (self.map_shape[0] - 1, self.text_dim)
        self.logit_scale = float(self._clip.logit_scale.exp())
        # Rows of zeros in the word table, which only the toy CLIP has, are unknown words.
        known = self._clip.token_embedding.weight.any(dim=1)
        self._known_tokens = None if known.all() else frozenset(known.nonzero()[:, 0].tolist())
        self.known_words = self._list_known_words()

    @property
    def batch_size(self) -> int:
        """Images to encode at a time."""
        return 8

    def preprocess(self, image: Image.Image) -> Tensor:
        """float32 (3, p, p), normalised."""
        return self._preprocess.clip_input(image, self.pixels, *self._normalisation)

    @torch.no_grad()
    def encode(self, batch: Tensor) -> Tensor:
        """float32 (B, T, D): the feature maps of preprocessed images (B, 3, p, p)."""
        return self._outputs_of_blocks(batch, 1)[0]

    @torch.no_grad()
    def encode_with_dense(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, T, D) and (B, T - 1, text_dim): feature maps as `encode` gives them, and dense maps."""
        assert self._dense is not None
        before, feature_map = self._outputs_of_blocks(batch, 2)
        return feature_map, self._dense(before[:, 1:])

    def _outputs_of_blocks(self, batch: Tensor, count: int) -> list[Tensor]:
        """float32 (B, T, D) for each of the last `count` blocks."""
        with autocast(self.device, self._dtype):
            outputs = self._clip.visual.forward_intermediates(
                batch.to(self.device),
                indices=count,
                output_fmt="NLC",
                output_extra_tokens=True,
                intermediates_only=True,
            )
        tokens = zip(outputs["image_intermediates_prefix"], outputs["image_intermediates"], strict=True)
        return [torch.cat(of_block, dim=1).float() for of_block in tokens]

    @torch.no_grad()
    def project(self, feature_map: Tensor) -> Tensor:
        """float32 (..., D) -> (..., text_dim): apply the last layer norm and the projection to each token."""
        visual = self._clip.visual
        projected: Tensor = visual.ln_post(feature_map.to(self.device).float()) @ visual.proj
        return projected

    def embed_images(self, batch: Tensor) -> Tensor:
        """float32 (B, text_dim): CLIP's embedding of whole preprocessed images, not normalised."""
        return self.project(self.encode(batch)[:, 0])

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """float32 (P, text_dim): CLIP's embeddings of the prompts, not normalised.

        Computed in batches of equal length without padding: the text tower is causal, so tokens after the end have no
        influence. A class name in a template has about 8 of the 77 tokens.

        Raises InputError for a prompt that is too long, and for one with words that the toy encoder does not know.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        embeddings = torch.empty(len(ids), self.text_dim, device=self.device)
        by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for _, group in groupby(by_length, key=lambda row: len(ids[row])):
            equal = list(group)
            for start in range(0, len(equal), PROMPT_BATCH):
                rows = equal[start : start + PROMPT_BATCH]
                embeddings[rows] = self._embed_ids([ids[row] for row in rows])
        return embeddings

    def _ids(self, prompt: str) -> list[int]:
        ids = [self._tokenizer.sot_token_id, *self._tokenizer.encode(prompt), self._tokenizer.eot_token_id]
        if len(ids) > self._clip.context_length:
            raise InputError(
                f"prompt {prompt!r}: has {len(ids)} tokens with start and end, {self.name} reads at most "
                f"{self._clip.context_length}; shorten it"
            )
        if self._known_tokens is not None and not self._known_tokens.issuperset(ids):
            raise InputError(
                f"prompt {prompt!r}: {self.name} does not know {', '.join(self.unknown_words(prompt))}; it knows "
                f"{', '.join(self.known_words)}: use names made of these words, or another preset's features"
            )
        return ids

    def _list_known_words(self) -> tuple[str, ...]:
        if self._known_tokens is None:
            return ()
        from regionspot.pipeline.toy.models import known_words

        return known_words(self._known_tokens)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the toy CLIP does not know, in order; none for any other CLIP."""
        if self._known_tokens is None:
            return []
        from regionspot.pipeline.toy.models import unknown_words

        return unknown_words(text, self._known_tokens)

    def _embed_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """open_clip's CLIP.encode_text, for sequences of equal length without padding."""
        clip, length = self._clip, len(ids[0])
        values = clip.token_embedding(torch.tensor(ids, device=self.device)) + clip.positional_embedding[:length]
        values = clip.transformer(values, attn_mask=clip.attn_mask[:length, :length])
        embedded: Tensor = clip.ln_final(values[:, -1]) @ clip.text_projection
        return embedded


def warn_of_unknown_names(encoders: Sequence[SemanticEncoder], names: Sequence[str]) -> None:
    """Warn if an encoder cannot read the class names of a dataset: a head on its maps could not be trained."""
    for encoder in encoders:
        if not isinstance(encoder, LimitedTextEncoder) or not encoder.known_words:
            continue
        unknown = [name for name in names if encoder.unknown_words(name)]
        if unknown:
            log.warning(
                "%s cannot read %s of the %s class names of this dataset (%s%s): its features can be extracted, but a "
                "head cannot be trained or evaluated with these names; it knows the words %s",
                encoder.name,
                f"{len(unknown):,}",
                f"{len(names):,}",
                ", ".join(unknown[:NAMES_SHOWN]),
                ", ..." if len(unknown) > NAMES_SHOWN else "",
                ", ".join(encoder.known_words),
            )


def load_encoder(
    name: str, weights: str | None = None, device: str = "cpu", dtype: str = "float32", *, preprocess: str = "direct"
) -> SemanticEncoder:
    """Load a semantic encoder of `registry.ENCODERS`, "open_clip:MODEL:TAG" or "package.module:Class".

    weights     a source for `load_weights`
    dtype       of the image tower: float32, bfloat16, float16 or "auto"; prompts and projections use float32
    preprocess  a preset in preprocess.py

    Raises InputError for an unknown name, dtype or preset, or a class that is not a SemanticEncoder; WeightsError for
    missing or unfitting weights.
    """
    place, rule = str(compute_device(device)), get_preprocess(preprocess)
    model = ENCODERS.build(BackboneConfig(name, weights, place, resolve_dtype(dtype, place, "encoder"), rule))
    if not isinstance(model, SemanticEncoder):
        missing = missing_members(model, SemanticEncoder)
        raise InputError(f"encoder {name!r}: lacks {missing}, which protocols.SemanticEncoder requires")
    return model


def load_text_encoder(
    name: str, weights: str | None = None, device: str = "cpu", dtype: str = "float32", *, preprocess: str = "direct"
) -> TextEncoder:
    """Like `load_encoder`. Raises InputError also for an encoder without a text tower."""
    model = load_encoder(name, weights, device, dtype, preprocess=preprocess)
    if not isinstance(model, TextEncoder):
        raise InputError(f"encoder {name!r}: has no text tower, which class names need; use a protocols.TextEncoder")
    return model
