"""Shared fixtures. `../shared` holds golden values and real images; where it is not, the tests that use it skip.

It imports torch inside of fixtures only: pytest loads this file before it starts the workers, and they wait for it.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from makers import cache_content, make_features, make_manifest

from regionspot import cli
from regionspot.cache import Category, FeatureCache, FeatureSet, ImageFeatures, Ragged
from regionspot.cache.format.encodings import statistics_of
from regionspot.cache.machine import processors
from regionspot.cache.tools.resume import open_or_create
from regionspot.cache.writing.claims import Claims
from regionspot.pipeline.extraction.part_queue import PartQueue
from regionspot.pipeline.toy.world import make_toy_world

if TYPE_CHECKING:
    import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

# In the background of a script (`make test &`) SIGINT is ignored, and the processes that tests interrupt inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: one more than cores, because tests wait for disks, servers and killed processes."""
    return processors() + 1


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run in parallel processes, so one thread each is fastest."""
    import torch

    torch.set_num_threads(1)


def _under_shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/{name} is not there")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with outputs of the authors' code on weights computed from a formula."""
    return _under_shared("golden")


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """Folder of 200 real images with COCO and LVIS annotations and a detector's boxes."""
    return _under_shared("data/coco_mini")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A read-only toy world of 32 training and 8 validation images."""
    return make_toy_world(tmp_path_factory.mktemp("world"), 40, seed=1)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty REGIONSPOT_HOME, so that tests see no weights or vocabularies of this machine."""
    monkeypatch.setenv("REGIONSPOT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def module_home(tmp_path_factory) -> Iterator[None]:
    """One empty REGIONSPOT_HOME for all tests of a module, so that they share vocabularies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def _from_formula(
    state_dict: dict[str, torch.Tensor], prefix: str, gain: float, untouched: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Fill every float tensor from a random generator seeded by its name (../shared/golden/README.md)."""
    import torch

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
    """`from_formula(state_dict, prefix, gain)` returns the golden weights for these names and shapes."""
    return _from_formula


# It ends when its standard input is closed, so also when the tests are killed.
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
    """Port of an empty S3 server in a process of its own."""
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
    """s3:// address of an empty bucket; the environment has its endpoint and keys, and no real ones."""
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


class SmallCache:
    """A cache with a feature set of every encoding, small enough to be written and damaged thousands of times.

    Ten images in three parts, the last one not full; one part has more regions than an inner chunk of tokens, two
    images have none, one cannot be read.
    """

    part_size = 4
    failing = 6

    def __init__(self) -> None:
        rng, counts = np.random.default_rng(0), [2, 0, 1, 5, 60, 7, 3, 0, 3, 1]
        regions, images = sum(counts), len(counts)
        self.manifest = make_manifest(
            counts,
            dataset="lvis",
            paths=[f"val2017/{row:04d} ü.jpg" for row in range(images)],
            heights=rng.integers(1, 2000, images, dtype=np.int32),
            widths=rng.integers(1, 2000, images, dtype=np.int32),
            category_index=rng.integers(0, 2, regions, dtype=np.int32),
            annotation_ids=rng.integers(0, 2**40, regions),
            categories=(Category(3, "person", "person.n.01", "f", ("man",)), Category(7, "tab\there ü")),
            scores=rng.random(regions, dtype=np.float32),
            negatives=Ragged(np.arange(images + 1), np.arange(images, dtype=np.int32) % 2),
            not_exhaustive=Ragged(np.arange(images + 1), np.ones(images, np.int32)),
            source={"files": {"lvis_v1_train.json": "c0ffee"}},
            report={"boxes under 1 pixel": 3},
        )
        maps, tokens = rng.standard_normal((50, 8)) * 1e-5, rng.standard_normal((50, 6))
        self.sets = (
            FeatureSet("clip", "map", (5, 8), provenance={"model": "ViT-L-14", "rate": 1e-5}),
            FeatureSet("clip-int8", "map", (5, 8), "int8", statistics=statistics_of(maps)),
            FeatureSet("clip-zstd", "map", (5, 8), "bfloat16", compression="zstd"),
            FeatureSet("sam", "token", (6,), "float32"),
            FeatureSet("sam-int8", "token", (6,), "int8", compression="zstd", statistics=statistics_of(tokens)),
        )

    @property
    def names(self) -> list[str]:
        return [feature_set.name for feature_set in self.sets]

    def features(self, row: int) -> ImageFeatures:
        """The same features of an image at every call."""
        if row == self.failing:
            return ImageFeatures(row, {}, "truncated JPEG")
        return make_features(self.manifest, self.sets, row)

    def create(self, path: Path) -> FeatureCache:
        return FeatureCache.create(path, self.manifest, self.sets, self.part_size)

    def extract(self, path: Path, at_image: Callable[[], object] = lambda: None) -> None:
        """Extract as `regionspot extract` does, with claims on parts but without backbones."""

        def features(row: int) -> ImageFeatures:
            at_image()
            return self.features(row)

        cache = open_or_create(path, self.manifest, self.sets, self.part_size)
        with Claims(cache.storage, heartbeat_seconds=0.02) as claims:
            parts = PartQueue(cache, self.names, claims)
            while parts.wait():
                for part, requests in groupby(parts.requests(), lambda request: request[0] // self.part_size):
                    parts.write(part, (features(row) for row, _ in requests))

    content = staticmethod(cache_content)


@pytest.fixture(scope="session")
def small() -> SmallCache:
    return SmallCache()


@pytest.fixture(scope="session")
def small_folder(small, tmp_path_factory) -> Path:
    """Read-only caches `empty` and `full`, to be copied, which is ten times faster than making them."""
    folder = tmp_path_factory.mktemp("small")
    small.create(folder / "empty")
    shutil.copytree(folder / "empty", folder / "full")
    small.extract(folder / "full")
    return folder


@pytest.fixture
def stress_result(request) -> Callable[..., None]:
    """`stress_result(kills=100, ...)` writes counts for `make stress`; elsewhere it does nothing."""

    def keep(**counts: object) -> None:
        if "STRESS_COUNTS" in os.environ:
            name, file = request.node.originalname, request.node.path.stem.removeprefix("test_")
            counted = json.dumps({"file": file, "test": name, **counts}, default=float)
            Path(os.environ["STRESS_COUNTS"], f"{request.node.name}.json").write_text(counted)

    return keep


@pytest.fixture
def stress_size() -> Callable[[int], int]:
    """`stress_size(1000)` is 1000 in a full run of `make stress`, 20 in a quick one."""
    return lambda full: full if os.environ.get("STRESS_QUICK") != "1" else math.ceil(full / 50)


@pytest.fixture
def regionspot(monkeypatch, capsys):
    """`regionspot("extract", "toy", ...)` runs the command and returns its exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["regionspot", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(regionspot):
    """`refused("needs this", "extract", ...)` requires exit code 2 and one line on stderr with the given text."""

    def run(text: str, *arguments) -> None:
        code, _, err = regionspot(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("regionspot: ")]
        assert code == 2, err
        assert len(lines) == 1, err
        assert text in lines[0], lines[0]
        assert "Traceback" not in err

    return run
