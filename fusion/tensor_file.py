"""Tensors and a JSON document in one safetensors file: the format of vocabularies, checkpoints and training states.

Any safetensors reader opens it, and unlike a pickle it cannot run code. The document is one entry of the file's header,
so it is read without loading the tensors.
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
    """Write the file atomically. Raises OSError if it cannot be written."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {KEY: json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)}
    write_file(path, save(contiguous, metadata))


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, on the CPU, and the document; None if another program wrote the file.

    Raises WeightsError for a file that is missing, truncated or not in safetensors format.
    """
    return _read(path, with_tensors=True)


def read_document(path: Path) -> dict[str, Any] | None:
    """The document alone, without loading a tensor. Raises the errors of `read_tensor_file`."""
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
