"""Strangers' files: whatever is in them, reading them ends with a result or with one line.

Each example changes a valid file at random: values, keys and structure of JSON, or bytes. Reading it must return or
raise an error of the package (the command line prints one line for these), within seconds, writing nothing beside the
file and running no pickle. `make stress` draws 1,000 examples of each kind.
"""

import ast
import copy
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import small_training
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import encode
from PIL import Image

from regionspot.cache import FeatureCache
from regionspot.cache.errors import AnnotationError, RegionSpotError, WeightsError
from regionspot.cache.tools.info import describe_cache
from regionspot.cache.tools.verify import verify
from regionspot.evaluation.inference.head_features import head_features
from regionspot.evaluation.metrics.ground_truth import read_ground_truth
from regionspot.fusion.checkpoint import HeadInfo, load_checkpoint, save_checkpoint
from regionspot.fusion.heads.spec import HeadSpec
from regionspot.fusion.tensor_file import read_tensor_file, write_tensor_file
from regionspot.pipeline.datasets.proposals import read_proposals
from regionspot.pipeline.datasets.registry import read_dataset
from regionspot.pipeline.images.decode import read_image

ROOT = Path(__file__).resolve().parents[1]
STRANGE = [
    None, True, False, -1, 0, 1, 2, 0.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf"), "", " ",
    "0", "7", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "a\0b", "é", "\ud800", [], {}, [[]], [None], {"": None},
    [1, 2, 3, 4], [0, 0, 0, 0], ["1", "2", "3", "4"], {"id": 1}, "2020-01-01", "float16", "http://x/train2017/1.jpg",
]  # fmt: skip
Read = Callable[[Path], object]


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*path, key), *places(item, (*path, key)))]


def change(document: object, rng: random.Random) -> object:
    """The document with one value, key or list changed."""
    document = copy.deepcopy(document)
    *above, key = rng.choice(places(document))
    holder = document
    for step in above:
        holder = holder[step]
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1:
        *path, last = rng.choice(places(document))
        other = document
        for step in (*path, last):
            other = other[step]
        holder[key] = copy.deepcopy(other)
    elif how == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif how == 3 and isinstance(holder, dict):
        holder[str(rng.choice(STRANGE))[:20]] = holder.pop(key)
    elif how == 4:
        for _ in range(rng.choice((1, 3, 50))):  # deeper ones are made of bytes
            holder[key] = [holder[key]]
    else:
        holder[key] = rng.choice(STRANGE)
    return document


def changed_json(valid: bytes, rng: random.Random) -> bytes:
    document = json.loads(valid)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if places(document):
            document = change(document, rng)
    return json.dumps(document).encode()


def changed_bytes(valid: bytes, rng: random.Random) -> bytes:
    content = bytearray(valid)
    for _ in range(rng.choice((1, 1, 3, 30))):
        at, how = rng.randrange(len(content) + 1), rng.randrange(4)
        if how == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del content[at : at + rng.choice((1, 2, 100))]
        elif how == 2:
            content[at:at] = rng.choice((b"\0", b"\n", b'"', b"\xff\xfe", b"9" * 400, b"[" * 3000, b","))
        else:
            del content[at:]
    return bytes(content)


def changed(valid: bytes, rng: random.Random) -> bytes:
    return changed_json(valid, rng) if valid[:1] in b"{[" and rng.random() < 0.7 else changed_bytes(valid, rng)


