"""Trains the toy backbones on the toy world: `python -m regionspot.pipeline.toy.training` (make toy-backbones).

SAM is trained without classes, to segment the object in a box. CLIP is trained on crops of one object and on scenes of
several, to match their names; its feature map is also trained to classify patches and boxes. Everything follows from
one seed. A run takes about an hour on two cores; a killed run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, OPENAI_IMAGENET_TEMPLATES
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from regionspot.cache.machine import cpu_supports
from regionspot.cache.storage.atomic_files import write_file
from regionspot.pipeline.toy import TOY_WEIGHTS
from regionspot.pipeline.toy.losses import mask_loss, name_loss, word_loss
from regionspot.pipeline.toy.models import (
    CLIP_PATCH,
    CLIP_PIXELS,
    CLIP_WIDTH,
    SAM_PIXELS,
    TOKEN_IDS,
    build_toy_clip,
    build_toy_sam,
    known_token_ids,
    toy_tokenizer,
)
from regionspot.pipeline.toy.samples import GROUPS, DrawnSamples, NamedBatch, Sample, mask_batch, named_batch

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")

TEMPLATES = (*OPENAI_IMAGENET_TEMPLATES, "{}".format, "{}.".format)
CONE = 1.0  # length of the common part of text embeddings, relative to the rest
WARM_UP = 150  # steps
FALLING = 0.35  # share of the steps in which the learning rate decays
PROGRESS_SECONDS = 20.0
CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class ToyRecipe:
    """The hyperparameters of the shipped weights."""

    seed: int = 20_000  # different from every demo world's
    images: int = 8_000
    sam_steps: int = 2_000
    sam_batch: int = 8
    sam_boxes: int = 6
    sam_rate: float = 1e-3
    clip_steps: int = 3_200
    clip_batch: int = 32
    clip_scenes: float = 0.7  # share of scenes; the others are crops
    clip_rate: float = 1e-3


def train_toy_backbones(out: Path, work: Path, recipe: ToyRecipe | None = None) -> None:
    """Train both at once and write toy_sam.safetensors and toy_clip.safetensors into `out`, checkpoints into `work`.

    Each is trained by one process with one thread, so the number of cores does not change the result. The CPU does:
    matrix products are in bfloat16 where it has instructions for it, which is twice as fast.
    """
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=_log_to_stderr) as processes:
        for job in [processes.submit(_train_and_save, name, out, work, recipe or ToyRecipe()) for name in TOY_WEIGHTS]:
            job.result()
    log.info("%s: both trained in %.0f s", out, time.monotonic() - started)
    shutil.rmtree(work)


def _train_and_save(name: str, out: Path, work: Path, recipe: ToyRecipe) -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    samples = DrawnSamples(recipe.images, recipe.seed)
    if name == "toy_sam":
        weights = _halved(train_toy_sam(samples, recipe, work).state_dict())
    else:
        token_ids = torch.tensor(known_token_ids(), dtype=torch.int32)
        weights = {**_halved(train_toy_clip(samples, recipe, work).state_dict()), TOKEN_IDS: token_ids}
    write_file(out / TOY_WEIGHTS[name].name, save(weights))
    log.info("%s: done in %.0f s, %.0f s of processor", name, time.monotonic() - started, time.process_time())


def _halved(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half().contiguous() for name, value in state_dict.items()}


# ---- SAM


def train_toy_sam(samples: Sequence[Sample], recipe: ToyRecipe, work: Path | None = None) -> Sam:
    """Train a toy SAM to segment the object in a box."""
    torch.manual_seed(recipe.seed)
    sam = build_toy_sam().train()

    def cut(rng: np.random.Generator) -> tuple[Tensor, ...]:
        return mask_batch(_pick(samples, recipe.sam_batch, rng), SAM_PIXELS, recipe.sam_boxes, rng)

    def loss(batch: tuple[Tensor, ...]) -> Tensor:
        images, boxes, masks = batch
        with _fastest():
            logits, quality = sam_logits(sam, sam.image_encoder(sam.preprocess(images)), boxes)
        return mask_loss(logits.float(), quality.float(), masks.flatten(0, 1))

    _fit("toy_sam", sam, loss, cut, recipe.sam_steps, recipe.sam_rate, recipe.seed, work)
    return sam.eval()


def sam_logits(sam: Sam, embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits (B * n, 4, 64, 64) and predicted IoU (B * n, 4) of boxes (B, n, 4) in B images at once.

    Computes the same as MaskDecoder.predict_masks, which takes one image per call and is far slower.
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


def train_toy_clip(samples: Sequence[Sample], recipe: ToyRecipe, work: Path | None = None) -> CLIP:
    """Train a toy CLIP whose word table has only the known tokens."""
    torch.manual_seed(recipe.seed)
    learner = ClipLearner(build_toy_clip(word_table=len(known_token_ids())), _tokenized()).train()
    _place_patches(learner.clip)

    def cut(rng: np.random.Generator) -> tuple[NamedBatch, int]:
        chosen = _pick(samples, recipe.clip_batch, rng)
        named = named_batch(chosen, CLIP_PIXELS, CLIP_PIXELS // CLIP_PATCH, recipe.clip_scenes, rng)
        return named, int(rng.integers(len(TEMPLATES)))

    _fit("toy_clip", learner, learner, cut, recipe.clip_steps, recipe.clip_rate, recipe.seed + 1, work)
    into_a_cone(learner.clip, learner.prompts[:, 0])
    return learner.clip.eval()


class ClipLearner(nn.Module):
    """A CLIP with two linear classifiers that are used in training only, for patches and for boxes."""

    prompts: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIP, prompts: Tensor) -> None:
        super().__init__()
        self.clip = clip
        words = sum(len(group) for group in GROUPS[1:])
        self.patch_reader = nn.Sequential(nn.LayerNorm(CLIP_WIDTH), nn.Linear(CLIP_WIDTH, words))
        self.region_reader = nn.Sequential(nn.LayerNorm(CLIP_WIDTH), nn.Linear(CLIP_WIDTH, words))
        self.register_buffer("prompts", prompts, persistent=False)  # as _tokenized
        self.register_buffer("mean", torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1), persistent=False)

    def forward(self, batch: tuple[NamedBatch, int]) -> Tensor:
        """The loss of a batch; the second element is the index of the prompt template."""
        named, template = batch
        prompts = self.prompts[:, template]
        prompts = prompts[:, : int((prompts != 0).sum(dim=1).max())]
        with _fastest():
            tokens = encode_map(self.clip, (named.images.float() / 255 - self.mean) / self.std)
            texts = encode_short_text(self.clip, prompts)
        tokens, visual = tokens.float(), self.clip.visual
        shown = F.normalize(visual.ln_post(tokens[:, 0]) @ visual.proj, dim=-1)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        patches = tokens[:, 1:]
        return (
            name_loss(scale * shown @ F.normalize(texts.float(), dim=-1).T, named.truth)
            + 0.5 * word_loss(self.patch_reader(patches), named.patch_words)
            + word_loss(self.region_reader(named.region_share @ patches), named.region_words)
        )


def encode_map(clip: CLIP, images: Tensor) -> Tensor:
    """Class token and patches (B, 1 + P, width) before `ln_post`: what open_clip's visual tower computes.

    The attention is written out because torch's fused one takes twice the time in bfloat16 on a CPU.
    """
    x: Tensor = clip.visual._embeds(images)
    for block in clip.visual.transformer.resblocks:
        x = x + _attend(block.attn, block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    return x


def _attend(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    heads = attention.num_heads
    packed = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = packed.view(*packed.shape[:-1], 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    mixed = weights.softmax(dim=-1).to(value.dtype) @ value
    out: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return out


@torch.no_grad()
def into_a_cone(clip: CLIP, prompts: Tensor) -> None:
    """Add a common direction, orthogonal to their differences, to all text embeddings.

    Text embeddings of large CLIPs lie in a narrow cone (Liang et al. 2022, "Mind the Gap"). After a softmax loss alone,
    ours are spread around the origin: two names that share two of three words have a cosine of 0.66, others -0.3. The
    head's sigmoid loss at 100 x cosine needs a cone, where a region can be far from all names but its own. CLIP's own
    predictions do not change: all scores of an image shift together, and the scale compensates for the longer texts.
    """
    raw = encode_short_text(clip, prompts)
    # The weakest direction within the range of the projection, which has fewer inputs than outputs.
    common = torch.linalg.svd(raw).Vh[min(clip.text_projection.shape) - 1]
    length = CONE * raw.norm(dim=-1).mean()
    clip.ln_final.bias += length * torch.linalg.lstsq(clip.text_projection.T, common).solution
    clip.logit_scale += 0.5 * math.log(1 + CONE**2)


@cache
def _tokenized() -> Tensor:
    """Every name in every template as rows of the reduced word table, int64 (names, templates, longest).

    Rows keep the order of token ids, so the end token is still the largest, as open_clip expects.
    """
    names = [name for group in GROUPS for name in group]
    ids = torch.stack([toy_tokenizer()([template(name) for template in TEMPLATES]) for name in names])
    longest = int((ids != 0).sum(dim=-1).max())
    return torch.searchsorted(torch.tensor(known_token_ids()), ids[..., :longest].contiguous())


def encode_short_text(clip: CLIP, text: Tensor) -> Tensor:
    """open_clip's encode_text without padding: attention is causal, so tokens after the end have no effect."""
    length = text.shape[1]
    x = clip.token_embedding(text) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    projected: Tensor = x[torch.arange(len(x)), text.argmax(dim=-1)] @ clip.text_projection
    return projected


