"""Find, download and verify the weights of the frozen models.

Every loaded state dict has the SHA-256 of its file and an origin, which are written into a cache's provenance, because
features of different weights must not be mixed. The origin contains no path, so a copy of a file has the same origin.
Random weights, for benchmarks and tests, must be requested as "random:SEED".
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regionspot.cache.errors import WeightsError
from regionspot.cache.machine import home_folder, processors
from regionspot.cache.state_dicts import check_fit, require_finite
from regionspot.cache.storage.atomic_files import partial_path
from regionspot.pipeline.backbones.state_dicts import StateDict, read_state_dict
from regionspot.pipeline.toy import TOY_WEIGHTS

log = logging.getLogger(__name__)

RANDOM = "random:"
CHUNK_BYTES = 2**20
PROGRESS_SECONDS = 5.0
TIMEOUT_SECONDS = 30.0
# OpenAI's archives contain these numbers among the tensors (openai/CLIP, clip/model.py: build_model drops them).
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class OfficialFile:
    """A published weights file. `sha256` is None if none is published; the file's own is then only recorded."""

    file: str
    url: str
    sha256: str | None


def _sam(file: str, sha256: str) -> OfficialFile:
    return OfficialFile(file, f"https://dl.fbaipublicfiles.com/segment_anything/{file}", sha256)


def _clip(file: str, sha256: str) -> OfficialFile:
    return OfficialFile(file, f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}", sha256)


def _sam2(name: str, sha256: str) -> OfficialFile:
    released = "092824" if name.startswith("sam2.1") else "072824"
    return OfficialFile(f"{name}.pt", f"https://dl.fbaipublicfiles.com/segment_anything_2/{released}/{name}.pt", sha256)


