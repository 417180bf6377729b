"""The toy backbones: a small SAM and a small CLIP, built from the classes of segment_anything and open_clip.

They have all parts of the large models, so that the same code runs them: SAM with window and global attention, relative
positions and four mask tokens; CLIP with a class token, `ln_pre`, `ln_post` and a projection, and a text tower for
open_clip's tokens. One part differs: a stack of small convolutions (`conv_stem`) instead of the single patch
convolution. Their weights were trained by `regionspot.pipeline.toy.training` and ship with the package in float16. Of
the text tower's word table only the rows of words it has learnt are shipped; the prompts that need another row are
refused by name (`unknown_words`), as an untrained row would answer with noise.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise

from open_clip import CLIP, OPENAI_IMAGENET_TEMPLATES, SimpleTokenizer
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from regionspot.pipeline.toy.world import toy_classes

SAM_PIXELS, SAM_PATCH = 256, 16
TOKEN_DIM = 128  # width of the mask decoder, and so of a location token

CLIP_PIXELS, CLIP_PATCH = 192, 16  # a map of 12 x 12 patches and the class token
CLIP_WIDTH, TEXT_DIM = 192, 128
CONTEXT = 77  # open_clip's context length
WORD_TABLE = 49_408  # rows of open_clip's word table

TOKEN_IDS = "token_ids"  # in the file: which row of the word table each shipped row is


def build_toy_sam() -> Sam:
    """An untrained toy SAM in evaluation mode: images of long side 256, location tokens of TOKEN_DIM numbers."""
    grid = SAM_PIXELS // SAM_PATCH
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=SAM_PIXELS,
            patch_size=SAM_PATCH,
            embed_dim=128,
            depth=4,
            num_heads=4,
            mlp_ratio=3,
            out_chans=TOKEN_DIM,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=8,
            global_attn_indexes=(1, 3),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=TOKEN_DIM,
            image_embedding_size=(grid, grid),
            input_image_size=(SAM_PIXELS, SAM_PIXELS),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=TOKEN_DIM, num_heads=4, mlp_dim=256),
            transformer_dim=TOKEN_DIM,
            iou_head_hidden_dim=TOKEN_DIM,
        ),
    )
    return sam.eval()


def build_toy_clip(word_table: int = WORD_TABLE) -> CLIP:
    """An untrained toy CLIP in evaluation mode. Training has a table of known words only."""
    vision = {
        "image_size": CLIP_PIXELS,
        "patch_size": CLIP_PATCH,
        "width": CLIP_WIDTH,
        "layers": 4,
        "head_width": 48,
    }
    text = {"context_length": CONTEXT, "vocab_size": word_table, "width": 96, "heads": 4, "layers": 2}
    clip = CLIP(TEXT_DIM, vision, text)
    clip.visual.conv1 = conv_stem(CLIP_WIDTH)
    return clip.eval()


def conv_stem(width: int) -> nn.Sequential:
    """Images (B, 3, h, w) to patches (B, width, h / 16, w / 16), by convolutions of stride 4, 2 and 2.

    Xiao et al. 2021, "Early convolutions help transformers see better". A single patch convolution learns no shapes in
    this short training.
    """
    channels = (64, 128, width)
    layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 7, stride=4, padding=3)]
    for before, after in pairwise(channels):
        layers += [nn.GroupNorm(8, before), nn.GELU(), nn.Conv2d(before, after, 3, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 1))


@cache
def toy_tokenizer() -> SimpleTokenizer:
    """open_clip's tokenizer, built once because that takes a second."""
    return SimpleTokenizer(context_length=CONTEXT)


def unknown_words(prompt: str, token_ids: frozenset[int]) -> list[str]:
    """The words of a prompt with a token that the toy CLIP was not trained on, in their order."""
    words = prompt.replace(".", " ").replace(",", " ").split()
    return [word for word in words if not token_ids.issuperset(toy_tokenizer().encode(word))]


def known_words(token_ids: frozenset[int]) -> tuple[str, ...]:
    """The textures, colours and shapes that a toy CLIP was trained on."""
    words = dict.fromkeys(word for entry in toy_classes() for word in entry.look.name.split())
    return tuple(sorted(word for word in words if not unknown_words(word, token_ids)))


def known_token_ids() -> list[int]:
    """Sorted ids of every token in a prompt about the toy world: all its class names and words in all 80 templates."""
    # Words are tokenised one by one, so names and templates can be tokenised apart.
    prompts = [*(entry.look.name for entry in toy_classes()), *(template("") for template in OPENAI_IMAGENET_TEMPLATES)]
    return sorted({token for prompt in prompts for token in toy_tokenizer().encode(prompt)} | _marks())


def _marks() -> set[int]:
    """Start, end and padding of a prompt."""
    return {0, toy_tokenizer().sot_token_id, toy_tokenizer().eot_token_id}
