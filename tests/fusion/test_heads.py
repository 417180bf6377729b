"""Heads other than the fusion head: pooling in boxes, the protocol, the user's own classes, training and few-shot."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from makers import make_manifest

from regionspot.cache import Category, FeatureCache, FeatureSet, ImageFeatures
from regionspot.cache.errors import InputError, WeightsError
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint, save_checkpoint
from regionspot.fusion.head import HEADS, similarity_logits
from regionspot.fusion.heads import HEAD_TYPES, HeadSpec
from regionspot.fusion.heads.pooling import box_weights, pool_boxes, relative_boxes
from regionspot.fusion.heads.spec import parse_options
from regionspot.fusion.tensor_file import read_document
from regionspot.fusion.training.config import TrainConfig
from regionspot.fusion.training.train import train
from regionspot.fusion.vocabulary import Vocabulary

SHAPES = {"token_dim": 12, "width": 16, "text_dim": 8}
OPTIONS = {
    "fusion": {"layers": 1, "heads": 4, "ffn": 24},
    "guided": {"layers": 1, "heads": 4, "ffn": 24},
    "linear": {},
    "mlp": {"hidden": 20},
    "roi_pool": {"grid": 2, "channels": 6, "hidden": 20},
    "prototypes": {"classes": 5},
}
SPECS = [HeadSpec(type=name, options=OPTIONS[name], **SHAPES) for name in HEAD_TYPES]
LINEAR = next(spec for spec in SPECS if spec.type == "linear")
each_head = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.type)

OWN_HEAD = """
from pathlib import Path
from torch import nn

Path(__file__).with_suffix(".ran").touch()

class MyHead(nn.Module):
    def __init__(self, token_dim, width, text_dim, factor=1):
        super().__init__()
        self.factor = factor
        self.projector = nn.Linear(token_dim, text_dim)

    def forward(self, tokens, region_mask, feature_map, boxes):
        return self.factor * self.projector(tokens)

class NoModule:
    def __init__(self, token_dim, width, text_dim): pass

class Broken(nn.Module):
    def __init__(self, token_dim, width, text_dim): raise ValueError("no such luck")

def two_arguments(a, b): pass
"""


def built(spec: HeadSpec) -> torch.nn.Module:
    """The head in evaluation mode, with random numbers also where only fitting would set them."""
    torch.manual_seed(0)
    head = spec.build().eval()
    for buffer in head.buffers():
        if buffer.ndim == 2:
            buffer.copy_(F.normalize(torch.randn(buffer.shape), dim=-1))
    return head


def inputs(images: int = 2, regions: int = 3) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor]:
    """Tokens, no mask, maps of 3 x 3 patches, boxes."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(images, regions, 4, generator=generator) / 2
    boxes = torch.cat([corners[..., :2], corners[..., 2:] + 0.5], dim=-1)
    tokens = torch.randn(images, regions, 12, generator=generator)
    return tokens, None, torch.randn(images, 10, 16, generator=generator), boxes


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Pooling


def weights_of(box, size, side: int, grid: int = 1) -> np.ndarray:
    """(grid * grid, side, side) of a box in pixels of an image of `size` (height, width)."""
    relative = relative_boxes(np.float32([box]), *size)
    return box_weights(torch.from_numpy(relative), side, grid)[0].reshape(-1, side, side).numpy()


def test_a_box_over_the_whole_image_has_equal_weights():
    assert weights_of([0, 0, 300, 100], (100, 300), 4) == pytest.approx(np.full((1, 4, 4), 1 / 16))


def test_patches_are_weighted_by_their_overlap_with_the_box():
    # An image of 40 x 40 in 4 x 4 patches of 10: one whole patch, half of its right, a quarter of the lower ones.
    (weights,) = weights_of([10, 0, 25, 15], (40, 40), 4)
    assert weights[0, 1:3] == pytest.approx(np.array([100, 50]) / 225)
    assert weights[1, 1:3] == pytest.approx(np.array([50, 25]) / 225)
    assert weights.sum() == pytest.approx(1)