def _place_patches(clip: CLIP) -> None:
    """Initialise the position embedding with sines and cosines of x and y.

    Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k". With open_clip's small random values, the patches
    of a briefly trained model lose their position, and a head cannot find a region's patches.
    """
    grid, quarter = clip.visual.grid_size[0], CLIP_WIDTH // 4
    waves = torch.pi * torch.logspace(-1, 4, quarter, base=2)  # half a wave to sixteen across the image
    phase = torch.outer((torch.arange(grid) + 0.5) / grid, waves)
    line = torch.cat([phase.sin(), phase.cos()], dim=1)
    table = torch.cat([line.repeat_interleave(grid, dim=0), line.repeat(grid, 1)], dim=1)
    clip.visual.positional_embedding.data[1:] = 0.5 * table


# ---- both


def _pick(samples: Sequence[Sample], count: int, rng: np.random.Generator) -> list[Sample]:
    return [samples[k] for k in rng.integers(0, len(samples), count)]


def _fastest() -> torch.autocast:
    """Autocast to bfloat16 where the CPU has instructions for it, else float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_supports("bfloat16"))


def _fit(
    name: str,
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    cut: Callable[[np.random.Generator], Batch],
    steps: int,
    rate: float,
    seed: int,
    work: Path | None,
) -> None:
    """Train with AdamW; weight decay applies to matrices only. The learning rate warms up, stays, and decays linearly
    to zero.

    Until the decay nothing depends on `steps`, so a run can be lengthened; the result equals a cosine schedule's
    (Hagele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations"). Resumes from
    `name`.pt in `work`.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for part, weight in model.named_parameters():
        (decayed if weight.ndim > 1 and "embed" not in part and "rel_pos" not in part else others).append(weight)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    first = _load_checkpoint(work, name, model, optimizer)
    started = reported = saved = time.monotonic()
    losses: list[float] = []  # since the last report
    for step, batch in _ahead(cut, first, steps, seed):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARM_UP, 1.0, (steps - step) / (FALLING * steps))
        value = loss(batch)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
        done, now = step + 1, time.monotonic()
        if now - reported > PROGRESS_SECONDS or done == steps:
            reported = now
            pace = (done - first) / (now - started)
            left = (steps - done) / pace
            mean = sum(losses) / len(losses)
            losses.clear()
            log.info("%s: step %d/%d  loss %.3f  %.2f/s  %.0fs left", name, done, steps, mean, pace, left)
        if now - saved > CHECKPOINT_SECONDS or done == steps:
            saved = now
            _save_checkpoint(work, name, model, optimizer, done)


