"""Where the frozen models' weights come from, and the proof of which ones they are.

Every loaded state dict carries its SHA-256 and its origin, which end up in a cache's provenance: features of other
weights must never be mixed. The origin does not name a path, so the same file found elsewhere is the same origin.
Weights drawn at random exist for benchmarks; they have to be asked for by name.
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
# OpenAI's archives hold these numbers among the tensors (openai/CLIP, clip/model.py: build_model drops them).
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class OfficialFile:
    """A file that its authors publish. `sha256` is None where they state none; it is then only recorded."""

    file: str
    url: str
    sha256: str | None


def _sam(file: str, sha256: str) -> OfficialFile:
    return OfficialFile(file, f"https://dl.fbaipublicfiles.com/segment_anything/{file}", sha256)


def _clip(file: str, sha256: str) -> OfficialFile:
    return OfficialFile(file, f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}", sha256)


def _sam2(file: str, released: str, sha256: str) -> OfficialFile:
    return OfficialFile(file, f"https://dl.fbaipublicfiles.com/segment_anything_2/{released}/{file}", sha256)


# URLs: facebookresearch/segment-anything, README.md; openai/CLIP, clip/clip.py, whose URLs hold the SHA-256;
# ChaoningZhang/MobileSAM, README.md; facebookresearch/sam2, README.md. The authors of the last two state no SHA-256:
# theirs are those by which micro-sam (SAM 2) and others verify what they download.
OFFICIAL = {
    "sam_vit_b": _sam("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "sam_vit_l": _sam("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "sam_vit_h": _sam("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "mobile_sam": OfficialFile(
        "mobile_sam.pt",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    "sam2_hiera_tiny": _sam2(
        "sam2_hiera_tiny.pt", "072824", "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125"
    ),
    "sam2_hiera_small": _sam2(
        "sam2_hiera_small.pt", "072824", "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3"
    ),
    "sam2_hiera_base_plus": _sam2(
        "sam2_hiera_base_plus.pt", "072824", "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071"
    ),
    "sam2_hiera_large": _sam2(
        "sam2_hiera_large.pt", "072824", "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b"
    ),
    "sam2.1_hiera_tiny": _sam2(
        "sam2.1_hiera_tiny.pt", "092824", "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"
    ),
    "sam2.1_hiera_small": _sam2(
        "sam2.1_hiera_small.pt", "092824", "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"
    ),
    "sam2.1_hiera_base_plus": _sam2(
        "sam2.1_hiera_base_plus.pt", "092824", "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"
    ),
    "sam2.1_hiera_large": _sam2(
        "sam2.1_hiera_large.pt", "092824", "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"
    ),
    "clip_vit_b_16": _clip("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "clip_vit_l_14": _clip("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "clip_vit_l_14_336": _clip("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}


@dataclass(frozen=True)
class LoadedWeights:
    """Weights that fit their model, and what they are.

    state_dict  on the CPU, with exactly the model's names and shapes, in the file's own dtype
    sha256      of the file, as hex; "random:SEED" for weights that were drawn
    origin      "official", "package", "file" or "random:SEED"
    """

    state_dict: StateDict
    sha256: str
    origin: str


def weights_folder() -> Path:
    """Where official files are kept: `$REGIONSPOT_HOME/weights`, by default under ~/.cache/regionspot."""
    return home_folder("weights")


def check_source(source: str | None) -> None:
    """Raises WeightsError for a source that `load_weights` cannot use: no file or folder, and no "random:SEED"."""
    if source is None:
        return
    if source.startswith(RANDOM):
        _seed(source)
    elif not ((path := Path(source).expanduser()).is_file() or path.is_dir()):
        raise WeightsError(f"{path}: there is no such weights file or folder; give one, or random:SEED")


def load_weights(
    name: str,
    source: str | None,
    expected: Mapping[str, Tensor],
    official: OfficialFile | None = None,
    unpack: Callable[[StateDict], StateDict] = dict,
) -> LoadedWeights:
    """The weights of the backbone `name`, checked against `expected`, the state dict of the built model.

    `source` is None (the official file, fetched into `weights_folder()` once, or the package's own for a toy
    backbone), a file, a folder that holds the official file under its own name, or "random:SEED".
    `official` says what is official for a backbone that is not in OFFICIAL, `unpack` makes the model's state dict of
    what a file holds where the two differ.

    Raises WeightsError when there is no such file, when an official one has other bytes, when it may not be
    opened safely, when it does not fit the model, or when it holds NaN or infinity.
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
    weights = unpack({key: tensor for key, tensor in state_dict.items() if key not in NOT_WEIGHTS})
    check_fit(path, name, weights, expected)
    require_finite(path, weights)
    return LoadedWeights(weights, sha256, _origin(name, path, sha256 in known))


