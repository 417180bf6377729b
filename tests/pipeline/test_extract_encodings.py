"""`extract --encoding`: from real JPEGs by the toy backbones into int8, bfloat16 and zstd."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from regionspot.cache import FeatureCache
from regionspot.cache.format.encodings import decode
from regionspot.cli import app

IMAGES = 6


@pytest.fixture(scope="module")
def extracted(world, tmp_path_factory):
    """`extracted(name, options)`: a cache of the toy world's first images, by the command line."""
    folder = tmp_path_factory.mktemp("encodings")

    def extract(name, *options):
        command = ["extract", "toy", "--data", str(world), "--cache", str(folder / name), "--preset", "toy"]
        result = CliRunner().invoke(app, [*command, "--limit", str(IMAGES), "--part-size", "4", *options])
        if result.exception is not None:
            raise result.exception
        return folder / name

    return extract


def features_in(path: Path, name: str, array: str):
    """A feature set, read with the zarr library and decoded."""
    feature_set = FeatureCache.open(path).feature_sets[name]
    root = zarr.open_group(path, mode="r")
    scales = root[f"features/{name}/scale"][:] if feature_set.has_scales else None
    return decode(root[f"features/{name}/{array}"][:], feature_set, scales)


def test_encoding_int8_is_for_maps_only(extracted):
    plain, encoded = extracted("plain.zarr"), extracted("int8.zarr", "--encoding", "int8")
    sets = FeatureCache.open(encoded).feature_sets
    assert {name: feature_set.dtype for name, feature_set in sets.items()} == {"toy_sam": "float16", "toy_clip": "int8"}
    original, decoded = (features_in(path, "toy_clip", "feature_map") for path in (plain, encoded))
    cosine = (original * decoded).sum(-1) / np.linalg.norm(original, axis=-1) / np.linalg.norm(decoded, axis=-1)
    assert cosine.min() > 0.999
    np.testing.assert_array_equal(
        features_in(plain, "toy_sam", "token"), features_in(encoded, "toy_sam", "token"), strict=True
    )
    sizes = [sum(file.stat().st_size for file in path.glob("features/toy_clip/**/c.*")) for path in (plain, encoded)]
    assert 0.5 < sizes[1] / sizes[0] < 0.53


def test_statistics_are_those_of_the_features_and_stay_when_the_run_is_resumed(extracted):
    path = extracted("stays.zarr", "--encoding", "int8", "--token-encoding", "int8+zstd")
    sets = FeatureCache.open(path).feature_sets
    assert sets["toy_sam"].compression == "zstd"
    maps = features_in(path, "toy_clip", "feature_map").reshape(-1, sets["toy_clip"].shape[-1])
    np.testing.assert_allclose(sets["toy_clip"].statistics.mean, maps.mean(axis=0), atol=1e-2)
    np.testing.assert_allclose(sets["toy_clip"].statistics.deviation, maps.std(axis=0), rtol=2e-2, atol=2e-3)

    before = (path / "features/toy_clip/feature_map/c.1.0.0").read_bytes()
    (path / "parts/toy_clip/00001.json").unlink()
    (path / "features/toy_clip/feature_map/c.1.0.0").unlink()
    extracted("stays.zarr", "--encoding", "int8", "--token-encoding", "int8+zstd")
    assert (path / "features/toy_clip/feature_map/c.1.0.0").read_bytes() == before
    assert FeatureCache.open(path).feature_sets == sets


@pytest.mark.parametrize("option", ["--encoding", "--token-encoding"])
def test_an_unknown_encoding_is_refused(extracted, option):
    with pytest.raises(ValueError, match="encoding 'int4': unknown; expected one of float16, float32, bfloat16, int8"):
        extracted("none.zarr", option, "int4")


def test_resuming_in_another_encoding_is_refused(extracted):
    path = extracted("refused.zarr")
    with pytest.raises(RuntimeError, match="toy_clip differs from the requested one: dtype is 'float16'"):
        extracted("refused.zarr", "--encoding", "bfloat16")
    assert json.loads((path / "zarr.json").read_bytes())["attributes"]["regionspot"]["feature_sets"][0]["name"]