def changed_tensors(valid: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a changed header or changed bytes."""
    if rng.random() < 0.4:
        return changed_bytes(valid, rng)
    length = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + length])
    inner = rng.choice(list(header["__metadata__"]))
    if rng.random() < 0.6 and header["__metadata__"][inner][:1] in ("{", "["):
        header["__metadata__"][inner] = changed_json(header["__metadata__"][inner].encode(), rng).decode()
        text = json.dumps(header).encode()
    else:
        text = changed_json(json.dumps(header).encode(), rng)
    return len(text).to_bytes(8, "little") + text + valid[8 + length :]


_opened: list[str] | None = None  # files opened for writing while a file is read


def _watch(event: str, arguments: tuple) -> None:
    if _opened is None:
        return
    if event == "pickle.find_class":
        raise AssertionError(f"a pickle asks for {arguments}")
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


@contextmanager
def writes():
    """The files that are opened for writing in the block."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def read_cache(path: Path) -> None:
    """Open, describe, verify and read a whole cache."""
    verify(path)
    cache = FeatureCache.open(path)
    describe_cache(cache).text()
    for row in range(len(cache.manifest)):
        cache.read([row])


def coco(images: int = 3) -> dict:
    """A valid file in the form of COCO and LVIS."""
    return {
        "info": {"year": 2026},
        "images": [
            {
                "id": image, "height": 48, "width": 64, "file_name": f"{image}.jpg", "neg_category_ids": [2],
                "coco_url": f"http://images/val2017/{image}.jpg", "not_exhaustive_category_ids": [],
            }
            for image in range(1, images + 1)
        ],
        "annotations": [
            {
                "id": image, "image_id": image, "category_id": 1, "bbox": [1, 2, 30, 40], "iscrowd": 0, "area": 1200,
                "segmentation": [[1, 2, 30, 2, 30, 40]],
            }
            for image in range(1, images + 1)
        ],
        "categories": [
            {"id": at, "name": name, "synonyms": [name], "def": "a thing", "frequency": "r", "image_count": 1}
            for at, name in ((1, "red star"), (2, "cat"))
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, tuple[bytes, Callable, Read]]:
    """Of each kind: a valid file, what changes it, and what reads it."""
    folder = tmp_path_factory.mktemp("valid")
    document = json.dumps(coco()).encode()
    (folder / "lvis.json").write_bytes(document)
    manifest = read_dataset("lvis", folder, "val", folder / "lvis.json")
    results = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5}] * 3
    spec = HeadSpec(type="guided", token_dim=16, width=16, text_dim=8, options={"layers": 1, "heads": 2, "ffn": 16})
    features = {"model": "m", "dtype": "float16", "preprocess": "direct", "exif": "auto", "input_pixels": 64}
    caches = ({"dataset": "coco", "share": 1.0, "map": features, "token": features},)
    info = HeadInfo(
        "toy", "toy_sam", "toy_clip", {"toy_clip": "0" * 64}, caches, ("0" * 64,), ("a {}",), 7, {"AP": 0.5}
    )
    save_checkpoint(folder / "head.safetensors", spec, spec.build(), info)
    torch.save({"model": {"to_clip.weight": torch.ones(2, 2)}, "epoch": 1}, folder / "head.pth")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))

    def checkpoint(path: Path) -> None:
        head_features(path, load_checkpoint(path).info)

    def lvis(path: Path) -> None:
        read_dataset("lvis", path.parent, "val", path)
        read_ground_truth(path)

    def proposals(path: Path) -> None:
        read_proposals(path, manifest)

    return {
        "coco": (document, changed, lambda path: read_dataset("coco", path.parent, "train", path)),
        "lvis": (document, changed, lvis),
        "proposals": (json.dumps(results).encode(), changed, proposals),
        "checkpoint": ((folder / "head.safetensors").read_bytes(), changed_tensors, checkpoint),
        "released checkpoint": ((folder / "head.pth").read_bytes(), changed_bytes, load_checkpoint),
        **{
            format: (encode(image, format), changed_bytes, read_image)
            for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")
        },
    }


@pytest.fixture(autouse=True)
def _temporary_files_beside_the_strange_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def read_strange(path: Path, read: Read, outcomes: Counter) -> None:
    """Read a file that may be anything. Fails on any other error, and if something is written outside of its folder."""
    with writes() as written:
        try:
            read(path)
            outcomes["read"] += 1
        except (RegionSpotError, OSError) as error:
            outcomes["refused" if str(error).strip() else "without a message"] += 1
    assert not outcomes["without a message"]
    assert not [name for name in written if path.parent not in Path(name).parents]


def run_examples(examples: int, test: Callable[[random.Random], None]) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples,
        deadline=timedelta(seconds=30),
        derandomize=True,
        database=None,
        suppress_health_check=slow,
    )
    chosen(given(st.randoms(use_true_random=True))(test))()


FILES = ("coco", "lvis", "proposals", "checkpoint", "released checkpoint", "JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")


