"""State dicts of any origin: extracted from a checkpoint, compared with the model, checked for NaN.

    {"epoch": 3, "state_dict": {"module.layer.weight": ...}}   ->   {"layer.weight": ...}

In this package because heads and backbones follow the same rules. torch is imported only where it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cache.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

# Keys under which training programs store the model's state dict (Lightning and open_clip, PyTorch's tutorials,
# segment-anything and detectron2, DeepSpeed).
NESTED_UNDER = ("state_dict", "model_state_dict", "model", "module")
# Prefixes that wrappers add to every name: DistributedDataParallel and DataParallel, torch.compile.
WRAPPERS = ("module.", "_orig_mod.")
AVERAGED = "n_averaged"  # a counter that torch.optim.swa_utils.AveragedModel stores beside the weights
SHOWN_NAMES = 3  # of each kind, in a message


def state_dict_of(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors by name in a loaded weights file, without nesting and without the prefixes of wrappers.

    Entries that are not tensors (counters, configurations) are dropped. Raises WeightsError, naming `path`, when there
    is no tensor.
    """
    from torch import Tensor

    while isinstance(content, Mapping):
        inner = next((content[key] for key in NESTED_UNDER if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds {type(content).__name__}, expected a state dict: tensors by name")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{path}: holds {type(content).__name__}, expected a state dict: tensors by name, at the top or under "
            f"{', '.join(NESTED_UNDER)}; its keys are {_some(list(map(str, content))) or 'none'}"
        )
    return unwrapped(tensors)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without a wrapper's prefix, if every name has it: a submodule may also be called `module`."""
    weights = {name: tensor for name, tensor in tensors.items() if name != AVERAGED}
    for prefix in WRAPPERS:
        if weights and all(name.startswith(prefix) for name in weights):
            return unwrapped({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    return dict(tensors)


def check_fit(path: Path, model: str, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless `weights` has exactly the names and shapes of `expected`, the model's state dict."""
    reshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "not part of it": [name for name in weights if name not in expected],
        "of another shape": reshaped,
    }
    parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if parts:
        raise WeightsError(
            f"{path}: does not fit {model}: of its {len(expected)} tensors {', '.join(parts)}; "
            f"give the weights of {model}"
        )


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError, naming the file and the first bad tensor, if one holds NaN or infinity.

    Takes one pass over the numbers and no memory: NaN and infinity both show in a tensor's extremes.
    """
    import torch

    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(
                f"{path}: {name} holds NaN or infinity ({count:,} of {tensor.numel():,} numbers), so every result "
                "would be NaN; use weights from before training diverged, or download the file again"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
