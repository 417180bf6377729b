"""From JPEG to RGB by every decoder at hand: CPU time, and how far its pixels are from Pillow's."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.goals import Report, interleaved

Decode = Callable[[bytes], NDArray[np.uint8]]

TABLE = "JPEG to RGB"


def measure_decoders(report: Report, paths: list[Path], rounds: int, long_side: int) -> None:
    """A row an image and decoder. `draft` may halve an image while decoding, as long as it stays above `long_side`."""
    for path in paths:
        data, decoders = path.read_bytes(), _decoders(long_side)
        samples = interleaved({name: _timed(decode, data) for name, decode in decoders.items()}, rounds)
        expected = decoders["Pillow"](data)
        for name, decode in decoders.items():
            found = decode(data)
            same = found.shape == expected.shape
            off = int(np.abs(found.astype(int) - expected).max()) if same else None
            report.add_row(
                TABLE,
                image=f"{expected.shape[1]} x {expected.shape[0]}",
                decoder=name,
                milliseconds=1000 * min(samples[name]),
                gives=f"{found.shape[1]} x {found.shape[0]}",
                **{"largest difference to Pillow": "another size" if off is None else off},
            )


def _timed(decode: Decode, data: bytes) -> Callable[[], float]:
    def run() -> float:
        started = time.process_time()
        decode(data)
        return time.process_time() - started

    return run


def _decoders(long_side: int) -> dict[str, Decode]:
    """Those that are installed; Pillow always is."""
    found: dict[str, Decode] = {
        "Pillow": _pillow,
        f"Pillow, draft to {long_side}": lambda data: _draft(data, long_side),
    }
    for make in (_simplejpeg, _opencv, _torchvision):
        try:
            found.update(make())
        except ImportError:
            continue
    return found


def _pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _draft(data: bytes, long_side: int) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (long_side, long_side))
    return np.asarray(image.convert("RGB"))


def _simplejpeg() -> dict[str, Decode]:
    import simplejpeg

    def fast(data: bytes) -> Any:
        return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)

    return {"simplejpeg": simplejpeg.decode_jpeg, "simplejpeg, fast DCT and upsampling": fast}


def _opencv() -> dict[str, Decode]:
    import cv2

    cv2.setNumThreads(1)

    def decode(data: bytes) -> Any:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    return {"OpenCV": decode}


def _torchvision() -> dict[str, Decode]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> Any:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return image.permute(1, 2, 0).numpy()

    return {"torchvision.io": decode}
