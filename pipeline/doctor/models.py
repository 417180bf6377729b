"""The doctor's checks of the weights, and of one image that `extract` sends through every stage."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from regionspot.cache.errors import RegionSpotError
from regionspot.cache.format.manifest import Category, Manifest
from regionspot.cache.store import FeatureCache
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.tools.verify import verify
from regionspot.pipeline.backbones.builders import get_preset
from regionspot.pipeline.backbones.weights import OFFICIAL, RANDOM, weights_folder
from regionspot.pipeline.doctor.report import DoctorOptions, Finding
from regionspot.pipeline.toy import TOY_WEIGHTS

TOY = "toy"
_BOXES = 16
_SLOW_ON_A_CPU = ("sam_vit_l", "sam_vit_h")  # minutes per image; the doctor should take less than one


def check_weights(options: DoctorOptions) -> Iterator[Finding]:
    """Check that each weights file of the preset exists, and its SHA-256."""
    if options.preset is None:
        return
    if options.weights is not None and options.weights.startswith(RANDOM):
        text, mend = f"{options.weights}: random, for benchmarks only", "remove --weights to use the official ones"
        yield Finding("weights", "warn", text, mend)
        return
    preset = get_preset(options.preset)
    for name in (preset.localizer, preset.encoder):
        if name in TOY_WEIGHTS and options.weights is None:
            yield Finding("weights", "ok", f"{name}: {TOY_WEIGHTS[name].name}, in the package")
        elif name in OFFICIAL:
            yield _check_official(name, options.weights)


def _check_official(name: str, source: str | None) -> Finding:
    official = OFFICIAL[name]
    place = weights_folder() if source is None else Path(source).expanduser()
    path = place if place.is_file() else place / official.file
    if not path.is_file():
        mend = f"download {official.url} to that path; with network access, `extract` does"
        return Finding("weights", "fail", f"{name}: {path} does not exist", mend)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if official.sha256 not in (None, sha256):
        size = path.stat().st_size
        text = f"{name}: {path} has {size:,} bytes and SHA-256 {sha256[:12]}, expected {official.sha256[:12]}"
        return Finding("weights", "fail", text, f"delete it and download {official.url} again")
    return Finding("weights", "ok", f"{name}: {path} is complete (SHA-256 {sha256[:12]})")


def check_stages(options: DoctorOptions) -> Iterator[Finding]:
    """Extract an image with the toy models, which the package contains, and with those of the preset."""
    yield _extract_one_image(TOY, None, options.device)
    if options.preset in (None, TOY):
        return
    if any(finding.state == "fail" for finding in check_weights(options)):
        yield Finding("stages", "warn", f"{options.preset}: skipped, because its weights are incomplete")
        return
    import torch

    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and get_preset(options.preset).localizer in _SLOW_ON_A_CPU:
        yield Finding("stages", "warn", f"{options.preset}: skipped, an image takes minutes on a CPU")
        return
    yield _extract_one_image(options.preset, options.weights, options.device)


def _extract_one_image(preset: str, source: str | None, device: str | None) -> Finding:
    from regionspot.pipeline.backbones.bundle import Backbones  # imports torch
    from regionspot.pipeline.extraction.extract import extract

    begin = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            manifest, backbones = _one_image(Path(folder)), Backbones.load(preset, source, device=device)
            load_seconds = time.perf_counter() - begin
            cache = open_or_create(Path(folder, "doctor.zarr"), manifest, backbones.feature_sets(), 1)
            summary = extract(cache, Path(folder), backbones)
            verified = verify(cache)
            sound = verified.sound and not summary.failed and _is_finite(cache)
    except (RegionSpotError, OSError) as error:
        return Finding("stages", "fail", f"{preset}: {error}", "fix that and run the doctor again")
    seconds = {stage: share * summary.seconds for stage, share in summary.shares.items() if stage != "wait"}
    seconds = {"load": load_seconds, **seconds, "verify": verified.seconds}
    timings = ", ".join(f"{stage} {duration:.2f} s" for stage, duration in seconds.items())
    text = f"{preset} on {backbones.device}: an image with {_BOXES} boxes: {timings}"
    if not sound:
        reason = "; ".join(map(str, verified.problems)) or "features are not finite, or the image could not be read"
        return Finding("stages", "fail", f"{text}; {reason}", "try --device cpu, or --weights from another source")
    return Finding("stages", "ok", text)


def _one_image(folder: Path) -> Manifest:
    """Write an image of 640 x 480 pixels into the folder and return its manifest."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8))
    coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "image.jpg", quality=92)
    corners = rng.random((_BOXES, 2), np.float32) * np.array([400, 300], np.float32)
    return Manifest(
        dataset="doctor",
        split="train",
        image_ids=np.array([1]),
        paths=np.array(["image.jpg"], dtype=np.dtypes.StringDType()),
        heights=np.array([480], np.int32),
        widths=np.array([640], np.int32),
        offsets=np.array([0, _BOXES]),
        boxes_xyxy=np.concatenate([corners, corners + np.array([200, 150], np.float32)], axis=1),
        category_index=np.zeros(_BOXES, np.int32),
        annotation_ids=np.arange(_BOXES),
        categories=(Category(1, "thing"),),
    )


def _is_finite(cache: FeatureCache) -> bool:
    batch = cache.read(np.array([0]))
    return bool(np.isfinite(batch.tokens).all() and np.isfinite(batch.feature_map).all())
