"""Shared fixtures. `../shared` holds golden values and real photos; where it is not, the tests that use it skip."""

from pathlib import Path

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
