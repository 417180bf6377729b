"""Searching the regions of a cache: exact, resumable, and refused where index and cache do not belong together."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.search import region_index
from regionspot.evaluation.search.region_embeddings import head_embedder, map_embedder
from regionspot.evaluation.search.region_index import RegionIndex, build_index
from regionspot.fusion.checkpoint import HeadInfo, save_checkpoint
from regionspot.fusion.heads import HeadSpec

pytestmark = pytest.mark.usefixtures("module_home")


@pytest.fixture(scope="module")
def cache(dense_cache):
    return FeatureCache.open(dense_cache)


@pytest.fixture(scope="module")
def folder(cache, tmp_path_factory):
    """A read-only index by the dense map."""
    folder = tmp_path_factory.mktemp("index") / "val.zarr.regions"
    build_index(cache, map_embedder(cache), folder)
    return folder


def embeddings_of(folder) -> np.ndarray:
    return np.load(folder / "embeddings.npy").astype(np.float32)


def test_words_find_the_regions_of_that_name(cache, folder):
    index = RegionIndex(cache, folder)
    encoder = index.text_encoder()
    names = sorted({cache.categories[category].name for category in cache.manifest.category_index})[:8]
    first = [index.nearest(index.embed_words(name, encoder), 1)[0].name == name for name in names]
    assert np.mean(first) > 0.5  # chance is 1 in 36


def test_the_nearest_regions_are_those_of_a_full_product(cache, folder, monkeypatch):
    monkeypatch.setattr(region_index, "CHUNK", 5)
    index, embeddings = RegionIndex(cache, folder), embeddings_of(folder)
    hits = index.nearest(index.embedding(3), 6)
    cosines = embeddings @ embeddings[3]
    expected = np.argsort(-cosines, kind="stable")[:6]
    assert [index.region(hit.image_id, hit.number) for hit in hits] == expected.tolist()
    assert [hit.similarity for hit in hits] == pytest.approx(cosines[expected], abs=1e-5)
    assert index.nearest(index.embedding(3), 5, without=3) == hits[1:]
    assert len(index.nearest(index.embedding(3), 10_000)) == len(embeddings)


def test_embeddings_have_unit_length_by_every_method(cache, folder, tmp_path):
    torch.manual_seed(0)
    spec = HeadSpec(token_dim=128, width=192, text_dim=128, options={"layers": 1, "ffn": 64})
    maps, tokens = (cache.feature_sets[name].provenance["weights_sha256"] for name in ("toy_clip", "toy_sam"))
    weights = {"toy_clip": maps, "toy_sam": tokens}
    info = HeadInfo("toy", "toy_sam", "toy_clip", weights, templates=("{}.",))
    save_checkpoint(tmp_path / "head.safetensors", spec, spec.build(), info)
    head = head_embedder(cache, tmp_path / "head.safetensors", device="cpu")
    build_index(cache, head, tmp_path / "head")
    build_index(cache, map_embedder(cache, "toy_clip"), tmp_path / "pooled")
    for path in (folder, tmp_path / "head", tmp_path / "pooled"):
        embeddings = embeddings_of(path)
        assert embeddings.shape == (len(cache.manifest.boxes_xyxy), 128)
        assert np.linalg.norm(embeddings, axis=1) == pytest.approx(1, abs=1e-3)
    assert RegionIndex(cache, tmp_path / "head").templates == ("{}.",)
    with pytest.raises(ProvenanceMismatchError, match="is an index with another method"):
        build_index(cache, head, tmp_path / "pooled")


def test_a_stopped_index_is_resumed_at_the_part_where_it_stopped(cache, folder, tmp_path):
    embedder, seen = map_embedder(cache), []

    def stops_in_the_second_part(rows):
        for row, embedded in embedder.embed(rows):
            if row >= 6:
                raise KeyboardInterrupt
            yield row, embedded

    def notes_rows(rows):
        seen.extend(rows.tolist())
        return embedder.embed(rows)

    stopped = region_index.RegionEmbedder(**{**vars(embedder), "embed": stops_in_the_second_part})
    with pytest.raises(KeyboardInterrupt):
        build_index(cache, stopped, tmp_path / "index")
    partial = RegionIndex(cache, tmp_path / "index")
    assert partial.missing == np.diff(cache.manifest.offsets)[4:].sum()
    assert {hit.row for hit in partial.nearest(partial.embedding(0), 100)} == {0, 1, 2, 3}
    index = build_index(cache, region_index.RegionEmbedder(**{**vars(embedder), "embed": notes_rows}), partial.folder)
    assert index.missing == 0
    assert seen == [4, 5, 6, 7]
    np.testing.assert_array_equal(embeddings_of(index.folder), embeddings_of(folder))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("index.json", b"[", "index.json: is damaged"),
        ("index.json", b'{"crc32c": 1}', "index.json: is damaged"),
        ("embeddings.npy", b"\x93NUMPY", "embeddings.npy: cannot be read"),
        ("embeddings.npy", None, "embeddings.npy: cannot be read"),
    ],
)
def test_a_damaged_index_is_refused(cache, folder, tmp_path, file, content, message):
    shutil.copytree(folder, tmp_path / "index")
    (tmp_path / "index" / file).write_bytes(content) if content else (tmp_path / "index" / file).unlink()
    with pytest.raises(InputError, match=message):
        RegionIndex(cache, tmp_path / "index")


def test_the_commands_index_and_search_a_cache(dense_cache, world, tmp_path, regionspot, refused):
    path = tmp_path / "val.zarr"
    shutil.copytree(dense_cache, path)
    refused("write it with `regionspot index", "search", path, "star")
    code, out, err = regionspot("index", path)
    assert code == 0, err
    assert out.startswith(f"{path}.regions: ")
    assert out.strip().endswith("regions, by dense")

    code, out, err = regionspot("search", path, "striped green star", "-n", "3", "--json")
    assert code == 0, err
    hits = json.loads(out)
    assert [hit["similarity"] for hit in hits] == sorted((hit["similarity"] for hit in hits), reverse=True)
    like = f"{hits[0]['image_id']}:{hits[0]['region']}"
    code, out, err = regionspot("search", path, "--like", like, "-n", "7", "-o", tmp_path / "s.png", "--data", world)
    assert code == 0, err
    assert len(out.splitlines()) == 8
    assert f" {like} " not in out
    assert len(np.unique(np.asarray(Image.open(tmp_path / "s.png")).reshape(-1, 3), axis=0)) > 1000

    refused("has no region 99", "search", path, "--like", f"{hits[0]['image_id']}:99")
    refused("expected IMAGE_ID:REGION", "search", path, "--like", "abc")
    refused("zebra", "search", path, "zebra")  # the toy encoder knows no other words than those of its world
    refused("is, or is inside, an input", "index", path, "--index", path / "inside")