def fuzz_file(kind: str, kinds, folder: Path, examples: int) -> Counter:
    valid, change_it, read = kinds[kind]
    suffix = {"checkpoint": ".safetensors", "released checkpoint": ".pth"}.get(kind, ".json")
    path, outcomes = folder / f"strange{suffix if kind in FILES[:5] else '.' + kind.lower()}", Counter()

    def example(rng: random.Random) -> None:
        path.write_bytes(change_it(valid, rng))
        read_strange(path, read, outcomes)

    path.write_bytes(valid)
    read_strange(path, read, outcomes)  # as it is, it can be read, or refused if it is not a whole model
    run_examples(examples, example)
    return outcomes


def fuzz_cache(folder: Path, examples: int) -> Counter:
    """Change a metadata file of a cache."""
    small_training.make_cache(folder / "valid.zarr", images=6)
    files = [
        path.relative_to(folder / "valid.zarr")
        for path in sorted((folder / "valid.zarr").rglob("*"))
        if path.is_file() and path.read_bytes()[:1] == b"{"
    ]
    outcomes = Counter()

    def example(rng: random.Random) -> None:
        shutil.rmtree(folder / "c.zarr", ignore_errors=True)
        shutil.copytree(folder / "valid.zarr", folder / "c.zarr")
        path = folder / "c.zarr" / rng.choice(files)
        path.write_bytes(changed(path.read_bytes(), rng))
        read_strange(folder / "c.zarr", read_cache, outcomes)

    run_examples(examples, example)
    return outcomes


@pytest.mark.parametrize("kind", FILES)
def test_a_changed_file_is_read_or_refused(kind, kinds, tmp_path):
    assert sum(fuzz_file(kind, kinds, tmp_path, 25).values()) >= 25


def test_a_cache_with_changed_metadata_is_read_or_refused(tmp_path):
    assert sum(fuzz_cache(tmp_path, 10).values()) >= 10


@pytest.mark.parametrize("kind", ["coco", "lvis", "proposals"])
def test_json_that_is_nested_too_deeply_is_refused(kind, kinds, tmp_path):
    for text in ("[" * 5000, '{"images": ' + "[" * 5000, "[" * 5000 + "]" * 5000):
        (tmp_path / "deep.json").write_text(text)
        with pytest.raises(AnnotationError, match=r"deep\.json: "):
            kinds[kind][2](tmp_path / "deep.json")


@pytest.mark.parametrize(
    "damage",
    [
        {"head": {"width": 1.5}},
        {"head": {"layers": 2**40}},
        {"head": {"text_dim": "8"}},
        {"info": {"caches": [{"map": "coco"}]}},
        {"info": {"weights_sha256": 7}},
        {"info": {"templates": [1]}},
    ],
    ids=str,
)
def test_a_checkpoint_whose_header_holds_other_values_is_refused(damage, kinds, tmp_path):
    tensors, document = read_tensor_file_of(kinds["checkpoint"][0], tmp_path)
    for section, values in damage.items():
        document[section] |= values
    write_tensor_file(tmp_path / "damaged.safetensors", tensors, document)
    with pytest.raises(WeightsError, match=r"damaged\.safetensors: its header is incomplete or damaged"):
        load_checkpoint(tmp_path / "damaged.safetensors")


def read_tensor_file_of(content: bytes, folder: Path) -> tuple[dict, dict]:
    (folder / "valid.safetensors").write_bytes(content)
    return read_tensor_file(folder / "valid.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [*FILES, "cache"])
def test_a_thousand_changed_files_of_each_kind(kind, kinds, tmp_path, stress_size, stress_result):
    examples = stress_size(1000)
    outcomes = fuzz_cache(tmp_path, examples) if kind == "cache" else fuzz_file(kind, kinds, tmp_path, examples)
    stress_result(kind=kind, examples=sum(outcomes.values()), refused=outcomes["refused"], read=outcomes["read"])


def test_no_code_of_the_package_can_load_a_pickle():
    """torch.load only with its restricted unpickler, numpy.load without pickles, and no other loader of pickles."""
    calls = 0
    for package in ("cache", "pipeline", "fusion", "evaluation", "commands"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                if name == "torch.load":
                    assert options.get("weights_only") == "True", path
                    calls += 1
                elif name in ("np.load", "numpy.load"):
                    assert "allow_pickle" not in options, path
                    calls += 1
                elif path.name != "dask_arrays.py":  # it opens what dask has sent, which dask itself has unpickled
                    assert not name.endswith(("pickle.load", "pickle.loads", "Unpickler", "read_pickle")), path
    assert calls >= 3
