"""Shared fixtures. `../shared` holds golden values and real photos; where it is not, the tests that use it skip."""

import http.client
import math
import os
import subprocess
import sys
import uuid
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


# It ends with the tests, also where these are killed: its standard input ends then.
_S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3_server():
    """Port of an S3-protocol server of our own: a real one, in a process of its own, with nothing in it yet."""
    server = subprocess.Popen(
        [sys.executable, "-c", _S3_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield int(server.stdout.readline())
    server.kill()
    server.communicate()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path) -> str:
    """s3:// address of an empty bucket, with the environment that leads there and to nobody's own keys."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "REGIONSPOT_"))]:
        monkeypatch.delenv(name)
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server}"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_CONFIG_FILE", str(tmp_path / "no-config")),
        ("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials")),
        ("REGIONSPOT_PATIENCE", "5"),
    ):
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    _make_bucket(s3_server, bucket)
    return f"s3://{bucket}"


def _make_bucket(port: int, bucket: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    signature = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request("PUT", f"/{bucket}", headers={"Authorization": signature})
    assert connection.getresponse().status == 200
    connection.close()
