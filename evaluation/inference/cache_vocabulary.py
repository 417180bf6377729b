"""The vocabulary of a dataset's categories; of a cache, by the text tower of the encoder that made its maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.format.manifest import Category
from regionspot.cache.store import FeatureCache
from regionspot.fusion.templates import template_set
from regionspot.fusion.vocabulary import TextEncoder as PromptEncoder
from regionspot.fusion.vocabulary import Vocabulary, build_vocabulary
from regionspot.pipeline.backbones.clip import load_text_encoder
from regionspot.pipeline.backbones.protocols import TextEncoder

NamesFrom = Literal["name", "synonyms", "definitions"]

# With a template, CLIP's 77 tokens hold about 50 words. The first words of a definition say what kind of thing it is.
DEFINITION_WORDS = 32


@dataclass(frozen=True)
class EncoderOnDemand:
    """The text tower of a cache's semantic encoder, loaded only if a vocabulary must be computed.

    weights_sha256  of the weights that made the maps; other weights are an error
    source          of the weights, as for `load_weights`
    """

    name: str
    weights_sha256: str
    source: str | None = None
    device: str | None = None

    def embed_prompts(self, prompts: list[str], /) -> Tensor:
        """float32 (P, text_dim), not normalised. Raises ProvenanceMismatchError for other weights."""
        return self.loaded.embed_prompts(prompts)

    @cached_property
    def loaded(self) -> TextEncoder:
        """The encoder. Raises ProvenanceMismatchError for other weights."""
        encoder = load_text_encoder(self.name, self.source, self.device or "cpu")
        if encoder.weights_sha256 != self.weights_sha256:
            raise ProvenanceMismatchError(
                f"{self.name}: the cache was made with weights {self.weights_sha256[:16]}, but "
                f"{encoder.weights_sha256[:16]} are loaded; give the weights of the cache with --weights"
            )
        return encoder


def cache_vocabulary(
    cache: FeatureCache,
    map_set: str,
    templates: str | Sequence[str] = "reference",
    source: str | None = None,
    device: str | None = None,
    names_from: NamesFrom = "name",
) -> Vocabulary:
    """One embedding per category of `cache`, in its order, from the encoder of its feature set `map_set`.

    Raises ProvenanceMismatchError if the cache has no such set, or if `source` holds other weights, and the error of
    `category_vocabulary`.
    """
    if map_set not in cache.feature_sets:
        names = ", ".join(cache.feature_sets) or "none"
        raise ProvenanceMismatchError(
            f"{cache.path}: holds the feature sets {names}, not {map_set}; name their preset, or extract {map_set} too"
        )
    weights = cache.feature_sets[map_set].provenance["weights_sha256"]
    encoder = EncoderOnDemand(map_set, weights, source, device)
    if isinstance(templates, str):
        templates = template_set(templates)
    return category_vocabulary(cache.categories, templates, encoder, names_from)


def category_vocabulary(
    categories: Sequence[Category], templates: Sequence[str], encoder: PromptEncoder, names_from: NamesFrom = "name"
) -> Vocabulary:
    """One embedding per category.

    names_from   what the prompts contain: the name; the name and all synonyms, averaged; or the name, a comma and the
                 first DEFINITION_WORDS words of the definition. A category without them has its name alone

    Raises InputError if no category has synonyms or a definition.
    """
    names = [category.name for category in categories]
    texts = [_texts(category, names_from) for category in categories]
    if names_from != "name" and texts == [[name] for name in names]:
        raise InputError(f"--names-from {names_from}: the categories have none; use --names-from name")
    return build_vocabulary(names, templates, encoder, texts=texts)


def _texts(category: Category, names_from: NamesFrom) -> list[str]:
    if names_from == "synonyms":
        # LVIS lists the name among its synonyms.
        return list(dict.fromkeys([category.name, *(synonym for synonym in category.synonyms if synonym.strip())]))
    words = (category.definition or "").split() if names_from == "definitions" else []
    return [f"{category.name}, {' '.join(words[:DEFINITION_WORDS])}" if words else category.name]
