"""Shared fixtures. `../shared` holds golden values and real photos; where it is not, the tests that use it skip."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Tests run two at a time on two cores; more threads each would only get in each other's way.
torch.set_num_threads(1)


def _under_shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/{name} is not there")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of what the authors' code computes on weights made from a formula."""
    return _under_shared("golden")


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """Folder of 200 real photos with COCO and LVIS annotations and a detector's boxes."""
    return _under_shared("data/coco_mini")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty REGIONSPOT_HOME, so that no test sees weights or vocabularies of the machine it runs on."""
    monkeypatch.setenv("REGIONSPOT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _from_formula(
    state_dict: dict[str, torch.Tensor], prefix: str, gain: float, untouched: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Every float tensor drawn from its own name, as ../shared/golden/README.md defines; integer ones stay."""
    filled = {}
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point() or name in untouched:
            filled[name] = tensor.clone()
            continue
        shape = tuple(tensor.shape)
        rng = np.random.RandomState(zlib.crc32((prefix + name).encode()))
        value = np.asarray(rng.standard_normal(shape)).astype(np.float32)
        if len(shape) >= 2:
            value = value * np.float32(gain / math.sqrt(math.prod(shape[1:])))
        elif ("norm" in name or "ln_" in name) and name.endswith("weight"):
            value = 1 + np.float32(0.1) * value
        else:
            value = np.float32(0.02) * value
        filled[name] = torch.from_numpy(np.asarray(value, dtype=np.float32)).reshape(shape)
    return filled


@pytest.fixture(scope="session")
def from_formula():
    """`from_formula(state_dict, prefix, gain)`: the same names and shapes with the golden weights' values."""
    return _from_formula
