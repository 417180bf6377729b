"""Vocabularies: class names, prompt templates, and one text embedding per class.

The embedding of a class is the mean of the text encoder's raw outputs over the templates, normalised once at the end,
as in the authors' code; CLIP's own notebook averages normalised embeddings, which gives other numbers. V3Det with 81
templates is a million prompts, so a vocabulary is computed once and stored under a digest of everything that decides
its numbers. While it is computed, each finished chunk is stored too: a killed run resumes at the first missing one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from regionspot.cache.errors import InputError, WeightsError
from regionspot.cache.machine import home_folder
from regionspot.cache.progress import Progress
from regionspot.fusion.templates import SLOT
from regionspot.fusion.tensor_file import read_tensor_file, write_tensor_file

log = logging.getLogger(__name__)

# Limits the memory of one call. Large enough that the encoder, which sorts prompts by length, adds little padding.
PROMPTS_PER_CALL = 8192


class TextEncoder(Protocol):
    """The text encoder interface that a vocabulary needs."""

    @property
    def name(self) -> str: ...

    @property
    def weights_sha256(self) -> str: ...

    def embed_prompts(self, prompts: list[str], /) -> Tensor:
        """float32 (P, text_dim), not normalised. Raises InputError for a prompt longer than its context."""
        ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Classes in the order of their indices.

    names           verbatim, with `_` and `(...)`; a name may occur twice, as in V3Det
    templates       each with `{}` as the slot for the name
    embeddings      float32 (V, text_dim), L2-normalised
    digest          SHA-256 over names, templates, other texts than the names, and the text encoder's name and weights
    encoder_sha256  of the text encoder's weights; empty if unknown
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    embeddings: Tensor
    digest: str
    encoder_sha256: str = ""

    def __len__(self) -> int:
        return len(self.names)


def vocabulary_folder() -> Path:
    """The folder of stored vocabularies: `$REGIONSPOT_HOME/vocabularies`, by default under ~/.cache/regionspot."""
    return home_folder("vocabularies")


def build_vocabulary(
    names: Sequence[str],
    templates: Sequence[str],
    encoder: TextEncoder,
    store: Path | None = None,
    *,
    texts: Sequence[Sequence[str]] | None = None,
) -> Vocabulary:
    """The vocabulary of `names`, loaded from `store` (default `vocabulary_folder()`), or computed and saved there.

    texts   what stands in the prompts of each class instead of its name: synonyms, for example. The embedding is the
            mean over all of them

    If the store cannot be written, a warning is logged. Raises InputError for an empty list, an empty name, and a
    template without `{}` or given twice.
    """
    names, templates = tuple(names), tuple(templates)
    texts = [[name] for name in names] if texts is None else texts
    _check(names, templates)
    digest = vocabulary_digest(names, templates, encoder, texts)
    path = (store or vocabulary_folder()) / f"{digest}.safetensors"
    embeddings = _load(path, digest)
    if embeddings is None:
        chunks = path.with_suffix(".chunks")
        embeddings = _embed(texts, templates, encoder, chunks, digest)
        document = {
            "names": names,
            "templates": templates,
            "encoder": encoder.name,
            "encoder_sha256": encoder.weights_sha256,
        }
        if _save(path, digest, embeddings, document):
            shutil.rmtree(chunks, ignore_errors=True)
    return Vocabulary(names, templates, embeddings, digest, encoder.weights_sha256)


def vocabulary_digest(
    names: Sequence[str], templates: Sequence[str], encoder: TextEncoder, texts: Sequence[Sequence[str]]
) -> str:
    """The name of a stored vocabulary: SHA-256 as hex."""
    document: list[Any] = [list(names), list(templates), encoder.name, encoder.weights_sha256]
    if any(list(some) != [name] for some, name in zip(texts, names, strict=True)):
        document.append([list(some) for some in texts])
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _check(names: tuple[str, ...], templates: tuple[str, ...]) -> None:
    if not names:
        raise InputError("vocabulary: there are no names; give at least one class")
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"vocabulary: name {position + 1} of {len(names)} is {name!r}, expected at least one word")
    if not templates:
        raise InputError(f"vocabulary: there are no templates; give at least one, such as '{SLOT}.'")
    for template in templates:
        if SLOT not in template:
            raise InputError(f"vocabulary: template {template!r} has no '{SLOT}' as the slot for the name")
        if templates.count(template) > 1:
            raise InputError(f"vocabulary: template {template!r} is given twice and would count double")


def _embed(
    texts: Sequence[Sequence[str]], templates: tuple[str, ...], encoder: TextEncoder, chunks: Path, digest: str
) -> Tensor:
    """float32 (V, text_dim), normalised; a repeated text is encoded once. Finished chunks are kept in `chunks`."""
    unique = list(dict.fromkeys(text for some in texts for text in some))
    progress = Progress(len(unique) * len(templates), "prompts")
    texts_per_call = max(1, PROMPTS_PER_CALL // len(templates))
    means, stored = [], len(unique) > texts_per_call
    for start in range(0, len(unique), texts_per_call):
        some_texts = unique[start : start + texts_per_call]
        path = chunks / f"{start:06}.safetensors"
        mean = _load(path, digest) if stored else None
        if mean is None or len(mean) != len(some_texts):
            mean = embed_texts(some_texts, templates, encoder)
            stored = stored and _save(path, digest, mean, {})
        means.append(mean)
        progress.step(len(some_texts) * len(templates))
    mean, position = torch.cat(means), {text: index for index, text in enumerate(unique)}
    # All texts have the same number of prompts, so the mean of their means is the mean over all prompts.
    return F.normalize(torch.stack([mean[[position[text] for text in some]].mean(dim=0) for some in texts]), dim=-1)


def embed_texts(texts: Sequence[str], templates: Sequence[str], encoder: TextEncoder) -> Tensor:
    """float32 (n, text_dim), not normalised: the mean over the templates for each text.

    Raises WeightsError for embeddings that are not finite, InputError for a prompt that the encoder cannot read.
    """
    prompts = [template.replace(SLOT, text) for text in texts for template in templates]
    embedded = encoder.embed_prompts(prompts).detach().float().cpu()
    if not torch.isfinite(embedded).all():
        raise WeightsError(f"{encoder.name}: its text embeddings are not finite; use other weights")
    return embedded.view(len(texts), len(templates), -1).mean(dim=1)


def _load(path: Path, digest: str) -> Tensor | None:
    """The embeddings stored in `path`; None if the file is missing or damaged."""
    if not path.exists():
        return None
    try:
        tensors, document = read_tensor_file(path)
        embeddings = tensors["embeddings"]
        intact = document is not None and document["digest"] == digest and document["sha256"] == _sha256(embeddings)
    except (WeightsError, KeyError):
        intact = False
    if not intact:
        log.warning("%s: is damaged; this vocabulary is computed again", path)
        return None
    return embeddings


def _save(path: Path, digest: str, embeddings: Tensor, document: dict[str, Any]) -> bool:
    """Write the file; if that is impossible, log a warning and return False."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"digest": digest, "sha256": _sha256(embeddings), **document}
        write_tensor_file(path, {"embeddings": embeddings}, document)
    except OSError as error:
        log.warning("%s: cannot be written (%s); this vocabulary will be computed again next time", path, error)
        return False
    return True


def _sha256(embeddings: Tensor) -> str:
    return hashlib.sha256(embeddings.contiguous().numpy().tobytes()).hexdigest()
