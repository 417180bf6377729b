"""Checkpoints of trained heads: our format, and the files that the authors released.

Our checkpoint is a safetensors file of the head alone, with the description of its training in the header. A released
file is a pickled `{"model": {...}}` that also holds SAM's and CLIP's weights; it states neither preset nor vocabulary,
so the preset is derived from the shapes if they are unambiguous. Torch's restricted unpickler opens it: it creates
tensors and refuses everything else. A file with the same tensor names but without the authors' nesting, or with the
nesting of other training programs (cache/state_dicts.py), is read as a released file.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.state_dicts import WRAPPERS, check_fit, require_finite, state_dict_of, unwrapped
from regionspot.fusion.head import HEADS
from regionspot.fusion.heads.spec import HeadSpec
from regionspot.fusion.tensor_file import read_tensor_file, write_tensor_file

log = logging.getLogger(__name__)

FORMAT = 1
KIND = "fusion head"
SUBMODULES = ("to_clip.", "decoder.", "projector.")
RELEASED_PREFIX = "model."


@dataclass(frozen=True)
class HeadInfo:
    """How a head was trained. Everything except `preset` is empty for a file that the authors released.

    preset             name of the pair of backbones ("bl"); None if training was given none
    localizer, encoder names of the feature sets it was trained on
    weights_sha256     of the backbones: {feature set name: hex}
    caches             one record for each cache: dataset, digest of the manifest, share of the batches, and under "map"
                       and "token" the provenance, shape and encoding of the features
    vocabularies       digests, one for each cache
    templates          of the vocabularies, so that evaluation uses the same ones
    classes            names of the classes with at least one region in a cache, sorted: what the head has seen. Empty
                       if unknown, as it is after training from a released head
    step               training steps done
    validation         scores of the head after this step, if it was validated
    """

    preset: str | None = None
    localizer: str | None = None
    encoder: str | None = None
    weights_sha256: dict[str, str] = field(default_factory=dict)
    caches: tuple[dict[str, Any], ...] = ()
    vocabularies: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    step: int = 0
    validation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A head in evaluation mode on the CPU. `ignored` counts the other tensors of a released file by their module."""

    head: nn.Module
    spec: HeadSpec
    info: HeadInfo
    ignored: dict[str, int] = field(default_factory=dict)


def save_checkpoint(path: Path, spec: HeadSpec, head: nn.Module, info: HeadInfo) -> None:
    """Write the head, which was built from `spec`, atomically. Raises OSError if the file cannot be written."""
    document = {"kind": KIND, "format": FORMAT, "head": spec.as_json(), "info": asdict(info)}
    write_tensor_file(path, head.state_dict(), document)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and values of a head's weights, as hex."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(path: Path, preset: str | None = None, head_class: str | None = None) -> Checkpoint:
    """Load a head from our checkpoint or from one that the authors released.

    preset      "bb", "bl", "bl336": the model of a released file; needed if the shapes fit two of them. For a file that
                states its preset, the two must agree
    head_class  `file.py:Class` or `package.module:Class`, for a head of the user's own class. The checkpoint names it,
                but its code is only imported when the caller names it too: a file must not decide what code runs

    Raises WeightsError for a file that is missing, is no checkpoint, cannot be opened safely, has other shapes or holds
    NaN or infinity; InputError for a preset or a class that is unknown, missing or another one.
    """
    if preset is not None and preset not in HEADS:
        raise InputError(f"preset {preset!r}: expected one of {', '.join(HEADS)}")
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such checkpoint file")
    if _is_pickle(path):
        return _load_released(path, state_dict_of(path, _unpickle(path)), preset)
    tensors, document = read_tensor_file(path)
    if document is not None and document.get("kind") == KIND:
        return _load_ours(path, tensors, document, preset, head_class)
    state = unwrapped(tensors)
    if any(_own_name(name) for name in state):
        return _load_released(path, state, preset)
    kind = f" (it is a {document.get('kind')})" if document else ""
    raise WeightsError(
        f"{path}: is a safetensors file, but no head that `regionspot train` wrote{kind}; give a run's head.safetensors"
    )


