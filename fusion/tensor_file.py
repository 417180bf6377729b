"""Tensors and a JSON document in one safetensors file: the form of vocabularies, checkpoints and a run's state.

Any safetensors reader opens them, and no reader ever has to run code from them. The document lies in the header
under one key, so it is read without touching the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from regionspot.cache.errors import WeightsError
from regionspot.cache.storage.atomic_files import write_file

KEY = "regionspot"


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write the file whole or not at all. Raises OSError where the place cannot be written."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {KEY: json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)}
    write_file(path, save(whole, metadata))


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, on the CPU, and the document; None where the file is of somebody else's making.

    Raises WeightsError for a file that is missing, cut short or no safetensors file.
    """
    return _read(path, with_tensors=True)


def read_document(path: Path) -> dict[str, Any] | None:
    """The document alone, without reading a tensor. Raises what `read_tensor_file` does."""
    return _read(path, with_tensors=False)[1]


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if with_tensors else []
            tensors = {name: file.get_tensor(name) for name in names}
        document = json.loads(metadata[KEY]) if KEY in metadata else None
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as a safetensors file ({error})") from None
    return tensors, document if isinstance(document, dict) else None