def _origin(name: str, path: Path, is_official: bool) -> str:
    if is_official:
        return "official"
    return "package" if path == TOY_WEIGHTS.get(name) else "file"


def _find(name: str, source: str | None, official: OfficialFile | None) -> Path:
    """The file that `source` means."""
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
        raise WeightsError(f"{path}: this folder does not hold {file or f'weights known as those of {name}'}")
    return path / file


def _seed(source: str) -> int:
    seed = source.removeprefix(RANDOM)
    if not re.fullmatch(r"[0-9]{1,18}", seed):
        raise WeightsError(f"weights {source!r}: expected a whole number after {RANDOM!r}, as in random:0")
    return int(seed)


def random_weights(seed: int, expected: Mapping[str, Tensor]) -> StateDict:
    """Weights of the right sizes that depend on nothing but the seed and each tensor's own name and shape.

    Layers keep about the scale of their input, so activations neither vanish nor overflow in float16.
    """
    with ThreadPoolExecutor(processors()) as pool:
        drawn = pool.map(lambda name: _draw(seed, name, expected[name].shape), expected)
        return dict(zip(expected, drawn, strict=True))


def _draw(seed: int, name: str, shape: torch.Size) -> Tensor:
    # A generator of its own for each tensor: the global one stays as it was, and order does not matter.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    value = torch.empty(shape).normal_(generator=generator)
    if name.endswith("gaussian_matrix"):
        return value  # SAM's Fourier frequencies have deviation 1 (segment_anything/modeling/prompt_encoder.py)
    if len(shape) >= 2:
        return value.mul_(0.7 / math.sqrt(math.prod(shape[1:])))
    # A batch norm's variances lie about 1, as its weights do: below 0 they have no root.
    about_one = len(shape) == 1 and name.endswith(("weight", "running_var"))
    return value.mul_(0.02).add_(1.0 if about_one else 0.0)


def _official_path(official: OfficialFile) -> Path:
    """The official file in the weights folder, fetched there unless it is there already."""
    path = weights_folder() / official.file
    if path.is_file():
        return path
    try:
        _download(official, path)
    except OSError as error:  # urllib's errors, timeouts and a folder that may not be written are all OSErrors
        reason = getattr(error, "reason", None) or error.strerror or error
        raise WeightsError(
            f"{official.file} is not in {path.parent} and could not be downloaded ({reason}); "
            f"fetch {official.url} and put it at {path}"
        ) from None
    return path


def _download(official: OfficialFile, path: Path) -> None:
    """Fetch into a file beside `path` that takes its name only once its SHA-256 is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    log.info("downloading %s to %s", official.url, path)
    try:
        sha256 = _stream(official, partial)
        if official.sha256 not in (None, sha256):
            raise WeightsError(
                f"{official.url}: what came has SHA-256 {sha256}, expected {official.sha256}; "
                f"fetch it another way and put it at {path}"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _stream(official: OfficialFile, partial: Path) -> str:
    """Write the body of the answer to `partial`; its SHA-256 as hex."""
    digest, done, told = hashlib.sha256(), 0, time.monotonic()
    with urllib.request.urlopen(official.url, timeout=TIMEOUT_SECONDS) as answer, partial.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                log.info("%s  %d/%d MB", official.file, done // 10**6, total // 10**6)
        if done < total:
            raise urllib.error.URLError(f"the connection ended after {done} of {total} bytes")
    return digest.hexdigest()
