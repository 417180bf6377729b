"""Incompatible features are refused: between caches, and between a head and a cache or loaded backbones."""

import json
from dataclasses import replace

import pytest
import torch

from regionspot.cache.errors import InputError, ProvenanceMismatchError
from regionspot.cache.format.compatibility import compare, description
from regionspot.cache.format.schema import FeatureSet
from regionspot.cache.store import FeatureCache
from regionspot.evaluation.evaluate import EvaluationOptions, evaluate
from regionspot.evaluation.inference.cache_vocabulary import cache_vocabulary
from regionspot.evaluation.inference.head_features import head_features
from regionspot.evaluation.inference.region_spot import RegionSpot
from regionspot.evaluation.report.tables import results_text
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint
from regionspot.fusion.training.config import train_config
from regionspot.fusion.training.train import train
from regionspot.pipeline.backbones import dtypes
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.datasets.registry import image_folder_of, read_dataset
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import extract

pytestmark = pytest.mark.usefixtures("module_home")

STEPS = train_config("toy", iterations=2, batch_size=2)


@pytest.fixture(scope="module")
def extracted(world, tmp_path_factory):
    """`extracted("direct", "bfloat16")`: a cache of two images of the toy validation split, extracted once."""
    caches = {}
    manifest = read_dataset("toy", world, "val").head(2)

    def cache_of(preprocess="direct", dtype="float32", exif="auto") -> FeatureCache:
        key = (preprocess, dtype, exif)
        if key not in caches:
            backbones = Backbones.load("toy", device="cpu", dtype=dtype, preprocess=preprocess)
            path = tmp_path_factory.mktemp("caches") / f"{'-'.join(key)}.zarr"
            caches[key] = FeatureCache.create(path, manifest, backbones.feature_sets(exif), 2)
            extract(caches[key], image_folder_of("toy", world, "val", manifest), backbones, ExtractConfig(exif=exif))
        return caches[key]

    return cache_of


def trained(caches, out):
    """The checkpoint of a head trained on these caches for two steps."""
    vocabularies = [cache_vocabulary(cache, "toy_clip", "plain") for cache in caches]
    return train(caches, vocabularies, out, STEPS, preset="toy").checkpoint


def released(head_of, path):
    """The same head in the file format of the authors' trainer."""
    state = load_checkpoint(head_of).head.state_dict()
    torch.save({"model": {f"model.{name}": tensor for name, tensor in state.items()}}, path)
    return path


@pytest.fixture
def options(world, tmp_path):
    return EvaluationOptions(
        data=world, out=tmp_path / "eval", dataset="toy", device="cpu", templates="plain", masks=False, limit=2
    )


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("other", "field", "option"),
    [
        ({"preprocess": "reference"}, "preprocess is reference, there direct", "--preprocess direct"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16, there float32", "--dtype float32"),
        ({"exif": "ignore"}, "exif is ignore, there auto", "--exif auto"),
    ],
)
def test_caches_with_different_features_do_not_train_together(extracted, tmp_path, other, field, option):
    caches = [extracted(), extracted(**other)]
    with pytest.raises(InputError) as error:
        trained(caches, tmp_path / "run")
    message = one_line(error)
    assert message.startswith(f"{caches[1].path}: its toy_clip (145, 192) features differ from those of")
    assert str(caches[0].path) in message
    assert field in message
    assert message.endswith(f"extract this cache again with {option}")
    assert not (tmp_path / "run").exists()


def test_a_cache_with_other_features_needs_no_check_weights(extracted, options, tmp_path, caplog):
    head = trained([extracted()], tmp_path / "run")
    on_own = replace(options, checkpoint=head, cache=extracted().path)
    assert evaluate(on_own)["protocol"]["preprocess"] == "direct"
    other = replace(on_own, cache=extracted("reference").path, out=tmp_path / "other")
    with pytest.raises(ProvenanceMismatchError) as error:
        evaluate(other)
    message = one_line(error)
    assert message.startswith(f"{other.cache}: its toy_sam features differ from those that {head} was")
    assert "preprocess is reference, there direct" in message
    assert "extract another cache with --preprocess direct, or evaluate from images, without --cache" in message
    assert evaluate(replace(other, check_weights=False))["protocol"]["preprocess"] == "reference"
    assert "preprocess is reference, there direct; scores may be worse" in caplog.text


