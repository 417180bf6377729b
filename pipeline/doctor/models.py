"""The doctor's look at the weights, and one image sent through every stage by `extract` itself."""

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
from regionspot.pipeline.doctor.run import Asked, Finding
from regionspot.pipeline.toy import TOY_WEIGHTS

TOY = "toy"
_BOXES = 16
_SLOW_ON_A_CPU = ("sam_vit_l", "sam_vit_h")  # minutes an image: the doctor takes one at most


def weights(asked: Asked) -> Iterator[Finding]:
    """Each file of the preset: whether it is there, and its SHA-256."""
    if asked.preset is None:
        return
    if asked.weights is not None and asked.weights.startswith(RANDOM):
        yield Finding(
            "weights", "warn", f"{asked.weights}: drawn, for benchmarks only", "leave --weights out for real ones"
        )
        return
    preset = get_preset(asked.preset)
    for name in (preset.localizer, preset.encoder):
        if name in TOY_WEIGHTS and asked.weights is None:
            yield Finding("weights", "ok", f"{name}: {TOY_WEIGHTS[name].name}, in the package")
        elif name in OFFICIAL:
            yield _official(name, asked.weights)


def _official(name: str, source: str | None) -> Finding:
    official = OFFICIAL[name]
    place = weights_folder() if source is None else Path(source).expanduser()
    path = place if place.is_file() else place / official.file
    if not path.is_file():
        mend = f"fetch {official.url} and put it there; where there is a network, `extract` does"
        return Finding("weights", "fail", f"{name}: {path} is not there", mend)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if official.sha256 not in (None, sha256):
        mend = f"delete it and fetch {official.url} again"
        size = path.stat().st_size
        text = f"{name}: {path} has {size:,} bytes and SHA-256 {sha256[:12]}, the official one {official.sha256[:12]}"
        return Finding("weights", "fail", text, mend)
    return Finding("weights", "ok", f"{name}: {path} is whole (SHA-256 {sha256[:12]})")


def stages(asked: Asked) -> Iterator[Finding]:
    """An image through the toy's models, which come with the package, and through those of the preset."""
    yield _through(TOY, None, asked.device)
    if asked.preset in (None, TOY):
        return
    if any(finding.state == "fail" for finding in weights(asked)):
        yield Finding("stages", "warn", f"{asked.preset}: not tried, its weights are not all there")
        return
    import torch

    on_cpu = asked.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and get_preset(asked.preset).localizer in _SLOW_ON_A_CPU:
        yield Finding("stages", "warn", f"{asked.preset}: not tried, an image takes minutes on a CPU")
        return
    yield _through(asked.preset, asked.weights, asked.device)


def _through(preset: str, source: str | None, device: str | None) -> Finding:
    from regionspot.pipeline.backbones.bundle import Backbones
    from regionspot.pipeline.extraction.extract import extract
    from regionspot.pipeline.reporting.run_monitor import RunMonitor

    begin = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            manifest, backbones = _one_image(Path(folder)), Backbones.load(preset, source, device=device)
            loaded = time.perf_counter() - begin
            cache = open_or_create(Path(folder, "doctor.zarr"), manifest, backbones.feature_sets(), 1)
            watch = RunMonitor(publish=False)
            summary = extract(cache, Path(folder), backbones, watch=watch)
            verified = verify(cache)
            sound = verified.sound and not summary.failed and _is_finite(cache)
    except (RegionSpotError, OSError) as error:
        return Finding("stages", "fail", f"{preset}: {error}", "mend that and ask the doctor again")
    parts = {"load": loaded, **watch.stats.stage_seconds, "verify": verified.seconds}
    parts.pop("wait", None)
    told = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in parts.items())
    text = f"{preset} on {backbones.device}: an image with {_BOXES} boxes: {told}"
    if not sound:
        why = "; ".join(map(str, verified.problems)) or "features are not finite, or the image could not be read"
        return Finding("stages", "fail", f"{text}; {why}", "try --device cpu, or --weights of another source")
    return Finding("stages", "ok", text)


def _one_image(folder: Path) -> Manifest:
    """An image of 640 x 480 pixels in a folder, and the manifest of it."""
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
