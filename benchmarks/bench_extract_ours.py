"""The same steps by this project's own code, in one dtype of the image encoders."""

from __future__ import annotations

import shutil
import time

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.bench_extract_data import WEIGHTS, Job, boxes_in, prompts
from regionspot.pipeline.backbones.bundle import Backbones
from regionspot.pipeline.extraction.config import ExtractConfig
from regionspot.pipeline.extraction.extract import extract, open_for_extraction
from regionspot.pipeline.extraction.malloc import keep_memory


class Ours:
    """Our path over the images of a job; the steps are those of `Authors`."""

    def __init__(self, job: Job, dtype: str, device: str = "cpu") -> None:
        self._job = job
        self._backbones = Backbones.load(job.preset, WEIGHTS, device=device, dtype=dtype)
        keep_memory()  # as `extract` does it, when the models are there
        self._localizer, (self._encoder,) = self._backbones.localizer, self._backbones.encoders
        image = Image.open(job.paths()[0]).convert("RGB")
        self._image = self._localizer.preprocess(image)
        self._square = self._encoder.preprocess(image)
        side = self._localizer.pixels // 16  # SAM's patch
        random = torch.Generator().manual_seed(0)
        self._embedding = torch.randn(1, self._localizer.token_dim, side, side, generator=random)
        self._encoded: torch.Tensor | None = None

    def encode(self) -> NDArray[np.float32]:
        self._encoded = self._localizer.encode([self._image])
        return self._encoded[0].cpu().numpy()

    def tokens(self, count: int) -> NDArray[np.float32]:
        return self._tokens(self._embedding, count)

    def tokens_of_encoded(self, count: int) -> NDArray[np.float32]:
        """Tokens by the embedding that `encode` made last, for the error that its dtype leaves in them."""
        return self._tokens(self._encoded, count)

    def clip(self, images: int = 1) -> NDArray[np.float32]:
        return self._encoder.encode(self._square.expand(images, -1, -1, -1))[0].cpu().numpy()

    def text(self, count: int) -> NDArray[np.float32]:
        return self._encoder.embed_prompts(prompts(count)).cpu().numpy()

    def whole(self, images: int) -> float:
        """Extract so many images into a new cache; the share of CPU time outside the image encoders."""
        path, manifest = self._job.folder.with_suffix(".zarr"), self._job.manifest(images)
        shutil.rmtree(path, ignore_errors=True)
        within = _Timed([self._localizer, self._encoder])
        cache = open_for_extraction(path, manifest, self._job.folder, self._backbones)
        started = time.process_time()
        summary = extract(cache, self._job.folder, self._backbones, ExtractConfig(decode_threads=1))
        taken = time.process_time() - started
        within.undo()
        if summary.failed:
            raise ValueError(f"{path}: {summary.failed} of {images} images were not extracted")
        return 1 - within.seconds / taken

    def _tokens(self, embedding: torch.Tensor, count: int) -> NDArray[np.float32]:
        size = self._job.size(0)
        return self._localizer.tokens_of_images(embedding, [boxes_in(size, count, 0)], [size])[0].cpu().numpy()


class _Timed:
    """CPU time that the calling thread spends in the `encode` of these models. With one thread of math it is all."""

    def __init__(self, models: list[object]) -> None:
        self._models, self.seconds = models, 0.0
        for model in models:
            model.encode = self._timed(model.encode)

    def _timed(self, encode):
        def timed(batch):
            started = time.thread_time()
            try:
                return encode(batch)
            finally:
                self.seconds += time.thread_time() - started

        return timed

    def undo(self) -> None:
        for model in self._models:
            del model.encode
