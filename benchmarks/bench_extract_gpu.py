"""Extraction on a GPU: images a second of the whole stage and of each part of it, beside what the card can do.

Everything takes a device, so that a machine without a GPU can run all of it on the CPU with toy models: the rehearsal.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_extract_authors import Authors
from benchmarks.bench_extract_data import WEIGHTS, Job, boxes_in
from benchmarks.device_rates import matrix_rate, rate_of
from benchmarks.goals import Report, say
from regionspot.cache.format.schema import ImageFeatures
from regionspot.cache.machine import processors
from regionspot.cache.tools.resume import open_or_create
from regionspot.pipeline.backbones.batch_size import batch_size_of
from regionspot.pipeline.backbones.builders import build_clip, build_sam, get_preset
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.backbones.sam_image_encoder import SamEncoder
from regionspot.pipeline.backbones.weights import load_weights
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.decode_ahead import Decoder, decode_ahead, default_threads
from regionspot.pipeline.extraction.extract import extract, open_for_extraction

OBJECTS365, ALL_SETS = 660_000, 2_500_000  # images: Objects365 v1; with OpenImages and V3Det
STEPS, STAGES, HOURS = "Steps on the device", "The whole stage", "Hours"


@dataclass(frozen=True)
class Scale:
    """seconds: of each measurement; matrix: side of the product that the card's rate is taken from."""

    preset: str
    images: int
    part: int
    seconds: float
    matrix: int


FULL_GPU = Scale("bl", images=4096, part=512, seconds=5, matrix=8192)
REHEARSAL = Scale("toy", images=24, part=8, seconds=0.05, matrix=256)


def measure_gpu(report: Report, scale: Scale, device: str, scratch: Path) -> None:
    """Fill the report. Takes some five minutes on a GPU, two of them for compiling."""
    shutil.rmtree(scratch, ignore_errors=True)
    job = Job(scale.preset, scratch / "photos", scale.images)
    job.write_images()
    place = torch.device(device)
    backbones = Backbones.load(scale.preset, WEIGHTS, device=device)
    size = batch_size_of([model for model in (backbones.localizer, *backbones.encoders) if model is not None])
    operations = operations_of(scale.preset)
    say("matrix rate")
    matrix = matrix_rate(scale.matrix, place, scale.seconds)
    report.add_row(STEPS, step=f"bfloat16 product of {scale.matrix} x {scale.matrix}", **_rates(None, matrix, matrix))
    for step, (rate, work) in _steps(backbones, job, size, place, scale, operations).items():
        report.add_row(STEPS, step=step, **_rates(rate, rate * work, matrix))
    whole = _stages(report, backbones, job, size, scale, scratch)
    share = whole * sum(operations.values()) / matrix
    report.add_row(STAGES, of="ours, share of the card's matrix rate", **{"images/s": share})
    if place.type == "cuda":
        report.add_goal("share of the card's matrix rate, whole stage", share, at_least=0.4)
    for name, images in (("Objects365 v1", OBJECTS365), ("all three sets", ALL_SETS)):
        report.add_row(HOURS, dataset=name, images=f"{images:,}", hours=images / whole / 3600)
    shutil.rmtree(scratch)


def _rates(images: float | None, operations: float, matrix: float) -> dict[str, float | None]:
    return {"images/s": images, "TFLOP/s": operations / 1e12, "/ matrix rate": operations / matrix}


def operations_of(preset: str) -> dict[str, int]:
    """Multiplications and additions of one image in the official models' own products."""
    names = get_preset(preset)
    with torch.device("meta"):
        sam, clip = build_sam(names.localizer).image_encoder, build_clip(names.encoder).model.visual
    found = {}
    for name, model, pixels in (("SAM", sam, sam.img_size), ("CLIP", clip, clip.image_size[0])):
        with FlopCounterMode(display=False) as counter:  # with gradients on: PyTorch's fused layers are not counted
            model(torch.zeros(1, 3, pixels, pixels, device="meta"))
        found[name] = counter.get_total_flops()
    return found


