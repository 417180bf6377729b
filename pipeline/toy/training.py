"""Trains the toy backbones on the toy world: `python -m regionspot.pipeline.toy.training` (make toy-backbones).

SAM learns as the large one did, class-agnostic: an image and a box go in, the mask of the object comes out. CLIP
learns from images and the names that are true of them: crops of one object, whole scenes with several. It starts on
small images and ends on larger ones with its position table interpolated, as OpenAI's ViT-L/14@336px did. Everything
is drawn from one seed. On two cores it takes under an hour; each run writes both weight files anew.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, OPENAI_IMAGENET_TEMPLATES
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from regionspot.pipeline.toy import TOY_WEIGHTS
from regionspot.pipeline.toy.losses import mask_loss, name_loss, patch_loss
from regionspot.pipeline.toy.models import (
    CLIP_PATCH,
    CLIP_PIXELS,
    CLIP_WIDTH,
    SAM_PIXELS,
    TEXT_DIM,
    TOKEN_IDS,
    build_toy_clip,
    build_toy_sam,
    known_token_ids,
    toy_tokenizer,
)
from regionspot.pipeline.toy.samples import GROUPS, Sample, draw_samples, mask_batch, named_batch

log = logging.getLogger(__name__)

TEMPLATES = (*OPENAI_IMAGENET_TEMPLATES, "{}".format, "{}.".format)
CROP_PIXELS = 96  # CLIP's first stage: a third of the patches, a fifth of the time
CONE = 1.0  # length of the texts' common part, in lengths of what tells them apart
PROGRESS_SECONDS = 20.0


@dataclass(frozen=True)
class ToyRecipe:
    """What decides the shipped weights."""

    seed: int = 20_000  # no demo world is drawn from it
    images: int = 6_000
    sam_steps: int = 3_200
    sam_batch: int = 8
    sam_boxes: int = 5
    sam_rate: float = 1e-3
    crop_steps: int = 1_500  # on CROP_PIXELS
    scene_steps: int = 300  # on CLIP_PIXELS
    clip_batch: int = 96
    crop_rate: float = 1.5e-3
    scene_rate: float = 7e-4


def train_toy_backbones(out: Path, recipe: ToyRecipe | None = None) -> None:
    """Train both at once and write toy_sam.safetensors and toy_clip.safetensors into `out`.

    One process and one thread each: on two cores no thread then waits for another, and the number of cores does not
    change what comes out.
    """
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=_speak) as processes:
        for job in [processes.submit(_train_and_save, name, out, recipe or ToyRecipe()) for name in TOY_WEIGHTS]:
            job.result()
    log.info("%s: both trained in %.0f s", out, time.monotonic() - started)


def _train_and_save(name: str, out: Path, recipe: ToyRecipe) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    samples = list(draw_samples(recipe.images, recipe.seed))
    log.info("%s: %d images drawn", name, len(samples))
    if name == "toy_sam":
        weights = _halved(train_toy_sam(samples, recipe).state_dict())
    else:
        token_ids = torch.tensor(known_token_ids(), dtype=torch.int32)
        weights = {**_halved(train_toy_clip(samples, recipe).state_dict()), TOKEN_IDS: token_ids}
    (out / TOY_WEIGHTS[name].name).write_bytes(save(weights))


def _halved(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half().contiguous() for name, value in state_dict.items()}


# ---- SAM


def train_toy_sam(samples: Sequence[Sample], recipe: ToyRecipe) -> Sam:
    """A toy SAM that draws the mask of what a box holds."""
    sam = build_toy_sam().train()

    def cut(rng: np.random.Generator) -> tuple[Tensor, ...]:
        return mask_batch(_pick(samples, recipe.sam_batch, rng), SAM_PIXELS, recipe.sam_boxes, rng)

    def loss(images: Tensor, boxes: Tensor, masks: Tensor) -> Tensor:
        logits, quality = sam_logits(sam, sam.image_encoder(sam.preprocess(images)), boxes)
        return mask_loss(logits, quality, masks.flatten(0, 1))

    _fit("toy_sam", sam, loss, cut, recipe.sam_steps, recipe.sam_rate, recipe.seed)
    return sam.eval()


def sam_logits(sam: Sam, embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits (B * n, 4, 64, 64) and predicted IoU (B * n, 4) of boxes (B, n, 4) in B images at once.

    What MaskDecoder.predict_masks computes; that one takes a single image a call, which is far slower here.
    """
    decoder, each = sam.mask_decoder, boxes.shape[1]
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes.flatten(0, 1), masks=None)
    learned = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(sparse), -1, -1)
    image = embeddings.repeat_interleave(each, dim=0) + dense
    position = sam.prompt_encoder.get_dense_pe().expand(len(sparse), -1, -1, -1)
    tokens, image = decoder.transformer(image, position, torch.cat([learned, sparse], dim=1))
    upscaled = decoder.output_upscaling(image.transpose(1, 2).unflatten(2, embeddings.shape[-2:]))
    masks = [mlp(tokens[:, 1 + slot]) for slot, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    return torch.einsum("bsc,bchw->bshw", torch.stack(masks, dim=1), upscaled), decoder.iou_prediction_head(
        tokens[:, 0]
    )


# ---- CLIP


def train_toy_clip(samples: Sequence[Sample], recipe: ToyRecipe) -> CLIP:
    """A toy CLIP, its word table cut to the known tokens."""
    token_ids = torch.tensor(known_token_ids())
    prompts = _tokenized(token_ids)
    small = build_toy_clip(CROP_PIXELS, len(token_ids)).train()
    _place_patches(small)
    _fit_clip("toy_clip, crops", small, samples, prompts, recipe.crop_steps, recipe.crop_rate, 0.25, recipe)
    clip = build_toy_clip(CLIP_PIXELS, len(token_ids)).train()
    clip.load_state_dict(_grown(small.state_dict()))
    _fit_clip("toy_clip, scenes", clip, samples, prompts, recipe.scene_steps, recipe.scene_rate, 0.5, recipe)
    into_a_cone(clip, prompts[:, 0])
    return clip.eval()


@torch.no_grad()
def into_a_cone(clip: CLIP, prompts: Tensor) -> None:
    """Give all text embeddings a common part, at right angles to what tells them apart.

    Large CLIPs' texts lie in a narrow cone (Liang et al. 2022, "Mind the Gap"); ours, of a softmax alone, spread around
    the origin: two names that share two words of three have a cosine of 0.66 and others -0.3. The head's sigmoid loss
    at 100 x cosine can be met in a cone only, where a region can be far from all names but its own. What CLIP itself
    answers stays: all its scores of an image move together, and the scale makes up for the longer texts.
    """
    raw = encode_short_text(clip, prompts)
    # The faintest direction that the projection reaches: it has fewer inputs than outputs, what lies beyond is out of
    # reach of any bias.
    common = torch.linalg.svd(raw).Vh[min(clip.text_projection.shape) - 1]
    length = CONE * raw.norm(dim=-1).mean()
    clip.ln_final.bias += length * torch.linalg.lstsq(clip.text_projection.T, common).solution
    clip.logit_scale += 0.5 * math.log(1 + CONE**2)


def _fit_clip(
    name: str,
    clip: CLIP,
    samples: Sequence[Sample],
    prompts: Tensor,
    steps: int,
    rate: float,
    scene_share: float,
    recipe: ToyRecipe,
) -> None:
    pixels, grid = clip.visual.image_size[0], clip.visual.grid_size[0]
    clip.visual.output_tokens = True
    # Reads what a patch shows; needed in training only.
    reader = nn.Linear(CLIP_WIDTH, TEXT_DIM)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))

    def cut(rng: np.random.Generator) -> tuple[Tensor, ...]:
        wording = torch.from_numpy(rng.integers(0, prompts.shape[1], len(prompts)))
        batch = named_batch(_pick(samples, recipe.clip_batch, rng), pixels, grid, scene_share, rng)
        return *batch, prompts[torch.arange(len(prompts)), wording]

    def loss(images: Tensor, truth: Tensor, local: Tensor, text: Tensor) -> Tensor:
        shown, patches = clip.visual((images.float() / 255 - mean) / std)
        said = F.normalize(encode_short_text(clip, text), dim=-1)
        scale = clip.logit_scale.exp().clamp(max=100)
        whole = name_loss(scale * F.normalize(shown, dim=-1) @ said.T, truth)
        return whole + patch_loss(scale * F.normalize(reader(patches), dim=-1) @ said.T, local)

    _fit(name, nn.ModuleList([clip, reader]), loss, cut, steps, rate, recipe.seed + pixels)
    clip.visual.output_tokens = False