def test_the_patches_of_an_image_that_is_not_square_are_not_square():
    (weights,) = weights_of([50, 0, 100, 10], (10, 100), 2)
    assert weights == pytest.approx(np.array([[0, 0.5], [0, 0.5]]))


@pytest.mark.parametrize("box", [[35.2, 12.1, 35.9, 12.6], [35, 12, 35, 12], [39.99, 12, 45, 19], [35, 12, 34, 11]])
def test_a_tiny_empty_or_outer_box_has_the_patch_at_its_place(box):
    assert weights_of(box, (40, 40), 4)[0, 1, 3] == pytest.approx(1)


def test_the_cells_of_a_grid_are_row_major_and_have_their_own_patches():
    weights = weights_of([0, 0, 20, 40], (40, 40), 4, grid=2)
    expected = np.zeros((4, 4, 4))
    for cell, (y, x) in enumerate([(0, 0), (0, 1), (2, 0), (2, 1)]):
        expected[cell, y : y + 2, x] = 0.5
    assert weights == pytest.approx(expected)


def test_the_mean_of_a_box_leaves_out_the_class_token():
    feature_map = torch.full((1, 5, 3), 2.0)
    feature_map[:, 0] = 100
    pooled = pool_boxes(feature_map, torch.tensor([[[0.1, 0.2, 0.7, 0.9]]]))
    assert torch.allclose(pooled, torch.full((1, 1, 1, 3), 2.0))


def test_a_map_that_is_not_square_is_refused():
    with pytest.raises(InputError, match="6 patches, which is no square"):
        pool_boxes(torch.zeros(1, 7, 3), torch.zeros(1, 1, 4))


# The protocol


@each_head
def test_a_head_gives_one_vector_for_each_region(spec):
    head = built(spec)
    assert head(*inputs()).shape == (2, 3, 8)
    half = tuple(None if value is None else value.half() for value in inputs()[:3])
    torch.testing.assert_close(head(*half, inputs()[3]), head(*inputs()), atol=0.02, rtol=0.05)


@each_head
def test_padding_changes_nothing_and_gives_finite_vectors(spec):
    head, (tokens, _, feature_map, boxes) = built(spec), inputs()
    padded = [torch.cat([values, torch.zeros(2, 4, values.shape[-1])], dim=1) for values in (tokens, boxes)]
    mask = torch.tensor([[True] * 3 + [False] * 4, [False] * 7])  # the second image has no region
    vectors = head(padded[0], mask, feature_map, padded[1])
    torch.testing.assert_close(vectors[0, :3], head(tokens, None, feature_map, boxes)[0])
    assert torch.isfinite(vectors).all()


@each_head
def test_an_image_does_not_depend_on_the_others_of_its_batch(spec):
    head, (tokens, _, feature_map, boxes) = built(spec), inputs()
    alone = head(tokens[1:], None, feature_map[1:], boxes[1:])
    torch.testing.assert_close(head(tokens, None, feature_map, boxes)[1:], alone)


def test_a_head_with_boxes_is_one_graph_for_torch_compile_whatever_the_size_of_the_batch():
    head = built(SPECS[list(HEAD_TYPES).index("guided")])  # which uses all of the pooling
    compiled = torch.compile(head, dynamic=True, fullgraph=True, backend="eager")
    for images, regions in ((2, 3), (4, 5), (3, 9)):
        torch.testing.assert_close(compiled(*inputs(images, regions)), head(*inputs(images, regions)))


@pytest.mark.parametrize("name", ["linear", "mlp", "roi_pool", "prototypes"])
def test_a_head_without_attention_depends_on_the_box_of_a_region_and_on_no_other(name):
    head, (tokens, _, feature_map, boxes) = built(SPECS[list(HEAD_TYPES).index(name)]), inputs()
    moved = boxes.clone()
    moved[0, 1] = torch.tensor([0.0, 0.0, 0.3, 0.3])
    changed = (head(tokens, None, feature_map, moved) - head(tokens, None, feature_map, boxes)).abs().amax(dim=-1) > 0
    assert changed.tolist() == [[False, True, False], [False] * 3]


