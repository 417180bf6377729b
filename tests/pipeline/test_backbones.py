"""What the localizer and the encoder compute is what the libraries' own long way round computes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamPredictor
from torch.utils._python_dispatch import TorchDispatchMode

from regionspot.cache.errors import InputError, WeightsError
from regionspot.pipeline.backbones import sam_token_decoder as token_decoder
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


def close(found, expected, relative=1e-5) -> bool:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max()) <= relative * float(expected.abs().max())


def tokens_of(localizer, embedding, boxes, size):
    return localizer.tokens_of_images(embedding[None], [boxes], [size])[0]


def test_every_preset_names_backbones_that_exist():
    for preset in PRESETS.values():
        assert preset.localizer in LOCALIZERS.names()
        assert preset.encoder in ENCODERS.names()


def test_every_preset_states_the_pixels_that_its_encoder_takes():
    for preset in PRESETS.values():
        assert build_clip(preset.encoder).model.visual.image_size == (preset.clip_pixels, preset.clip_pixels)


def test_openai_names_compute_with_the_activation_that_openai_trained_with():
    for name in CLIP_MODELS:
        block = build_clip(name).model.visual.transformer.resblocks[0]
        assert type(block.mlp.gelu).__name__ == "QuickGELU"


def test_building_without_drawing_leaves_the_global_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_sam("toy_sam")
    build_clip("toy_clip")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_built_without_drawing_computes_as_one_built_with_it():
    expected = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    with skip_init():
        found = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    found.load_state_dict(expected.state_dict())
    values = torch.randn(3, 8)
    assert torch.equal(found(values), expected(values))


def test_masks_are_those_of_the_official_predictor(localizer, embedding, image):
    predictor = SamPredictor(localizer._sam)
    predictor.set_image(np.asarray(image))
    boxes = predictor.transform.apply_boxes_torch(torch.from_numpy(BOXES), (image.height, image.width))
    expected, _, _ = predictor.predict_torch(None, None, boxes=boxes, multimask_output=False)
    tokens, masks = localizer.tokens_and_masks(embedding, BOXES, (image.height, image.width))
    assert close(embedding, predictor.features[0])
    assert masks.dtype == bool
    assert 0.05 < masks.mean() < 0.95  # neither empty nor full: the comparison says something
    assert (masks != expected[:, 0].numpy()).mean() < 1e-3
    assert close(tokens, tokens_of(localizer, embedding, BOXES, (image.height, image.width)))


def test_tokens_do_not_depend_on_how_boxes_are_grouped(localizer, embedding, monkeypatch):
    together = tokens_of(localizer, embedding, BOXES, (80, 120))
    monkeypatch.setattr(token_decoder, "CHUNK_BYTES", {"cpu": 1})
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
def test_a_smaller_dtype_rounds_the_encoders_and_leaves_the_token_decoder_in_float32(
    localizer, encoder, image, embedding, dtype
):
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
    """Numbers in the largest tensor that an operation is given; of an expanded one, which bmm copies, all of them."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.numbers = max([self.numbers, *(each.numel() for each in args if isinstance(each, torch.Tensor))])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_weight_of_attention_is_copied_for_each_place_of_a_batch(dtype):
    encoder = load_encoder("toy_clip", "random:0", dtype=dtype)
    places, width = encoder.map_shape
    with LargestTensor() as largest:
        encoder.encode(torch.zeros(8, 3, encoder.pixels, encoder.pixels))
    assert 0 < largest.numbers <= max(8 * 4 * places * width, 8 * 3 * encoder.pixels**2)  # hidden values, or images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", ["qqq", "qkk", "qkv"])