def _tokenized(token_ids: Tensor) -> Tensor:
    """int64 (names, templates, longest): every name in every template, as positions in the cut word table.

    Position keeps the order of ids, so the end mark is still the largest, where open_clip looks for it.
    """
    names = [name for group in GROUPS for name in group]
    ids = torch.stack([toy_tokenizer()([template(name) for template in TEMPLATES]) for name in names])
    longest = int((ids != 0).sum(dim=-1).max())
    return torch.searchsorted(token_ids, ids[..., :longest].contiguous())


def encode_short_text(clip: CLIP, text: Tensor) -> Tensor:
    """open_clip's encode_text without the padding: attention is causal, so nothing after the end mark counts."""
    length = text.shape[1]
    x = clip.token_embedding(text) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    projected: Tensor = x[torch.arange(len(x)), text.argmax(dim=-1)] @ clip.text_projection
    return projected


def _place_patches(clip: CLIP) -> None:
    """Start the position table from sines and cosines of x and y, as strong as the image itself.

    Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k". From open_clip's faint random start the patches of
    a briefly trained model forget where they are, and a head could not find a region's patches.
    """
    grid, quarter = clip.visual.grid_size[0], CLIP_WIDTH // 4
    waves = torch.pi * torch.logspace(-1, 4, quarter, base=2)  # half a wave to sixteen across the image
    phase = torch.outer((torch.arange(grid) + 0.5) / grid, waves)
    line = torch.cat([phase.sin(), phase.cos()], dim=1)
    table = torch.cat([line.repeat_interleave(grid, dim=0), line.repeat(grid, 1)], dim=1)
    clip.visual.positional_embedding.data[1:] = 0.5 * table


