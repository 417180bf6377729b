"""The input of a training step as RegionSpot's authors compute it: decode images, run CLIP again, load token files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bench_extract_authors import AuthorsClip, read_rgb
from benchmarks.bench_extract_data import Job
from regionspot.fusion.training.batches import TrainingBatch
from regionspot.pipeline.backbones.builders import get_preset


class AuthorsInput:
    """Fills a batch from `batch_size` JPEG files and one token file per image."""

    def __init__(self, preset: str, folder: Path, batch_size: int) -> None:
        job = Job(preset, folder, batch_size)
        job.write_images()
        self._paths = job.paths()
        self._clip = AuthorsClip(get_preset(preset).encoder, torch.device("cpu"))

    def write_tokens(self, batch: TrainingBatch) -> None:
        """Save the tokens of a batch, a file per image."""
        for path, tokens, mask in zip(self._paths, batch.tokens, batch.region_mask, strict=True):
            torch.save({"tokens": tokens[mask].clone()}, path.with_suffix(".pth"))

    def __call__(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with maps computed from the images, and tokens loaded from the files that `write_tokens` wrote."""
        squares = torch.cat([self._clip.square(read_rgb(path)) for path in self._paths])
        with torch.no_grad():
            maps = self._clip.maps(squares)
        tokens = torch.zeros_like(batch.tokens)
        for row, path in enumerate(self._paths):
            loaded = torch.load(path.with_suffix(".pth"), weights_only=True)["tokens"]
            tokens[row, : len(loaded)] = loaded
        return replace(batch, feature_map=maps, tokens=tokens)
