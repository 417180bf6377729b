"""open_clip models that are not a plain CLIP: their feature maps, and embeddings equal to open_clip's.

The models are small: open_clip's own classes with timm's test towers, from configurations in this file.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from timm.models.eva import Eva

from regionspot import cli
from regionspot.cache import FeatureCache
from regionspot.cache.errors import InputError
from regionspot.evaluation.inference.baselines import MapBaseline
from regionspot.pipeline.backbones import open_clip_models
from regionspot.pipeline.backbones.clip import ClipEncoder, load_encoder, load_text_encoder
from regionspot.pipeline.backbones.dense import dense_path, require_dense
from regionspot.pipeline.backbones.open_clip_models import config_of, is_plain
from regionspot.pipeline.backbones.protocols import ProjectingEncoder, TextEncoder
from regionspot.pipeline.backbones.registry import stored_name

TEXT = {"context_length": 16, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 1}
TIMM = {"image_size": 160, "timm_model_pretrained": False}
CONFIGS = {
    # Like PE-Core and EVA: a timm tower with a class token, and a causal text tower.
    "tiny-pe": {
        "custom_text": True,
        "vision_cfg": {**TIMM, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    # Like SigLIP: no class token, attention pooling, and a text tower without a mask, whose tokenizer is on a hub.
    "tiny-siglip": {
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {**TIMM, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear"},
        "text_cfg": {
            **TEXT,
            "vocab_size": 100,
            "hf_tokenizer_name": "nobody/nothing",
            "no_causal_mask": True,
            "pool_type": "last",
        },
    },
    "tiny-convnext": {
        "vision_cfg": {**TIMM, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "tiny-resnet": {
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
    "tiny-roberta": {
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"hf_model_name": "nobody/nothing", "hf_tokenizer_name": "nobody/nothing"},
    },
    "tiny-coca": {
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 64,
            "patch_size": 16,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    },
}
PATCHES = {"tiny-pe": 100, "tiny-siglip": 100, "tiny-convnext": 25, "tiny-resnet": 4, "tiny-roberta": 4, "tiny-coca": 4}
WITH_CLASS_TOKEN = {"tiny-pe", "tiny-roberta", "tiny-coca"}


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 32, **config}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 255, (10, 15, 3), np.uint8)
    return Image.fromarray(noise).resize((120, 80), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def encoders(configs):
    return {name: load_encoder(f"open_clip:{name}", "random:0") for name in CONFIGS}


def close(actual, expected, relative=1e-5) -> bool:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_maps_have_the_stated_shape_and_class_token(encoders, image, name):
    encoder = encoders[name]
    batch = torch.stack([encoder.preprocess(image), encoder.preprocess(image.rotate(180))])
    maps = encoder.encode(batch)
    assert maps.shape == (2, *encoder.map_shape)
    assert encoder.map_shape[0] == PATCHES[name] + (name in WITH_CLASS_TOKEN)
    assert encoder.provenance["class_token"] is (name in WITH_CLASS_TOKEN)
    assert torch.isfinite(maps).all()
    assert not close(maps[0], maps[1], 0.01)
    assert encoder.embed_images(batch).shape == (2, encoder.text_dim)


@pytest.mark.parametrize("name", ["tiny-pe", "tiny-siglip"])
def test_maps_are_the_output_of_the_last_block_without_registers(encoders, image, name):
    encoder = encoders[name]
    batch, outputs = encoder.preprocess(image)[None], []
    trunk = encoder._visual.trunk
    handle = trunk.blocks[-1].register_forward_hook(lambda *call: outputs.append(call[2]))
    encoder.embed_images(batch)
    handle.remove()
    patches = outputs[0][:, trunk.num_prefix_tokens :]
    expected = torch.cat([outputs[0][:, :1], patches], 1) if name in WITH_CLASS_TOKEN else patches
    assert close(encoder.encode(batch), expected)


def test_embeddings_equal_open_clips(encoders, image):
    encoder, prompts = encoders["tiny-pe"], ["a dog", "a cat on a mat"]
    ids = open_clip.get_tokenizer("tiny-pe")(prompts)
    batch = encoder.preprocess(image)[None]
    assert close(encoder.embed_prompts(prompts), encoder._model.encode_text(ids))
    assert close(encoder.embed_images(batch), encoder._model.encode_image(batch))
    assert encoder.embed_prompts([]).shape == (0, encoder.text_dim)
    assert isinstance(encoder, TextEncoder)
    assert not isinstance(encoder, ProjectingEncoder)


def test_without_its_tokenizer_an_encoder_gives_only_maps_and_names_the_extra(encoders, image, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    encoder = encoders["tiny-siglip"]
    assert encoder.encode(encoder.preprocess(image)[None]).shape == (1, *encoder.map_shape)
    with pytest.raises(InputError, match=r"the tokenizer nobody/nothing, .* pip install 'regionspot\[text\]'") as error:
        encoder.embed_prompts(["a dog"])
    assert "\n" not in str(error.value)


def test_a_text_tower_of_hugging_face_is_not_built(encoders, configs, tmp_path):
    encoder = encoders["tiny-roberta"]
    path = tmp_path / "roberta.pt"
    torch.save(
        {**encoder._model.state_dict(), "text.transformer.weight": torch.zeros(3), "logit_scale": torch.tensor(1.0)},
        path,
    )
    again = load_encoder("open_clip:tiny-roberta", str(path))
    blank = torch.zeros(1, 3, 32, 32)
    assert torch.equal(again.encode(blank), encoder.encode(blank))
    with pytest.raises(InputError, match="it gives maps, but class names need another encoder"):
        again.embed_prompts(["a dog"])


def test_weights_with_open_clips_older_names_are_read(encoders, tmp_path):
    encoder = encoders["tiny-pe"]
    weights = {name.removeprefix("text."): tensor for name, tensor in encoder._model.state_dict().items()}
    path = tmp_path / "older.pt"
    torch.save({**weights, "logit_scale": weights["logit_scale"].reshape(1)}, path)
    again = load_encoder("open_clip:tiny-pe", str(path))
    assert torch.equal(again.embed_prompts(["a dog"]), encoder.embed_prompts(["a dog"]))
    assert again.logit_scale == encoder.logit_scale


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_image_is_resized_as_in_open_clip_if_its_authors_resize_to_a_square(image, monkeypatch, interpolation):
    published = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.5, 0.6, 0.7),
        "interpolation": interpolation,
        "resize_mode": "squash",
    }
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["own"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: published)
    encoder = load_encoder("open_clip:tiny-siglip", "random:0")
    theirs = open_clip.image_transform(160, is_train=False, **published)
    assert close(encoder.preprocess(image), theirs(image), 1e-6)
    assert encoder.provenance["resize"] == f"PIL {interpolation} to 160 x 160, aspect not kept"
    reduced = load_encoder("open_clip:tiny-siglip", "random:0", preprocess="reference")
    assert "shorter edge 800" in reduced.provenance["resize"]
    assert not close(reduced.preprocess(image), encoder.preprocess(image), 1e-3)


def test_plain_clips_are_recognised_by_their_configuration():
    plain = ("ViT-B-16", "ViT-L-14-336-quickgelu", "ViT-H-14", "ViT-B-32-256")
    other = (
        "ViT-B-16-SigLIP2",
        "PE-Core-B-16",
        "EVA02-B-16",
        "convnext_base",
        "coca_ViT-B-32",
        "RN50",
        "ViT-H-14-CLIPA",
    )
    assert all(is_plain(config_of(name)) for name in plain)
    assert not any(is_plain(config_of(name)) for name in other)
    assert isinstance(load_encoder("open_clip:ViT-S-32-alt", "random:0"), ClipEncoder)


def test_an_encoder_without_text_is_refused_where_class_names_are_needed(configs, monkeypatch):
    assert load_text_encoder("open_clip:tiny-pe", "random:0").text_dim == 32
    monkeypatch.delattr("regionspot.pipeline.backbones.open_clip_encoder.OpenClipEncoder.embed_prompts")
    with pytest.raises(InputError, match="has no text tower, which class names need"):
        load_text_encoder("open_clip:tiny-pe", "random:0")


def test_an_unknown_tag_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="has no pretrained tag 'openai'; expected one of: webli"):
        load_encoder("open_clip:ViT-B-16-SigLIP2:openai", "random:0")
    official = open_clip_models.build_open_clip("PE-Core-T-16-384", "meta").official
    assert official.url.startswith("https://huggingface.co/timm/PE-Core-T-16-384/resolve/main/")


@pytest.mark.usefixtures("home")
def test_a_head_is_trained_on_maps_without_a_class_token_and_predicts(configs, world, tmp_path, monkeypatch, capsys):
    cache, out = str(tmp_path / "a.zarr"), tmp_path / "run"
    name = "open_clip:tiny-convnext"
    random = ["--clip-weights", "random:0"]
    options = ["--tokens", "all", "--limit", 4, *random]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["regionspot", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capsys.readouterr().err

    run("extract", "toy", "--data", world, "--cache", cache, "--preset", "toy", "--encoder", name, *options)
    short = ["--iterations", 2, "--batch-size", 2, "--templates", "plain"]
    run("train", "--cache", cache, "--out", out, "--preset", "toy", "--encoder", name, *short, *random)
    assert set(FeatureCache.open(cache).feature_sets) == {"toy_sam", "toy_sam_slots", "toy_sam_iou", stored_name(name)}
    image = next(world.rglob("*.jpg"))
    capsys.readouterr()
    boxes_and_names = ["--boxes", "0,0,50,50", "--names", "star,moon"]
    run("predict", image, "--checkpoint", out / "head.safetensors", *boxes_and_names, *random)
    assert '"star"' in capsys.readouterr().out


def test_the_pooled_baseline_needs_a_projectable_map(encoders):
    with pytest.raises(InputError, match=r"tiny-pe: has no projection of its map .* use --baseline crop"):
        MapBaseline("pooled", encoders["tiny-pe"], None, None, None)


def test_a_dense_map_is_the_value_path_of_the_last_block_in_the_joint_space(encoders, image):
    encoder = encoders["tiny-pe"]
    batch, inputs, trunk = encoder.preprocess(image)[None], [], encoders["tiny-pe"]._visual.trunk
    handle = trunk.blocks[-1].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    feature_map, dense_map = encoder.encode_with_dense(batch)
    handle.remove()
    assert torch.equal(feature_map, encoder.encode(batch))
    block, patches = trunk.blocks[-1], inputs[0][:, trunk.num_prefix_tokens :]
    values = block.attn.qkv(block.norm1(patches)).chunk(3, dim=-1)[2]
    expected = encoder._visual.head(trunk.fc_norm(trunk.norm(block.ls1(block.attn.proj(values)))))
    assert dense_map.shape == (1, *encoder.dense_shape) == (1, 100, 32)
    assert close(dense_map, expected)


@torch.no_grad()
def test_the_dense_map_of_an_eva_tower_is_its_value_path():
    trunk = Eva(32, 16, embed_dim=16, depth=2, num_heads=2, num_classes=8, init_values=0.1, use_rot_pos_emb=True).eval()
    patches, block = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)), trunk.blocks[-1]
    attention, normed = block.attn, block.norm1(patches)
    values = normed @ attention.qkv.weight.chunk(3)[2].T + attention.v_bias
    expected = trunk.head(trunk.fc_norm(trunk.norm(block.gamma_1 * attention.proj(values))))
    assert close(dense_path(SimpleNamespace(trunk=trunk, head=torch.nn.Identity()))(patches), expected)


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-convnext", "tiny-resnet", "tiny-coca"])
def test_encoders_that_do_not_project_each_token_have_no_dense_map(encoders, name):
    assert encoders[name].dense_shape is None
    with pytest.raises(InputError, match=rf"{name}: has no dense map, .*or use --baseline crop") as error:
        require_dense(encoders[name])
    assert "\n" not in str(error.value)