def _load_checkpoint(work: Path | None, name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into `model` and `optimizer` and return its number of steps; 0 without one."""
    path = work / f"{name}.pt" if work else None
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("%s: resumed at step %d", path, state["steps"])
    return int(state["steps"])


def _save_checkpoint(
    work: Path | None, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    if work is not None:
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": steps}, buffer)
        write_file(work / f"{name}.pt", buffer.getvalue())


def _ahead(
    cut: Callable[[np.random.Generator], Batch], first: int, steps: int, seed: int
) -> Iterator[tuple[int, Batch]]:
    """Yield steps and batches, preparing the next one in a thread. A batch follows from seed and step."""

    def batch_of(step: int) -> Batch:
        return cut(np.random.default_rng([seed, step]))

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(batch_of, first)
        for step in range(first, steps):
            batch = coming.result()
            coming = thread.submit(batch_of, step + 1)
            yield step, batch


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def main() -> None:
    parser = argparse.ArgumentParser(description="train the toy SAM and the toy CLIP")
    parser.add_argument("--out", type=Path, default=TOY_WEIGHTS["toy_sam"].parent, help="folder for the weight files")
    parser.add_argument("--work", type=Path, default=Path("build/toy-backbones"), help="folder for the checkpoints")
    _log_to_stderr()
    arguments = parser.parse_args()
    train_toy_backbones(arguments.out, arguments.work)


if __name__ == "__main__":
    main()