def _steps(
    backbones: Backbones, job: Job, size: int, device: torch.device, scale: Scale, operations: dict[str, int]
) -> dict[str, tuple[float, float]]:
    """Images a second of each step, and operations of an image in it."""
    localizer, (encoder,) = backbones.localizer, backbones.encoders
    if localizer is None:
        raise ValueError(f"preset {job.preset}: has no localizer")
    pixels, dtype = localizer.pixels, localizer.provenance["dtype"]
    images = torch.randn(size, 3, pixels, pixels, device=device)
    squares = torch.randn(size, 3, encoder.pixels, encoder.pixels, device=device)
    boxes = [boxes_in(job.size(row), job.boxes, row) for row in range(size)]
    sizes = [job.size(row) for row in range(size)]
    embeddings = torch.randn(size, localizer.token_dim, pixels // 16, pixels // 16, device=device)
    eager = _sam_encoder(job.preset, dtype, device)
    compiled = _sam_encoder(job.preset, dtype, device, compile=True)
    flexible = _sam_encoder(job.preset, dtype, device, compile=True, flex=True)
    graphs = torch.compile(_sam_encoder(job.preset, dtype, device), mode="reduce-overhead")
    sam, clip = operations["SAM"], operations["CLIP"]
    tried: dict[str, tuple[Callable[[], object], float]] = {
        f"SAM encoder, {dtype}, batches of {size}": (lambda: eager(images), sam),
        "the same, compiled": (lambda: compiled(images), sam),
        "the same, compiled, CUDA graphs": (lambda: graphs(images), sam),
        "the same, compiled, global attention by flex_attention": (lambda: flexible(images), sam),
        f"CLIP, {encoder.provenance['dtype']}, batches of {size}": (lambda: encoder.encode(squares), clip),
        f"tokens of {job.boxes} boxes, float32": (lambda: localizer.tokens_of_images(embeddings, boxes, sizes), 0),
    }
    found = {}
    for step, (work, of_image) in tried.items():
        say(step)
        if device.type != "cuda":
            torch.compiler.set_stance("force_eager")  # a rehearsal is over before a compiler is
        try:
            found[step] = rate_of(work, device, scale.seconds) * size, of_image
        except Exception as error:  # what a compiler cannot do on this card is left out, and all else measured
            say(f"{step}: left out, {' '.join(str(error).split())[:300]}")
    return found


def _sam_encoder(preset: str, dtype: str, device: torch.device, **options: bool) -> SamEncoder:
    name = get_preset(preset).localizer
    sam = build_sam(name)
    sam.load_state_dict(load_weights(name, WEIGHTS, sam.state_dict()).state_dict)
    return SamEncoder(sam.image_encoder.to(device).eval().requires_grad_(False), dtype, **options)


def _stages(report: Report, backbones: Backbones, job: Job, size: int, scale: Scale, scratch: Path) -> float:
    """Rates of decoding alone, writing alone, the whole stage and the authors'; images a second of the whole."""
    manifest = job.manifest()
    say("decoding")
    decoder = Decoder(manifest, job.folder, backbones, "auto")
    names = [feature_set.name for feature_set in backbones.feature_sets()]
    started = time.perf_counter()
    with closing(decode_ahead(decoder, ((row, names) for row in range(job.images)), default_threads())) as decoded:
        failed = sum(image.failure is not None for image in decoded)
    taken = time.perf_counter() - started
    if failed:
        raise ValueError(f"{job.folder}: {failed} of {job.images} images could not be decoded")
    report.add_row(STAGES, of=f"decode and resize alone, {processors()} cores", **{"images/s": job.images / taken})
    say("writing")
    images, gigabytes = _writing(backbones, job, scale.part, scratch / "written.zarr")
    report.add_row(STAGES, of=f"write alone, {gigabytes:.3g} GB/s", **{"images/s": images})
    say("whole stage")
    config = ExtractConfig(part_size=scale.part, batch_size=size)
    cache = open_for_extraction(scratch / "whole.zarr", manifest, job.folder, backbones, config)
    extract(cache, job.folder, backbones, replace(config, parts="0"))  # warms up: kernels, workspaces, page cache
    started = time.perf_counter()
    summary = extract(cache, job.folder, backbones, config)
    ours = (job.images - len(cache.part_rows(0))) / (time.perf_counter() - started)
    say(summary.text())
    report.add_row(STAGES, of=f"ours, batches of {size}; {_shares(summary.shares)}", **{"images/s": ours})
    say("authors' path")
    theirs = _authors(job, backbones.device, scale)
    report.add_row(STAGES, of="authors, one at a time, float16 autocast", **{"images/s": theirs})
    report.add_row(STAGES, of="ours / authors", **{"images/s": ours / theirs})
    return ours


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _writing(backbones: Backbones, job: Job, part: int, path: Path) -> tuple[float, float]:
    """Images and GB a second of the cache's writer, flushes and checksums included."""
    cache = open_or_create(path, job.manifest(), backbones.feature_sets(), part)
    rows = cache.part_rows(0)
    random, made = np.random.default_rng(0), {}
    for feature_set in cache.feature_sets.values():
        leading = () if feature_set.kind == "map" else (job.boxes,)
        made[feature_set.name] = random.standard_normal((*leading, *feature_set.shape), np.float32).astype(np.float16)
    started = time.perf_counter()
    cache.write_part(0, (ImageFeatures(row, dict(made)) for row in rows))
    taken = time.perf_counter() - started
    written = len(rows) * sum(values.nbytes for values in made.values())
    shutil.rmtree(path)
    return len(rows) / taken, written / taken / 1e9


def _authors(job: Job, device: torch.device, scale: Scale) -> float:
    authors, images = Authors(job, str(device)), 2
    authors.whole(images)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < scale.seconds:
        authors.whole(images)
        done += images
    return done / (time.perf_counter() - started)