def _is_pickle(path: Path) -> bool:
    """Whether torch wrote the file: a ZIP archive, or for old files a bare pickle (protocol 2 starts with 0x80).

    A safetensors file starts with 8 bytes of any value, the length of its header, followed by the header as JSON.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith((b"PK", b"\x80")) and start[8:] != b"{"


def _load_ours(
    path: Path, tensors: dict[str, Tensor], document: dict[str, Any], preset: str | None, head_class: str | None
) -> Checkpoint:
    if document.get("format") != FORMAT:
        raise WeightsError(
            f"{path}: has format {document.get('format')}, this version reads {FORMAT}; use the version that wrote it"
        )
    try:
        spec = HeadSpec.from_json(document["head"])
        info = msgspec.convert(document["info"], HeadInfo)
        for kind in ("map", "token"):
            msgspec.convert([cache[kind] for cache in info.caches if kind in cache], list[dict[str, Any]])
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise WeightsError(f"{path}: its header is incomplete or damaged ({error})") from None
    if preset is not None and info.preset not in (None, preset):
        raise InputError(f"{path}: was trained as preset {info.preset}, not {preset}; leave --preset out")
    spec = _with_class(path, spec, head_class)
    return Checkpoint(_build(path, spec, tensors), spec, info)


def _with_class(path: Path, spec: HeadSpec, head_class: str | None) -> HeadSpec:
    """The spec with the class that the caller named, which must have the name that the checkpoint states."""
    if head_class is None and spec.own_class:
        raise InputError(
            f"{path}: its head is the class {spec.type}, and a checkpoint never decides what code is run; "
            f"if you trust that code, name it with --head {spec.type}"
        )
    if head_class in (None, spec.type):
        return spec
    if not spec.own_class or spec.type.rpartition(":")[2] != head_class.rpartition(":")[2]:
        raise InputError(f"{path}: its head is {spec.type}, not {head_class}; correct --head, or leave it out")
    return replace(spec, type=head_class)


def _load_released(path: Path, tensors: Mapping[str, Tensor], preset: str | None) -> Checkpoint:
    state, ignored = _split(path, tensors)
    shapes = _shapes_of(path, state)
    matching = [
        name for name, config in HEADS.items() if all(getattr(config, field) == n for field, n in shapes.items())
    ]
    if preset is None and len(matching) > 1:
        raise InputError(f"{path}: has the shapes of {' and of '.join(matching)}; name one with --preset")
    if not matching or (preset is not None and preset not in matching):
        expected = f"{preset}, {HEADS[preset]}" if preset else f"any of {', '.join(HEADS)}"
        actual = ", ".join(f"{field}={number}" for field, number in shapes.items())
        raise WeightsError(f"{path}: its head has {actual}, which is not {expected}; give the preset it was made for")
    if ignored:
        log.info("%s: ignored: %s", path, ", ".join(f"{n} tensors of {m}" for m, n in ignored.items()))
    name = preset or matching[0]
    spec = HeadSpec.from_json(asdict(HEADS[name]))
    return Checkpoint(_build(path, spec, state), spec, HeadInfo(preset=name), ignored)


def _unpickle(path: Path) -> Any:
    """The content of a pickled file, memory-mapped if possible: most of its gigabytes are not needed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise WeightsError(f"{path}: holds more than tensors, which could run code, so it is not opened") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: cannot be read as a checkpoint ({reason})") from None


def _split(path: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of the head under our names, in float32, and the number of tensors of every other module."""
    ours, others = {}, Counter[str]()
    for key, value in state.items():
        if name := _own_name(key):
            # A copy: a mapped tensor would change with the file.
            ours[name] = value.to(torch.float32, copy=True)
        else:
            others[_unprefixed(key).split(".")[0]] += 1
    if not ours:
        raise WeightsError(f"{path}: holds no fusion head (no tensor named model.to_clip, model.decoder, ...)")
    return ours, dict(others)


def _own_name(key: str) -> str | None:
    """Our name of a tensor of the head; None for a tensor of another module."""
    name = _unprefixed(key)
    return name if name.startswith(SUBMODULES) else None


def _unprefixed(key: str) -> str:
    """The name without the prefixes of the authors and of wrappers, in any order; no name of the head has one."""
    for prefix in (RELEASED_PREFIX, *WRAPPERS):
        if key.startswith(prefix):
            return _unprefixed(key.removeprefix(prefix))
    return key


def _shapes_of(path: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
    """The fields of HeadConfig that follow from the shapes of a state dict: all except attention heads and dropout."""
    try:
        width, token_dim = state["to_clip.weight"].shape
        return {
            "token_dim": token_dim,
            "width": width,
            "text_dim": state["projector.weight"].shape[0],
            "layers": 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.layers.")),
            "ffn": state["decoder.layers.0.linear1.weight"].shape[0],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{path}: its fusion head is incomplete ({error})") from None


def _build(path: Path, spec: HeadSpec, state: Mapping[str, Tensor]) -> nn.Module:
    # On the meta device: no memory and no random numbers for weights that are replaced below. A class of the user may
    # compute in its constructor, which needs real tensors.
    with nullcontext() if spec.own_class else torch.device("meta"):
        try:
            head = spec.build()
        except InputError as error:
            raise WeightsError(f"{path}: {error}") from error
    check_fit(path, f"the {spec.type} head", state, head.state_dict())
    require_finite(path, state)
    head.load_state_dict(dict(state), assign=True)
    return head.requires_grad_(True).eval()