_SAM2_SHA256 = {
    "sam2_hiera_tiny": "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125",
    "sam2_hiera_small": "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3",
    "sam2_hiera_base_plus": "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071",
    "sam2_hiera_large": "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b",
    "sam2.1_hiera_tiny": "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
    "sam2.1_hiera_small": "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
    "sam2.1_hiera_base_plus": "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    "sam2.1_hiera_large": "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
}
# URLs: facebookresearch/segment-anything, README.md; openai/CLIP, clip/clip.py, whose URLs contain the SHA-256;
# ChaoningZhang/MobileSAM, README.md; facebookresearch/sam2, README.md. The authors of the last two publish no SHA-256;
# these are the ones that micro-sam (SAM 2) and other projects verify.
OFFICIAL = {
    "sam_vit_b": _sam("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "sam_vit_l": _sam("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "sam_vit_h": _sam("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "mobile_sam": OfficialFile(
        "mobile_sam.pt",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    **{name: _sam2(name, sha256) for name, sha256 in _SAM2_SHA256.items()},
    "clip_vit_b_16": _clip("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "clip_vit_l_14": _clip("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "clip_vit_l_14_336": _clip("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}


@dataclass(frozen=True)
class LoadedWeights:
    """Weights that fit their model.

    state_dict  on the CPU, with exactly the model's names and shapes, in the file's dtype
    sha256      of the file, as hex; "random:SEED" for random weights
    origin      "official", "package", "file" or "random:SEED"
    """

    state_dict: StateDict
    sha256: str
    origin: str


def weights_folder() -> Path:
    """The folder of official files: `$REGIONSPOT_HOME/weights`, by default in ~/.cache/regionspot."""
    return home_folder("weights")


def check_source(source: str | None) -> None:
    """Raises WeightsError for a source that is not a file, a folder or "random:SEED"."""
    if source is None:
        return
    if source.startswith(RANDOM):
        _seed(source)
    elif not ((path := Path(source).expanduser()).is_file() or path.is_dir()):
        raise WeightsError(f"{path}: is not a weights file or folder; give one, or random:SEED")


def load_weights(
    name: str,
    source: str | None,
    expected: Mapping[str, Tensor],
    official: OfficialFile | None = None,
    convert: Callable[[StateDict], StateDict] = dict,
) -> LoadedWeights:
    """Load the weights of the backbone `name` and check them against the built model's state dict, `expected`.

    source    None (the official file, downloaded once to `weights_folder()`; for a toy backbone the package's file), a
              file, a folder that contains the official file, or "random:SEED"
    official  the official file of a backbone that is not in OFFICIAL
    convert   from the content of the file to the model's state dict, if they differ

    Raises WeightsError if the file does not exist, cannot be opened safely, does not fit the model or contains NaN or
    infinity, and if the SHA-256 of a downloaded file is wrong.
    """
    check_source(source)
    if source is not None and source.startswith(RANDOM):
        return LoadedWeights(random_weights(_seed(source), expected), source, source)
    official = official or OFFICIAL.get(name)
    path = _find(name, source, official)
    known = {official.sha256} if official and official.sha256 else set()
    state_dict, sha256 = read_state_dict(path, known)
    if source is None and known and sha256 not in known:
        raise WeightsError(
            f"{path}: its SHA-256 is {sha256}, the official file's is {official.sha256 if official else ''}; "
            "delete it and run this again"
        )
    weights = convert({key: tensor for key, tensor in state_dict.items() if key not in NOT_WEIGHTS})
    check_fit(path, name, weights, expected)
    require_finite(path, weights)
    return LoadedWeights(weights, sha256, _origin(name, path, sha256 in known))


def _origin(name: str, path: Path, is_official: bool) -> str:
    if is_official:
        return "official"
    return "package" if path == TOY_WEIGHTS.get(name) else "file"


def _find(name: str, source: str | None, official: OfficialFile | None) -> Path:
    packaged = TOY_WEIGHTS.get(name)
    if source is None and packaged:
        return packaged
    if source is None and official:
        return _official_path(official)
    if source is None:
        raise WeightsError(f"{name}: no official weights are known; give a weights file or random:SEED")
    path = Path(source).expanduser()
    if not path.is_dir():
        return path
    file = packaged.name if packaged else official.file if official else None
    if file is None or not (path / file).is_file():
        raise WeightsError(f"{path}: this folder does not contain {file or f'official weights of {name}'}")
    return path / file


def _seed(source: str) -> int:
    seed = source.removeprefix(RANDOM)
    if not re.fullmatch(r"[0-9]{1,18}", seed):
        raise WeightsError(f"weights {source!r}: expected an integer after {RANDOM!r}, as in random:0")
    return int(seed)


def random_weights(seed: int, expected: Mapping[str, Tensor]) -> StateDict:
    """Random weights that depend only on the seed and on each tensor's name and shape.

    Layers about keep the scale of their input, so that activations neither vanish nor overflow in float16.
    """
    with ThreadPoolExecutor(processors()) as pool:
        tensors = pool.map(lambda name: _random_tensor(seed, name, expected[name].shape), expected)
        return dict(zip(expected, tensors, strict=True))


def _random_tensor(seed: int, name: str, shape: torch.Size) -> Tensor:
    # One generator per tensor: independent of the order, and the global generator is not changed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    value = torch.empty(shape).normal_(generator=generator)
    if name.endswith("gaussian_matrix"):
        return value  # SAM's Fourier frequencies have deviation 1 (segment_anything/modeling/prompt_encoder.py)
    if len(shape) >= 2:
        return value.mul_(0.7 / math.sqrt(math.prod(shape[1:])))
    # Variances and weights of a norm are near 1; a variance must not be negative.
    about_one = len(shape) == 1 and name.endswith(("weight", "running_var"))
    return value.mul_(0.02).add_(1.0 if about_one else 0.0)


def _official_path(official: OfficialFile) -> Path:
    """The official file in the weights folder, downloaded if it is not there yet."""
    path = weights_folder() / official.file
    if path.is_file():
        return path
    try:
        _download(official, path)
    except OSError as error:  # urllib's errors, timeouts and an unwritable folder are all OSErrors
        reason = getattr(error, "reason", None) or error.strerror or error
        raise WeightsError(
            f"{official.file} is not in {path.parent} and could not be downloaded ({reason}); "
            f"download {official.url} to {path}"
        ) from None
    return path


def _download(official: OfficialFile, path: Path) -> None:
    """Download to a temporary file, which is renamed to `path` once its SHA-256 is verified."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    log.info("downloading %s to %s", official.url, path)
    try:
        sha256 = _stream(official, partial)
        if official.sha256 not in (None, sha256):
            raise WeightsError(
                f"{official.url}: the download has SHA-256 {sha256}, expected {official.sha256}; "
                f"download it in another way to {path}"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _stream(official: OfficialFile, partial: Path) -> str:
    """Download to `partial`; the SHA-256 as hex."""
    digest, done, logged_at = hashlib.sha256(), 0, time.monotonic()
    with urllib.request.urlopen(official.url, timeout=TIMEOUT_SECONDS) as response, partial.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if time.monotonic() - logged_at > PROGRESS_SECONDS:
                logged_at = time.monotonic()
                log.info("%s  %d/%d MB", official.file, done // 10**6, total // 10**6)
        if done < total:
            raise urllib.error.URLError(f"the connection ended after {done} of {total} bytes")
    return digest.hexdigest()