@each_head
def test_a_checkpoint_keeps_type_options_and_weights(spec, tmp_path):
    head, path = built(spec), tmp_path / "head.safetensors"
    save_checkpoint(path, spec, head, HeadInfo(preset="toy"))
    loaded = load_checkpoint(path)
    assert (loaded.spec, loaded.head.training) == (spec, False)
    assert torch.equal(loaded.head(*inputs()), head(*inputs()))


def test_a_fusion_head_is_written_as_by_earlier_versions(tmp_path):
    """Flat fields and no type: files and programs of both versions read each other's."""
    assert HeadSpec.from_json(asdict(HEADS["bb"])).as_json() == asdict(HEADS["bb"])
    save_checkpoint(tmp_path / "head.safetensors", SPECS[0], SPECS[0].build(), HeadInfo())
    header = read_document(tmp_path / "head.safetensors")["head"]
    assert header == {**SHAPES, "layers": 1, "heads": 4, "ffn": 24}


def test_a_checkpoint_of_a_type_that_this_version_lacks_is_refused_with_its_path(tmp_path):
    path, spec = tmp_path / "head.safetensors", SPECS[0]
    for changed, reason in ((replace(spec, type="newer"), "newer"), (replace(spec, options={"depth": 3}), "depth")):
        save_checkpoint(path, changed, spec.build(), HeadInfo())
        with pytest.raises(WeightsError, match=reason) as error:
            load_checkpoint(path)
        assert one_line(error).startswith(f"{path}: head ")


