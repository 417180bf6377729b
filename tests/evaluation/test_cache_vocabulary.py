"""The vocabulary of a cache: what its prompts contain."""

import pytest
import torch
from makers import make_manifest

from regionspot.cache.errors import InputError
from regionspot.cache.format.manifest import Category
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.inference import cache_vocabulary as module
from regionspot.evaluation.inference.cache_vocabulary import DEFINITION_WORDS, cache_vocabulary

CATEGORIES = (
    Category(1, "sofa", synonyms=("couch", "sofa", "lounge"), definition="a seat for more than one person"),
    Category(2, "mast", definition=" ".join(["very"] * 100)),
    Category(3, "box"),
)


class Encoder:
    name = "maps"
    weights_sha256 = "0" * 64
    prompts: list

    def __init__(self):
        self.prompts = []

    def embed_prompts(self, prompts):
        self.prompts += prompts
        return torch.ones(len(prompts), 4)


@pytest.fixture
def encoder(monkeypatch, home):
    encoder = Encoder()
    monkeypatch.setattr(module, "load_text_encoder", lambda *_: encoder)
    return encoder


def make_cache(path, categories=CATEGORIES):
    maps = FeatureSet("maps", "map", (5, 8), "float16", {"weights_sha256": Encoder.weights_sha256})
    return FeatureCache.create(path, make_manifest([1], categories=categories), [maps])


@pytest.mark.parametrize(
    ("names_from", "prompts"),
    [
        ("name", ["sofa.", "mast.", "box."]),
        ("synonyms", ["sofa.", "couch.", "lounge.", "mast.", "box."]),
        (
            "definitions",
            [
                "sofa, a seat for more than one person.",
                f"mast, {' '.join(['very'] * DEFINITION_WORDS)}.",
                "box.",
            ],
        ),
    ],
)
def test_the_prompts_hold_names_synonyms_or_definitions(tmp_path, encoder, names_from, prompts):
    vocabulary = cache_vocabulary(make_cache(tmp_path / "a.zarr"), "maps", "plain", names_from=names_from)
    assert encoder.prompts == prompts
    assert vocabulary.names == ("sofa", "mast", "box")


@pytest.mark.parametrize("names_from", ["synonyms", "definitions"])
def test_a_cache_without_synonyms_or_definitions_is_refused(tmp_path, encoder, names_from):
    cache = make_cache(tmp_path / "a.zarr", (Category(1, "sofa"),))
    with pytest.raises(InputError, match=f"--names-from {names_from}: the categories have none"):
        cache_vocabulary(cache, "maps", "plain", names_from=names_from)
