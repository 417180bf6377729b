"""Our localizer and encoder equal the original libraries' slower code."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from torch.utils._python_dispatch import TorchDispatchMode

from regionspot.cache.errors import InputError, WeightsError
from regionspot.pipeline.backbones import sam, sam_token_decoder
from regionspot.pipeline.backbones.builders import CLIP_MODELS, PRESETS, build_clip, build_sam
from regionspot.pipeline.backbones.clip import load_encoder
from regionspot.pipeline.backbones.open_clip_models import contiguous_attention
from regionspot.pipeline.backbones.registry import ENCODERS, LOCALIZERS, stored_name
from regionspot.pipeline.backbones.sam import load_localizer
from regionspot.pipeline.backbones.state_dicts import skip_init
from regionspot.pipeline.backbones.weights import OFFICIAL, random_weights

BOXES = np.array([[10, 20, 100, 60], [0, 0, 119.5, 79], [50.25, 60, 90, 79], [3, 3, 9, 9]], np.float32)


@pytest.fixture(scope="module")
def localizer():
    return load_localizer("toy_sam", "random:0")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("toy_clip", "random:0")


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 255, (10, 15, 3), np.uint8)
    return Image.fromarray(noise).resize((120, 80), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def embedding(localizer, image):
    return localizer.encode([localizer.preprocess(image)])[0]


def close(actual, expected, relative=1e-5) -> bool:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max()) <= relative * float(expected.abs().max())


def tokens_of(localizer, embedding, boxes, size):
    return localizer.tokens_of_images(embedding[None], [boxes], [size])[0]


def test_every_preset_names_backbones_that_exist():
    for preset in PRESETS.values():
        assert preset.localizer in LOCALIZERS.names()
        assert preset.encoder in ENCODERS.names()


def test_every_preset_states_its_encoders_input_size():
    for preset in PRESETS.values():
        assert build_clip(preset.encoder).model.visual.image_size == (preset.clip_pixels, preset.clip_pixels)


def test_openai_models_use_quick_gelu():
    for name in CLIP_MODELS:
        block = build_clip(name).model.visual.transformer.resblocks[0]
        assert type(block.mlp.gelu).__name__ == "QuickGELU"


def test_building_a_model_does_not_change_the_global_random_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_sam("toy_sam")
    build_clip("toy_clip")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_built_without_initialisation_equals_one_built_with_it():
    expected = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    with skip_init():
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    model.load_state_dict(expected.state_dict())
    values = torch.randn(3, 8)
    assert torch.equal(model(values), expected(values))


def test_masks_equal_the_official_predictor(localizer, embedding, image):
    predictor = SamPredictor(localizer._sam)
    predictor.set_image(np.asarray(image))
    boxes = predictor.transform.apply_boxes_torch(torch.from_numpy(BOXES), (image.height, image.width))
    expected, _, _ = predictor.predict_torch(None, None, boxes=boxes, multimask_output=False)
    tokens, masks = localizer.tokens_and_masks(embedding, BOXES, (image.height, image.width))
    assert close(embedding, predictor.features[0])
    assert masks.dtype == bool
    assert 0.05 < masks.mean() < 0.95  # neither empty nor full
    assert (masks != expected[:, 0].numpy()).mean() < 1e-3
    assert close(tokens, tokens_of(localizer, embedding, BOXES, (image.height, image.width)))


@pytest.mark.parametrize("points", [1, 3])
def test_masks_of_points_equal_the_official_predictor(localizer, embedding, image, points):
    predictor = SamPredictor(localizer._sam)
    predictor.set_image(np.asarray(image))
    size = (image.height, image.width)
    points_xy = (np.random.default_rng(0).random((20, points, 2)) * size[::-1]).astype(np.float32)
    labels = np.tile(np.arange(points) != 1, (20, 1)).astype(np.int64)  # the second point is outside of the region
    scaled = torch.from_numpy(predictor.transform.apply_coords(points_xy, size))
    expected, iou, _ = predictor.predict_torch(scaled, torch.from_numpy(labels), multimask_output=points == 1)
    masks = localizer.masks_of_points(embedding, points_xy, labels, size)
    assert 0.05 < masks.mean() < 0.95
    assert (masks != expected[torch.arange(20), iou.argmax(1)].numpy()).mean() < 1e-3
    assert localizer.masks_of_points(embedding, points_xy[:0], labels[:0], size).shape == (0, *size)


def test_proposed_boxes_equal_those_of_the_official_mask_generator(image, monkeypatch):
    trained, size = load_localizer("toy_sam"), (image.height, image.width)
    # The toy SAM was trained on boxes alone: of points it makes worse masks.
    for name, limit in {"POINTS_PER_SIDE": 6, "MIN_PREDICTED_IOU": 0.35, "MIN_STABILITY": 0.2}.items():
        monkeypatch.setattr(sam, name, limit)
    official = SamAutomaticMaskGenerator(trained._sam, 6, pred_iou_thresh=0.35, stability_score_thresh=0.2)
    expected = np.array([mask["bbox"] for mask in official.generate(np.asarray(image))])
    expected[:, 2:] += expected[:, :2] + 1  # from the last pixel of a mask to its edge
    proposed = trained.propose_boxes(trained.encode([trained.preprocess(image)])[0], size)
    assert 5 < len(proposed) < 30  # both limits and the suppression of repeated boxes drop some of 108 masks
    assert proposed.tolist() == expected.tolist()


def test_tokens_do_not_depend_on_the_batch_of_boxes(localizer, embedding, monkeypatch):
    together = tokens_of(localizer, embedding, BOXES, (80, 120))
    monkeypatch.setattr(sam_token_decoder, "CHUNK_BYTES", {"cpu": 1})
    grouped = tokens_of(localizer, embedding, BOXES, (80, 120))
    alone = torch.cat([tokens_of(localizer, embedding, box[None], (80, 120)) for box in BOXES])
    assert together.shape == (len(BOXES), localizer.token_dim)
    assert close(grouped, together)
    assert close(alone, together)
    assert not close(together[0], together[3], relative=0.01)


def test_an_image_without_boxes_has_no_tokens_and_no_masks(localizer, embedding):
    none = BOXES[:0]
    tokens, masks = localizer.tokens_and_masks(embedding, none, (80, 120))
    assert tokens.shape == tokens_of(localizer, embedding, none, (80, 120)).shape == (0, localizer.token_dim)
    assert masks.shape == (0, 80, 120)


def test_images_of_different_sizes_are_encoded_in_one_batch(localizer, image):
    images = [localizer.preprocess(image), localizer.preprocess(image.rotate(90, expand=True))]
    together = localizer.encode(images)
    assert close(together[1], localizer.encode(images[1:])[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_dtype_rounds_the_encoders_but_not_the_token_decoder(localizer, encoder, image, embedding, dtype):
    small = load_localizer("toy_sam", "random:0", dtype=dtype)
    rounded = small.encode([small.preprocess(image)])[0]
    assert rounded.dtype == torch.float32
    assert not close(rounded, embedding, 1e-6)
    assert close(rounded, embedding, 0.05)
    assert torch.equal(tokens_of(small, embedding, BOXES, (80, 120)), tokens_of(localizer, embedding, BOXES, (80, 120)))
    other, batch = load_encoder("toy_clip", "random:0", dtype=dtype), encoder.preprocess(image)[None]
    assert not close(other.encode(batch), encoder.encode(batch), 1e-6)
    assert close(other.encode(batch), encoder.encode(batch), 0.05)
    assert torch.equal(other.embed_prompts(["a cat"]), encoder.embed_prompts(["a cat"]))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest input of any operation; an expanded tensor, which bmm copies, counts in full."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.elements = max([self.elements, *(tensor.numel() for tensor in args if isinstance(tensor, torch.Tensor))])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_weights_are_not_copied_per_position(dtype):
    encoder = load_encoder("toy_clip", "random:0", dtype=dtype)
    tokens, width = encoder.map_shape
    with LargestTensor() as largest:
        encoder.encode(torch.zeros(8, 3, encoder.pixels, encoder.pixels))
    assert 0 < largest.elements < tokens * width**2  # one copy of the projection's weight per position


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", ["qqq", "qkk", "qkv"])
def test_contiguous_attention_computes_the_same(inputs, dtype):
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval().to(dtype)
    tensors = {name: torch.randn(3, length, 16, dtype=dtype) for name, length in (("q", 5), ("k", 7), ("v", 7))}
    tensors["v"] = tensors["v"] if "v" in inputs else tensors["k"]
    with torch.no_grad():
        expected = attention(*(tensors[name] for name in inputs))
        contiguous_attention(torch.nn.Sequential(attention), torch.device("cpu"), "bfloat16")
        outputs = attention(*(tensors[name] for name in inputs))
    for contiguous, original in zip(outputs, expected, strict=True):
        assert close(contiguous.float(), original.float(), 1e-6 if dtype == torch.float32 else 0.02)


def test_the_projected_class_token_equals_clips_image_embedding(encoder, image):
    batch = torch.stack([encoder.preprocess(image), encoder.preprocess(image.rotate(180))])
    feature_map = encoder.encode(batch)
    assert feature_map.shape == (2, *encoder.map_shape)
    assert close(encoder.project(feature_map)[:, 0], encoder._clip.encode_image(batch))
    assert torch.equal(encoder.embed_images(batch), encoder.project(feature_map[:, 0]))


def test_the_map_is_taken_before_the_last_layer_norm(encoder, image):
    batch = encoder.preprocess(image)[None]
    inputs = []
    handle = encoder._clip.visual.ln_post.register_forward_pre_hook(lambda _, values: inputs.append(values[0]))
    encoder._clip.encode_image(batch)
    handle.remove()
    assert close(encoder.encode(batch), inputs[0])


@torch.no_grad()
def test_the_dense_map_is_the_value_path_of_the_last_block_from_the_same_pass(encoder, image):
    batch, inputs, visual = encoder.preprocess(image)[None], [], encoder._clip.visual
    block = visual.transformer.resblocks[-1]
    handle = block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    feature_map, dense_map = encoder.encode_with_dense(batch)
    handle.remove()
    assert len(inputs) == 1
    assert torch.equal(feature_map, encoder.encode(batch))
    attention = block.attn
    weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    values = attention.out_proj(block.ln_1(inputs[0][:, 1:]) @ weight.T + bias)
    expected = visual.ln_post(values) @ visual.proj
    assert dense_map.shape == (1, *encoder.dense_shape)
    assert torch.allclose(dense_map, expected, atol=1e-5 * float(expected.abs().max()))


def test_prompts_without_padding_equal_padded_ones_in_any_order(encoder):
    import open_clip

    prompts = ["dog", "a photo of the hard to see bow-tie.", "aerosol_can", "", "a " * 75, "barge (boat)"]
    expected = encoder._clip.encode_text(open_clip.get_tokenizer("ViT-B-16")(prompts))
    assert close(encoder.embed_prompts(prompts), expected)
    assert close(encoder.embed_prompts(prompts[::-1]), expected.flip(0))
    assert encoder.embed_prompts([]).shape == (0, encoder.text_dim)


def test_a_prompt_that_is_too_long_is_refused(encoder):
    with pytest.raises(InputError, match=r"prompt 'a a .*has 78 tokens with start and end, toy_clip reads at most 77"):
        encoder.embed_prompts(["dog", "a " * 76])


@pytest.fixture
def small_vocabulary(tmp_path):
    """A toy CLIP whose word table has only start, end, padding and the words "red circle"."""
    clip = build_clip("toy_clip")
    weights = random_weights(3, clip.model.state_dict())
    tokenizer = clip.tokenizer
    ids = sorted({0, tokenizer.sot_token_id, tokenizer.eot_token_id, *tokenizer.encode("red circle")})
    table = weights["token_embedding.weight"]
    path = tmp_path / "toy_clip.safetensors"
    rows = {"token_embedding.weight": table[ids].contiguous(), "token_ids": torch.tensor(ids)}
    save_file({**weights, **rows}, path)
    return load_encoder("toy_clip", str(tmp_path)), weights


def test_the_toy_encoder_refuses_unknown_words(small_vocabulary):
    encoder, weights = small_vocabulary
    whole = build_clip("toy_clip").model
    whole.load_state_dict(weights)
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, :4] = torch.tensor(encoder._ids("red circle"))
    assert close(encoder.embed_prompts(["red circle"]), whole.eval().encode_text(ids))
    assert encoder.known_words == ("circle", "red")
    with pytest.raises(InputError, match=r"prompt 'red zebra': toy_clip does not know zebra; it knows circle, red: "):
        encoder.embed_prompts(["red circle", "red zebra"])


def test_provenance_is_json_with_weights_size_resize_rule_and_versions(localizer, encoder):
    for backbone, pixels in ((localizer, 256), (encoder, 192)):
        provenance = json.loads(json.dumps(backbone.provenance))
        assert provenance == backbone.provenance
        assert provenance["weights_sha256"] == provenance["weights_origin"] == "random:0"
        assert (provenance["input_pixels"], provenance["dtype"]) == (pixels, "float32")
        assert str(pixels) in provenance["resize"]
        assert {"torch", "regionspot"} < provenance["versions"].keys()


@pytest.mark.parametrize(
    ("load", "name", "reason"),
    [
        (load_localizer, "sam_vit_x", "expected one of sam_vit_b"),
        (load_encoder, "clip_rn50", "expected one of clip_vit_b_16"),
        (load_encoder, "open_clip:ViT-Z-99", "no model of this name"),
        (load_encoder, "open_clip:ViT-B-32:laion9b", "expected one of: openai"),
        (load_encoder, "open_clip:ViT-B-32:openai", "use ViT-B-32-quickgelu"),
    ],
)
def test_an_unknown_backbone_is_refused_with_the_known_ones(load, name, reason):
    with pytest.raises(InputError, match=reason):
        load(name, "random:0")


def test_weights_of_another_backbone_are_refused(tmp_path):
    path = tmp_path / "toy_sam.safetensors"
    save_file(random_weights(0, build_sam("toy_sam").state_dict()), path)
    with pytest.raises(WeightsError, match="does not fit toy_clip"):
        load_encoder("toy_clip", str(path))


def test_other_vision_transformers_of_open_clip_are_loaded_by_name(image):
    other = load_encoder("open_clip:ViT-S-32-alt", "random:0")
    assert other.encode(other.preprocess(image)[None]).shape == (1, *other.map_shape) == (1, 50, 384)
    assert other.embed_prompts(["a dog"]).shape == (1, other.text_dim)


def test_a_pretrained_tag_gives_the_weights_file_and_a_name_without_a_slash():
    official = build_clip("open_clip:ViT-B-32/laion2b_s34b_b79k").official
    assert official.url.startswith("https://huggingface.co/laion/CLIP-ViT-B-32-laion2B-s34B-b79K/resolve/main/")
    assert official.file == "ViT-B-32.laion2b_s34b_b79k.safetensors"
    for name in ("open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip:ViT-B-32:laion2b_s34b_b79k"):
        assert stored_name(name) == "open_clip.ViT-B-32.laion2b_s34b_b79k"
        assert build_clip(stored_name(name)).official == official


def test_every_backbone_except_the_toy_ones_has_an_official_file():
    assert {*LOCALIZERS.names(), *ENCODERS.names()} - OFFICIAL.keys() == {"toy_sam", "toy_clip"}