def test_a_released_head_uses_the_authors_preprocessing(extracted, options, tmp_path, caplog):
    head = released(trained([extracted("reference")], tmp_path / "run"), tmp_path / "head.pth")
    with pytest.raises(ProvenanceMismatchError, match=r"preprocess is direct, there reference.*--preprocess reference"):
        evaluate(replace(options, checkpoint=head, cache=extracted().path))
    results = evaluate(replace(options, checkpoint=head, cache=extracted("reference").path))
    assert results["protocol"]["preprocess"] == "reference"
    spot = RegionSpot.load(head, device="cpu")
    assert {model.provenance["preprocess"] for model in (spot.localizer, spot.encoder)} == {"reference"}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def sets_of(encoder, pixels, **more) -> list[FeatureSet]:
    provenance = {"preprocess": "reference", "exif": "auto", "dtype": "float32", **more}
    tokens = FeatureSet("sam_vit_b", "token", (256,), provenance={"model": "sam_vit_b", **provenance})
    maps = FeatureSet(encoder, "map", (5, 1024), provenance={"model": encoder, "input_pixels": pixels, **provenance})
    return [tokens, maps]


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        (sets_of("clip_vit_l_14_336", 336), "holds the feature sets sam_vit_b, clip_vit_l_14_336"),
        (sets_of("clip_vit_l_14", 336), "input_pixels is 336, there 224"),
        (sets_of("clip_vit_l_14", 224, preprocess="direct"), "preprocess is direct, there reference"),
    ],
)
def test_a_released_bl_head_needs_bl_features(small, tmp_path, sets, problem):
    cache = FeatureCache.create(tmp_path / "a.zarr", small.manifest, sets)
    with pytest.raises(ProvenanceMismatchError) as error:
        head_features(tmp_path / "bl.pth", HeadInfo(preset="bl")).require_cache(cache)
    message = one_line(error)
    assert problem in message
    assert str(cache.path) in message
    assert f"{tmp_path / 'bl.pth'}" in message


def test_weights_that_a_released_head_only_implies_log_a_warning(small, tmp_path, caplog):
    sets = sets_of("clip_vit_l_14", 224, weights_sha256="random:0")
    cache = FeatureCache.create(tmp_path / "a.zarr", small.manifest, sets)
    head_features(tmp_path / "bl.pth", HeadInfo(preset="bl")).require_cache(cache)
    assert "weights is random:0, there ec2df62732614e57" in caplog.text


def test_predict_and_evaluation_compute_in_the_dtype_of_the_heads_features(extracted, options, tmp_path, caplog):
    head = trained([extracted(dtype="bfloat16")], tmp_path / "run")
    results = evaluate(replace(options, checkpoint=head))
    assert results["protocol"]["dtype"] == "bfloat16"
    backbones = (results["identity"][name] for name in ("localizer", "encoder"))
    assert {provenance["dtype"] for provenance in backbones} == {"bfloat16"}
    assert "bfloat16" in results_text(results)
    assert json.loads((options.out / "results.json").read_text())["protocol"]["dtype"] == "bfloat16"
    spot = RegionSpot.load(head, device="cpu")
    assert (spot.localizer.provenance["dtype"], spot.encoder.provenance["dtype"]) == ("bfloat16", "bfloat16")
    assert "trained with" not in caplog.text
    on_cache = replace(options, checkpoint=head, cache=extracted(dtype="bfloat16").path)
    with pytest.raises(ProvenanceMismatchError, match="extracted with --dtype bfloat16, not float32"):
        evaluate(replace(on_cache, dtype="float32"))


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        ({"dtype": "float32"}, "runs on toy_sam with dtype float32, trained with bfloat16; scores may be worse"),
        ({"preprocess": "reference"}, "runs on toy_clip with preprocess reference, trained with direct; scores may"),
    ],
)
def test_another_dtype_or_preprocessing_logs_a_warning(extracted, tmp_path, caplog, overrides, warning):
    head = trained([extracted(dtype="bfloat16")], tmp_path / "run")
    RegionSpot.load(head, device="cpu", **overrides)
    assert f"{head}: {warning}" in caplog.text


