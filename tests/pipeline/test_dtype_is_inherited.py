"""The run that creates a feature set chooses its dtype; every other run on that cache uses the same dtype."""

from dataclasses import replace
from pathlib import Path

import pytest
from forked import MAIN, ForkedCommand

from regionspot.cache import FeatureCache
from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.pipeline.backbones import dtypes
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.distributed.worker import ExtractJob
from regionspot.pipeline.extraction import extract
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import Extraction

IMAGES = 4

# `regionspot extract` on a machine whose "auto" is `dtype`. It opens the cache at the same time as the `other` run.
RUN = f"""
import time
from pathlib import Path
from regionspot.pipeline.backbones import dtypes
from regionspot.pipeline.extraction import extract

dtypes.auto_dtype = lambda device, kind: dtype
open_or_create = extract.open_or_create

def open_together(*args, **kwargs):
    Path(folder, dtype).touch()
    while not Path(folder, other).exists():
        time.sleep(0.001)
    return open_or_create(*args, **kwargs)

extract.open_or_create = open_together
{MAIN}
"""


def dtypes_of(cache) -> dict[str, str]:
    return {
        name: feature_set.provenance["dtype"] for name, feature_set in FeatureCache.open(cache).feature_sets.items()
    }


def features_of(cache, name="*") -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in Path(cache).glob(f"features/{name}/**/c.*")}


@pytest.fixture
def extraction(world, tmp_path):
    """`extraction(name, dtype)` extracts the same few images into the cache of that name."""

    def make(name, dtype, parts=None, **models):
        manifest = read_dataset("toy", world, "train").head(IMAGES)
        backbones = Backbones.load("toy", device="cpu", dtype=dtype, **models)
        config = ExtractConfig(str(tmp_path / name), part_size=1, parts=parts)
        return Extraction(config, manifest, image_folder_of("toy", world), backbones)

    return make


@pytest.mark.parametrize("created_together", [("toy_clip", "toy_sam"), ("toy_sam",)])
def test_two_machines_with_different_default_dtypes_fill_one_cache_in_one_dtype(
    world, tmp_path, extraction, created_together
):
    cache, folder = tmp_path / "c.zarr", tmp_path / "started"
    if "toy_clip" not in created_together:
        extraction(cache.name, "float32", localizer="none").run()
    folder.mkdir()
    arguments = ["extract", "toy", "--data", world, "--cache", cache, "--preset", "toy", "--device", "cpu"]
    arguments += ["--limit", IMAGES, "--part-size", 1]
    runs = [
        ForkedCommand(*arguments, code=f"dtype, other, folder = {dtype!r}, {other!r}, {str(folder)!r}\n{RUN}")
        for dtype, other in (("float32", "bfloat16"), ("bfloat16", "float32"))
    ]
    ends = [run.end() for run in runs]
    assert [code for code, _ in ends] == [0, 0], ends
    chosen = dtypes_of(cache)["toy_sam"]
    alone = extraction("alone.zarr", chosen)
    alone.run()
    for name in created_together:
        assert dtypes_of(cache)[name] == chosen
        assert features_of(cache, name) == features_of(alone.config.cache, name)


@pytest.fixture
def created_meanwhile(extraction, monkeypatch):
    """`created_meanwhile("c.zarr", "bfloat16")`: another run creates that cache just before the next one opens it."""
    open_or_create = extract.open_or_create

    def interleave(name, dtype):
        def other_first(*args, **kwargs):
            monkeypatch.setattr(extract, "open_or_create", open_or_create)
            extraction(name, dtype).prepare()
            return open_or_create(*args, **kwargs)

        monkeypatch.setattr(extract, "open_or_create", other_first)

    return interleave


def test_a_run_uses_the_dtype_of_a_cache_created_after_its_models_were_loaded(extraction, created_meanwhile):
    late, alone = extraction("c.zarr", "auto"), extraction("alone.zarr", "bfloat16")
    created_meanwhile("c.zarr", "bfloat16")
    assert late.run().parts == alone.run().parts == IMAGES
    assert set(dtypes_of(late.config.cache).values()) == {"bfloat16"}
    assert features_of(late.config.cache) == features_of(alone.config.cache)


def test_workers_use_the_dtype_of_a_cache_created_after_the_first_of_them_loaded_its_models(
    world, tmp_path, created_meanwhile
):
    path = tmp_path / "c.zarr"
    config = ExtractConfig(str(path), "toy", str(world), limit=IMAGES, preset="toy", device="cpu", part_size=1)
    job = ExtractJob(config)
    created_meanwhile(path.name, "bfloat16")
    prepared = job.prepare()
    assert sorted(prepared.names) == ["toy_clip", "toy_sam"]
    opened = job.open()  # refuses models of another dtype than the cache's
    opened.close()
    assert set(dtypes_of(path).values()) == {"bfloat16"}


def test_an_explicit_dtype_is_refused_if_the_cache_has_another(extraction, created_meanwhile):
    late = extraction("c.zarr", "float32")
    created_meanwhile("c.zarr", "bfloat16")
    with pytest.raises(ProvenanceMismatchError, match=r"provenance\.dtype is 'bfloat16', requested 'float32'"):
        late.run()


def test_a_resumed_run_and_a_retry_compute_in_the_dtype_of_the_cache(extraction):
    extraction("c.zarr", "bfloat16", parts="0").run()
    again = extraction("c.zarr", "auto")  # loaded without knowing the cache
    assert again.run().parts == IMAGES - 1
    assert "nothing to retry" in again.retry().text()
    assert set(dtypes_of(again.config.cache).values()) == {"bfloat16"}


def test_models_loaded_for_a_cache_use_its_dtype_or_the_device_default_if_it_states_none(extraction):
    sets = extraction("c.zarr", "bfloat16").backbones.feature_sets()
    without = [replace(item, provenance={**item.provenance, "dtype": None}) for item in sets]
    for stored, expected in ((sets, "bfloat16"), (without, "float32")):
        again = Backbones.load("toy", device="cpu", stored={item.name: item for item in stored})
        assert {item.provenance["dtype"] for item in again.feature_sets()} == {expected}


def test_a_machine_that_does_not_support_the_dtype_of_a_cache_refuses_in_one_line(extraction, monkeypatch):
    stored = {item.name: item for item in extraction("c.zarr", "bfloat16").backbones.feature_sets()}
    monkeypatch.setattr(dtypes.torch.amp, "is_autocast_available", lambda device: False)
    with pytest.raises(InputError, match="dtype bfloat16: torch does not compute in it on cpu; use float32"):
        Backbones.load("toy", device="cpu", stored=stored)
