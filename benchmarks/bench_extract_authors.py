"""The extraction in the order of work of RegionSpot's authors, by the libraries that they call.

One image at a time: segment_anything's image encoder, its prompt encoder and its mask decoder with masks, which are
brought to the image's size; open_clip's image tower; one file an image by torch.save. Tokens are what comes out
of the mask decoder's transformer on the way. On a GPU under float16 autocast, as they run it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from benchmarks.bench_extract_data import WEIGHTS, Job, boxes_in, prompts
from regionspot.pipeline.backbones.builders import build_clip, build_sam, get_preset
from regionspot.pipeline.backbones.sam_token_decoder import FIRST_MASK_TOKEN
from regionspot.pipeline.backbones.weights import load_weights


class Authors:
    """Their path over the images of a job. Each public method is a step that can be timed."""

    def __init__(self, job: Job, device: str = "cpu") -> None:
        names, self._job, self._device = get_preset(job.preset), job, torch.device(device)
        self._sam = _drawn(names.localizer, build_sam(names.localizer)).to(device)
        self._clip = AuthorsClip(names.encoder, self._device)
        self._resize = ResizeLongestSide(self._sam.image_encoder.img_size)
        self._queries: list[Tensor] = []
        self._sam.mask_decoder.transformer.register_forward_hook(lambda *call: self._queries.append(call[2][0]))
        self._rgb = self._read(0)
        with self._inference():
            grid = self._sam.prompt_encoder.image_embedding_size
            width = self._sam.mask_decoder.transformer_dim
            self._embedding = torch.randn(1, width, *grid, generator=torch.Generator().manual_seed(0)).to(device)

    def encode(self) -> NDArray[np.float32]:
        """SAM's embedding (C, g, g) of the first image."""
        with self._inference():
            return self._host(self._sam_embedding(self._rgb)[0])

    def tokens(self, count: int) -> NDArray[np.float32]:
        """Tokens (count, C) of so many boxes on the first image, by a drawn embedding."""
        with self._inference():
            return self._host(self._tokens(self._embedding, boxes_in(self._job.size(0), count, 0), self._job.size(0)))

    def clip(self) -> NDArray[np.float32]:
        """CLIP's map of the first image."""
        with self._inference():
            return self._host(self._clip_map(self._rgb))

    def text(self, count: int) -> NDArray[np.float32]:
        """Embeddings of so many prompts."""
        tokenizer, length = self._clip.built.tokenizer, self._clip.model.context_length
        rows = [[tokenizer.sot_token_id, *tokenizer.encode(p), tokenizer.eot_token_id] for p in prompts(count)]
        padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=self._device)
        with self._inference():
            return self._host(self._clip.model.encode_text(padded))

    def whole(self, images: int) -> None:
        """The stage: so many images read, encoded and stored."""
        for row, path in enumerate(self._job.paths()[:images]):
            self._extract(row, path.with_suffix(".pth"))

    def _extract(self, row: int, out: Path) -> None:
        rgb, size = self._read(row), self._job.size(row)
        with self._inference():
            tokens = self._tokens(self._sam_embedding(rgb), boxes_in(size, self._job.boxes, row), size)
            feature_map = self._clip_map(rgb)
        torch.save({"tokens": tokens.cpu(), "feature_map": feature_map.cpu()}, out)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        half = torch.autocast(self._device.type, torch.float16, enabled=self._device.type == "cuda")
        with torch.no_grad(), half:
            yield

    def _read(self, row: int) -> NDArray[np.uint8]:
        return read_rgb(self._job.paths()[row])

    def _sam_embedding(self, rgb: NDArray[np.uint8]) -> Tensor:
        image = torch.as_tensor(self._resize.apply_image(rgb), device=self._device).permute(2, 0, 1)[None]
        return self._sam.image_encoder(self._sam.preprocess(image.contiguous()))

    def _tokens(self, embedding: Tensor, boxes: NDArray[np.float32], size: tuple[int, int]) -> Tensor:
        scaled = torch.as_tensor(self._resize.apply_boxes(boxes, size), dtype=torch.float32, device=self._device)
        sparse, dense = self._sam.prompt_encoder(points=None, boxes=scaled, masks=None)
        low, _ = self._sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=self._sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        entered = self._resize.get_preprocess_shape(*size, self._resize.target_length)
        self._masks = self._sam.postprocess_masks(low, entered, size) > self._sam.mask_threshold
        return self._queries.pop()[:, FIRST_MASK_TOKEN]

    def _clip_map(self, rgb: NDArray[np.uint8]) -> Tensor:
        return self._clip.maps(self._clip.square(rgb))[0]

    def _host(self, values: Tensor) -> NDArray[np.float32]:
        return values.float().cpu().numpy()


class AuthorsClip:
    """open_clip's model with random weights, and the authors' preprocessing."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.built, self._device = build_clip(name), device
        self.model = _drawn(name, self.built.model).to(device)
        self.model.visual.output_tokens = True

    def square(self, rgb: NDArray[np.uint8]) -> Tensor:
        """The image (1, 3, S, S) as the image tower takes it."""
        image = torch.from_numpy(rgb.copy()).to(self._device).permute(2, 0, 1).float().div_(255)[None]
        square = transforms.resize(image, list(self.model.visual.image_size), antialias=False)
        of_channels = (self.built.mean, self.built.std)
        mean, std = (torch.tensor(each, device=self._device).view(3, 1, 1) for each in of_channels)
        normalised: Tensor = (square - mean) / std
        return normalised

    def maps(self, squares: Tensor) -> Tensor:
        """Feature maps (B, T, D) of images (B, 3, S, S)."""
        tokens: Tensor = self.model.visual(squares)[1]
        return tokens


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """An image file as (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB"))


def _drawn(name: str, model: Any) -> Any:
    model.load_state_dict(load_weights(name, WEIGHTS, model.state_dict()).state_dict)
    return model.eval().requires_grad_(False)