def test_attention_on_contiguous_memory_gives_what_it_gave(inputs, dtype):
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval().to(dtype)
    drawn = {name: torch.randn(3, places, 16, dtype=dtype) for name, places in (("q", 5), ("k", 7), ("v", 7))}
    drawn["v"] = drawn["v"] if "v" in inputs else drawn["k"]
    with torch.no_grad():
        expected = attention(*(drawn[name] for name in inputs))
        contiguous_attention(torch.nn.Sequential(attention), torch.device("cpu"), "bfloat16")
        found = attention(*(drawn[name] for name in inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert close(ours.float(), theirs.float(), 1e-6 if dtype == torch.float32 else 0.02)


def test_the_map_projected_at_the_class_token_is_clips_own_embedding(encoder, image):
    batch = torch.stack([encoder.preprocess(image), encoder.preprocess(image.rotate(180))])
    feature_map = encoder.encode(batch)
    assert feature_map.shape == (2, *encoder.map_shape)
    assert close(encoder.project(feature_map)[:, 0], encoder._clip.encode_image(batch))
    assert torch.equal(encoder.embed_images(batch), encoder.project(feature_map[:, 0]))


def test_the_map_is_taken_before_the_last_layer_norm(encoder, image):
    batch = encoder.preprocess(image)[None]
    seen = []
    handle = encoder._clip.visual.ln_post.register_forward_pre_hook(lambda _, values: seen.append(values[0]))
    encoder._clip.encode_image(batch)
    handle.remove()
    assert close(encoder.encode(batch), seen[0])


def test_prompts_cut_at_the_longest_equal_the_full_length_way_in_any_order(encoder):
    import open_clip

    prompts = ["dog", "a photo of the hard to see bow-tie.", "aerosol_can", "", "a " * 75, "barge (boat)"]
    expected = encoder._clip.encode_text(open_clip.get_tokenizer("ViT-B-16")(prompts))
    assert close(encoder.embed_prompts(prompts), expected)
    assert close(encoder.embed_prompts(prompts[::-1]), expected.flip(0))
    assert encoder.embed_prompts([]).shape == (0, encoder.text_dim)


def test_a_prompt_that_would_be_cut_short_is_refused_by_name(encoder):
    with pytest.raises(InputError, match=r"prompt 'a a .*has 78 tokens with start and end, toy_clip reads 77"):
        encoder.embed_prompts(["dog", "a " * 76])


@pytest.fixture
def taught_three_words(tmp_path):
    """A toy CLIP file as it ships, whose word table holds the marks and the words of "red circle" alone."""
    clip = build_clip("toy_clip")
    weights = random_weights(3, clip.model.state_dict())
    tokenizer = clip.tokenizer
    ids = sorted({0, tokenizer.sot_token_id, tokenizer.eot_token_id, *tokenizer.encode("red circle")})
    table = weights["token_embedding.weight"]
    path = tmp_path / "toy_clip.safetensors"
    packed = {"token_embedding.weight": table[ids].contiguous(), "token_ids": torch.tensor(ids)}
    save_file({**weights, **packed}, path)
    return load_encoder("toy_clip", str(tmp_path)), weights


def test_the_toy_encoder_knows_the_words_that_ship_and_refuses_others_by_name(taught_three_words):
    encoder, weights = taught_three_words
    whole = build_clip("toy_clip").model
    whole.load_state_dict(weights)
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, :4] = torch.tensor(encoder._ids("red circle"))
    assert close(encoder.embed_prompts(["red circle"]), whole.eval().encode_text(ids))
    assert encoder.known_words == ("circle", "red")
    with pytest.raises(
        InputError, match=r"prompt 'red zebra': toy_clip was never taught zebra; it knows circle, red: "
    ):
        encoder.embed_prompts(["red circle", "red zebra"])


def test_provenance_is_json_and_names_weights_size_rule_and_versions(localizer, encoder):
    for backbone, pixels in ((localizer, 256), (encoder, 192)):
        stated = json.loads(json.dumps(backbone.provenance))
        assert stated == backbone.provenance
        assert stated["weights_sha256"] == stated["weights_origin"] == "random:0"
        assert (stated["input_pixels"], stated["dtype"]) == (pixels, "float32")
        assert str(pixels) in stated["resize"]
        assert {"torch", "regionspot"} < stated["versions"].keys()


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
def test_a_backbone_that_cannot_be_had_is_refused_with_what_can(load, name, reason):
    with pytest.raises(InputError, match=reason):
        load(name, "random:0")


def test_an_unknown_dtype_is_refused(tmp_path):
    for load, name in ((load_localizer, "toy_sam"), (load_encoder, "toy_clip")):
        with pytest.raises(InputError, match="expected one of auto, float32"):
            load(name, "random:0", dtype="int8")


def test_weights_of_another_backbone_are_refused(tmp_path):
    path = tmp_path / "toy_sam.safetensors"
    save_file(random_weights(0, build_sam("toy_sam").state_dict()), path)
    with pytest.raises(WeightsError, match="does not fit toy_clip"):
        load_encoder("toy_clip", str(path))


def test_any_other_vision_transformer_of_open_clip_goes_by_its_own_name(image):
    other = load_encoder("open_clip:ViT-S-32-alt", "random:0")
    assert other.encode(other.preprocess(image)[None]).shape == (1, *other.map_shape) == (1, 50, 384)
    assert other.embed_prompts(["a dog"]).shape == (1, other.text_dim)


def test_a_pretrained_tag_says_where_its_weights_are_and_gives_a_name_without_a_slash():
    official = build_clip("open_clip:ViT-B-32/laion2b_s34b_b79k").official
    assert official.url.startswith("https://huggingface.co/laion/CLIP-ViT-B-32-laion2B-s34B-b79K/resolve/main/")
    assert official.file == "ViT-B-32.laion2b_s34b_b79k.safetensors"
    for name in ("open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip:ViT-B-32:laion2b_s34b_b79k"):
        assert stored_name(name) == "open_clip.ViT-B-32.laion2b_s34b_b79k"
        assert build_clip(stored_name(name)).official == official


def test_every_backbone_but_the_toys_has_an_official_file():
    assert {*LOCALIZERS.names(), *ENCODERS.names()} - OFFICIAL.keys() == {"toy_sam", "toy_clip"}