def _grown(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CLIP on CROP_PIXELS for one on CLIP_PIXELS: the position table stretched, all else as it is."""
    old, new = CROP_PIXELS // CLIP_PATCH, CLIP_PIXELS // CLIP_PATCH
    name = "visual.positional_embedding"
    table = state_dict[name]
    grid = table[1:].T.reshape(1, -1, old, old)
    stretched = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return {**state_dict, name: torch.cat([table[:1], stretched.flatten(2)[0].T])}


# ---- both


def _pick(samples: Sequence[Sample], count: int, rng: np.random.Generator) -> list[Sample]:
    return [samples[k] for k in rng.integers(0, len(samples), count)]


def _fit(
    name: str,
    model: nn.Module,
    loss: Callable[..., Tensor],
    cut: Callable[[np.random.Generator], tuple[Tensor, ...]],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """AdamW with a short warm-up and a cosine to zero; matrices decay, biases, norms and tables do not."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for part, weight in model.named_parameters():
        (decayed if weight.ndim > 1 and "embed" not in part and "rel_pos" not in part else others).append(weight)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warm_up = max(1, min(150, steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * n / steps))
    )
    started, spoken, mean = time.monotonic(), time.monotonic(), 0.0
    for step, batch in enumerate(_ahead(cut, steps, seed), start=1):
        value = loss(*batch)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean = value.item() if step == 1 else 0.98 * mean + 0.02 * value.item()
        if time.monotonic() - spoken > PROGRESS_SECONDS or step == steps:
            spoken = time.monotonic()
            pace = step / (spoken - started)
            left = (steps - step) / pace
            log.info("%s: step %d/%d  loss %.3f  %.2f/s  %.0fs left", name, step, steps, mean, pace, left)


def _ahead(
    cut: Callable[[np.random.Generator], tuple[Tensor, ...]], steps: int, seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """Batches, the next one cut while the model learns from this one; in order, so the seed decides them all."""
    rng = np.random.default_rng(seed)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(cut, rng)
        for step in range(steps):
            batch = coming.result()
            if step + 1 < steps:
                coming = thread.submit(cut, rng)
            yield batch


def _speak() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def main() -> None:
    parser = argparse.ArgumentParser(description="train the toy SAM and the toy CLIP")
    parser.add_argument("--out", type=Path, default=TOY_WEIGHTS["toy_sam"].parent, help="folder for the weight files")
    _speak()
    train_toy_backbones(parser.parse_args().out)


if __name__ == "__main__":
    main()