def test_another_exif_rule_logs_a_warning(extracted, options, tmp_path, caplog):
    head = trained([extracted(exif="ignore")], tmp_path / "run")
    assert evaluate(replace(options, checkpoint=head))["protocol"]["exif"] == "ignore"
    assert "exif" not in caplog.text
    results = evaluate(replace(options, checkpoint=head, exif="apply", out=tmp_path / "other"))
    assert results["protocol"]["exif"] == "apply"
    assert "was trained on images with --exif ignore; evaluated with --exif apply" in caplog.text


def test_a_dtype_that_the_device_does_not_support_is_refused_in_one_line(extracted, tmp_path, monkeypatch):
    head = trained([extracted(dtype="bfloat16")], tmp_path / "run")
    monkeypatch.setattr(dtypes.torch.amp, "is_autocast_available", lambda device: False)
    with pytest.raises(InputError, match="dtype bfloat16: torch does not compute in it on cpu") as error:
        RegionSpot.load(head, device="cpu")
    one_line(error)


def test_tokens_and_maps_with_different_exif_rules_are_refused(small, tmp_path):
    tokens, maps = sets_of("clip_vit_l_14", 224)
    ignoring_exif = replace(maps, provenance={**maps.provenance, "exif": "ignore"})
    cache = FeatureCache.create(tmp_path / "a.zarr", small.manifest, [tokens, ignoring_exif])
    with pytest.raises(
        InputError, match=r"sam_vit_b was extracted with --exif auto and clip_vit_l_14 with --exif igno"
    ):
        head_features(tmp_path / "bl.pth", HeadInfo(preset="bl")).require_cache(cache)


def test_a_head_without_a_record_of_its_features_lists_the_unknown_fields(small, tmp_path, caplog):
    cache = FeatureCache.create(tmp_path / "a.zarr", small.manifest, sets_of("clip_vit_l_14", 224))
    info = HeadInfo(localizer="sam_vit_b", encoder="clip_vit_l_14")
    head_features(tmp_path / "old.safetensors", info).require_cache(cache)
    assert f"{tmp_path / 'old.safetensors'}: these fields of its sam_vit_b features are unknown" in caplog.text
    assert "not compared: model, preprocess, exif, dtype" in caplog.text


FEATURES = FeatureSet(
    "clip",
    "map",
    (5, 8),
    provenance={
        "model": "clip",
        "weights_sha256": "a" * 64,
        "weights_origin": "official",
        "input_pixels": 224,
        "preprocess": "direct",
        "resize": "a rule",
        "exif": "auto",
        "dtype": "float32",
        "mean": [0.1],
        "versions": {"torch": "2"},
    },
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_sha256", "b" * 64),
        ("input_pixels", 336),
        ("mean", [0.2]),
    ],
)
def test_different_provenance_fields_are_incompatible(field, value):
    other = replace(FEATURES, provenance={**FEATURES.provenance, field: value})
    comparison = compare(description(FEATURES), description(other))
    assert [(difference.field, difference.found) for difference in comparison.differences] == [(field, value)]


@pytest.mark.parametrize(
    "other",
    [
        replace(FEATURES, dtype="int8"),
        replace(FEATURES, compression="zstd"),
        replace(FEATURES, provenance={**FEATURES.provenance, "versions": {"torch": "3", "new": "1"}}),
        replace(FEATURES, provenance={**FEATURES.provenance, "weights_origin": "file"}),
    ],
    ids=["encoding", "compression", "software", "where the weights were found"],
)
def test_encoding_versions_and_origin_do_not_matter(other):
    assert not compare(description(FEATURES), description(other)).differences


def test_tuples_and_lists_compare_as_equal():
    assert not compare(description(FEATURES), {**description(FEATURES), "shape": (5, 8), "mean": (0.1,)}).differences


def test_another_shape_is_incompatible():
    (difference,) = compare(description(FEATURES), description(replace(FEATURES, shape=(10, 8)))).differences
    assert (difference.field, difference.expected, difference.found) == ("shape", [5, 8], [10, 8])


def test_fields_that_only_one_side_states_are_listed_as_unstated():
    other = replace(FEATURES, provenance={name: FEATURES.provenance[name] for name in ("model", "weights_sha256")})
    comparison = compare(description(FEATURES), description(other))
    assert comparison.missing == ("input_pixels", "preprocess", "exif", "dtype")
    assert not comparison.differences