def test_options_are_read_from_text():
    texts = ["hidden=512", "dropout=0.5", "fast=true", "name=a=b", "list=[1, 2]"]
    assert parse_options(texts) == {"hidden": 512, "dropout": 0.5, "fast": True, "name": "a=b", "list": [1, 2]}
    for text in ("hidden", "=3", "a b=3"):
        with pytest.raises(InputError, match="expected name=value"):
            parse_options([text])


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("liner", {}, "linear"),
        ("mlp", {"hiden": 3}, "unexpected keyword argument 'hiden'.*token_dim, width, text_dim, hidden, dropout"),
        ("mlp", {"hidden": "large"}, "hidden.*large"),
        ("fusion", {"heads": 5}, "16 .* 5 heads"),
        ("absent.py:MyHead", {}, "absent.py.*expected file.py:Class"),
        ("no_such_module:MyHead", {}, "no_such_module.*expected file.py:Class"),
        ("own.py:Absent", {}, "Absent.*expected file.py:Class"),
        ("own.py:NoModule", {}, "NoModule, expected a class of torch modules"),
        ("own.py:Broken", {}, "no such luck"),
        ("own.py:two_arguments", {}, "its arguments are a, b"),
        ("own.py:MyHead", {"colour": "red"}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_head_that_cannot_be_built_is_refused_in_one_line(tmp_path, monkeypatch, name, options, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_HEAD)
    with pytest.raises(InputError, match=reason) as error:
        HeadSpec(type=name, options=options, **SHAPES).build()
    one_line(error)


# The user's own class


@pytest.fixture
def own(tmp_path):
    """The file of a class, and a checkpoint of it. The file leaves a mark beside it when its code runs."""
    source, checkpoint = tmp_path / "my_head.py", tmp_path / "head.safetensors"
    source.write_text(OWN_HEAD)
    spec = HeadSpec(type=f"{source}:MyHead", options={"factor": 3}, **SHAPES)
    save_checkpoint(checkpoint, spec, built(spec), HeadInfo(preset="toy"))
    source.with_suffix(".ran").unlink()
    return source, checkpoint


def test_a_checkpoint_alone_never_runs_the_code_of_its_class(own, monkeypatch):
    source, checkpoint = own
    monkeypatch.chdir(source.parent)
    with pytest.raises(InputError) as error:
        load_checkpoint(checkpoint)
    assert one_line(error).endswith("if you trust that code, name it with --head my_head.py:MyHead")
    assert not source.with_suffix(".ran").exists()


def test_a_class_is_loaded_when_the_user_names_it_also_from_another_folder(own, tmp_path):
    source, checkpoint = own
    moved = source.rename(tmp_path / "renamed.py")
    loaded = load_checkpoint(checkpoint, head_class=f"{moved}:MyHead")
    assert loaded.head.factor == 3
    tokens = inputs()[0]
    torch.testing.assert_close(loaded.head(*inputs()), 3 * loaded.head.projector(tokens))


def test_a_class_of_an_installed_module_is_loaded_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_package.py").write_text(OWN_HEAD)
    monkeypatch.syspath_prepend(tmp_path)
    spec, path = HeadSpec(type="my_package:MyHead", **SHAPES), tmp_path / "head.safetensors"
    save_checkpoint(path, spec, spec.build(), HeadInfo())
    assert load_checkpoint(path, head_class="my_package:MyHead").spec == spec


def test_another_class_than_the_checkpoints_is_refused_before_its_code_runs(own, tmp_path):
    source, checkpoint = own
    with pytest.raises(InputError, match=r"is my_head.py:MyHead, not .*my_head.py:Broken"):
        load_checkpoint(checkpoint, head_class=f"{source}:Broken")
    save_checkpoint(tmp_path / "linear.safetensors", LINEAR, LINEAR.build(), HeadInfo())
    with pytest.raises(InputError, match=r"is linear, not .*leave it out"):
        load_checkpoint(tmp_path / "linear.safetensors", head_class=f"{source}:MyHead")
    assert load_checkpoint(tmp_path / "linear.safetensors", head_class="linear").spec.type == "linear"
    assert not source.with_suffix(".ran").exists()


# Training

CLASSES, SIDE = 5, 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Images of two regions, left and right. Only the map under a box tells its class; no region is of the last."""
    rng, images = np.random.default_rng(0), 24
    classes = np.stack([rng.permutation(CLASSES - 1)[:2] for _ in range(images)]).astype(np.int32)
    boxes = np.tile(np.float32([[0, 0, 320, 480], [320, 0, 640, 480]]), (images, 1))
    manifest = make_manifest(
        [2] * images,
        boxes_xyxy=boxes,
        category_index=classes.ravel(),
        categories=tuple(Category(index + 1, f"class {index}") for index in range(CLASSES)),
    )
    sets = [FeatureSet("maps", "map", (1 + SIDE**2, 16)), FeatureSet("tokens", "token", (12,))]
    cache = FeatureCache.create(tmp_path_factory.mktemp("caches") / "halves.zarr", manifest, sets, part_size=8)
    looks = rng.standard_normal((CLASSES, 16))

    def image(row: int) -> ImageFeatures:
        patches = looks[np.repeat(classes[row], SIDE // 2)]  # one row of patches: left class, then right class
        maps = np.concatenate([np.zeros((1, 16)), np.tile(patches, (SIDE, 1))])
        maps += 0.3 * rng.standard_normal(maps.shape)
        return ImageFeatures(row, {"maps": maps, "tokens": rng.standard_normal((2, 12))})

    for part in range(cache.n_parts):
        cache.write_part(part, map(image, cache.part_rows(part)))
    return FeatureCache.open(cache.path)


@pytest.fixture(scope="module")
def vocabulary():
    embeddings = F.normalize(torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    return Vocabulary(tuple(f"class {index}" for index in range(CLASSES)), ("{}.",), embeddings, "d" * 64, "")


def accuracy(head, cache, vocabulary) -> float:
    batch = cache.read(np.arange(len(cache)))
    boxes = relative_boxes(batch.boxes_xyxy, cache.manifest.heights, cache.manifest.widths)
    tensors = [torch.from_numpy(values) for values in (batch.tokens, batch.region_mask, batch.feature_map, boxes)]
    with torch.inference_mode():
        logits = similarity_logits(head(*tensors), vocabulary.embeddings)
    return float((logits.argmax(dim=-1).numpy() == batch.categories).mean())


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("no_weights", "return tokens", "no weights to train"),
        (
            "one_vector",
            "return self.projector(tokens.float()).mean(dim=1)",
            r"returns \(1, 8\) .* expected \(1, 2, 8\)",
        ),
        ("logits", "return self.projector(tokens.float())[..., :3]", r"returns \(1, 2, 3\) .* expected \(1, 2, 8\)"),
        ("nothing", "pass", "returns a NoneType"),
        ("float32", "return self.projector(tokens)", "fails on float16 tokens .* --debug shows where"),
        ("mistake", "return self.projecter(tokens)", "'MyHead' object has no attribute 'projecter'.* --debug"),
    ],
)
def test_a_class_that_cannot_be_trained_is_refused_before_its_run(cache, vocabulary, tmp_path, name, code, reason):
    weights = "" if name == "no_weights" else "self.projector = nn.Linear(token_dim, text_dim)"
    (tmp_path / "my_head.py").write_text(f"""
from torch import nn

class MyHead(nn.Module):
    def __init__(self, token_dim, width, text_dim):
        super().__init__()
        {weights}

    def forward(self, tokens, region_mask, feature_map, boxes):
        {code}
""")
    config = TrainConfig(iterations=1, head=f"{tmp_path / 'my_head.py'}:MyHead")
    with pytest.raises(InputError, match=reason) as error:
        train([cache], [vocabulary], tmp_path / "run", config)
    one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["linear", "mlp", "roi_pool", "prototypes", "own"])
def test_a_head_learns_the_classes_from_the_map_under_each_box(cache, vocabulary, tmp_path, name):
    source = tmp_path / "my_head.py"
    source.write_text("from regionspot.fusion.heads.pooled import LinearHead\n\nclass MyHead(LinearHead):\n    pass\n")
    kind, options = (f"{source}:MyHead", {}) if name == "own" else (name, OPTIONS[name])
    options = {} if name == "prototypes" else options
    config = TrainConfig(lr=0.01, iterations=60, warmup=4, batch_size=8, head=kind, head_options=options)
    result = train([cache], [vocabulary], tmp_path / "run", config, preset="toy")
    trained = load_checkpoint(result.checkpoint, head_class=kind)
    assert accuracy(trained.head, cache, vocabulary) > 0.95
    assert trained.info.encoder == "maps"
    # The folder of the class may change; a run is resumed with the same class only.
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["head"] == kind.rpartition("/")[2]
    other = replace(config, head="fusion", head_options={"layers": 1, "heads": 4})
    with pytest.raises(InputError, match=r"its config\.head is"):
        train([cache], [vocabulary], tmp_path / "run", other, preset="toy", resume=True)


def test_prototypes_name_a_class_that_the_text_encoder_knows_nothing_about(cache, vocabulary, tmp_path):
    """Few-shot: a class is its examples, here of one class only; its text embedding may be any vector."""
    config = TrainConfig(iterations=1, head="prototypes")
    texts = torch.zeros(CLASSES, 8)
    texts[:, 0] = 1
    texts[2] = -texts[2]  # a name unlike all others
    result = train([cache], [Vocabulary(vocabulary.names, ("{}.",), texts, "e" * 64, "")], tmp_path / "run", config)
    head = load_checkpoint(result.checkpoint).head
    batch = cache.read(np.arange(len(cache)))
    boxes = relative_boxes(batch.boxes_xyxy, cache.manifest.heights, cache.manifest.widths)
    tensors = [torch.from_numpy(values) for values in (batch.tokens, batch.region_mask, batch.feature_map, boxes)]
    vectors = head(*tensors)
    assert (vectors[..., 0].numpy() < 0)[batch.categories == 2].mean() > 0.9
    assert (vectors[..., 0].numpy() > 0)[batch.categories != 2].mean() > 0.9


def test_prototypes_leave_out_classes_without_examples_and_join_caches(cache, vocabulary, tmp_path):
    more = replace(vocabulary, embeddings=vocabulary.embeddings.flip(0))
    config = TrainConfig(iterations=1, head="prototypes", head_options={"sharpness": 9})
    result = train([cache, cache], [vocabulary, more], tmp_path / "run", config)
    loaded = load_checkpoint(result.checkpoint)
    assert loaded.spec.options == {"sharpness": 9, "classes": 2 * (CLASSES - 1)}
    assert loaded.head.sharpness == 9
    torch.testing.assert_close(*loaded.head.prototypes.chunk(2))
    assert torch.equal(loaded.head.texts, torch.cat([vocabulary.embeddings[:-1], more.embeddings[:-1]]))
