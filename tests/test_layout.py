"""The repository keeps its shape: one direction of imports, everything packaged, data files in the wheel."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from makers import fork, was_killed

from regionspot.cache.machine import processors
from regionspot.pipeline.extraction.decode_ahead import default_threads

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cache", "pipeline", "fusion", "evaluation", "commands")

# What each room (a sub-package, or a module at the root of a package) imports besides BASE. Every room stands below
# those that it imports, so the list shows that there is no cycle.
MAY_IMPORT = {
    "cache.storage": "",
    "pipeline.images": "",
    "pipeline.toy": "cache.storage",
    "cache.format": "cache.storage",
    "cache.reading": "cache.format cache.storage",
    "cache.writing": "cache.format cache.storage",
    "pipeline.backbones": "cache.format cache.storage pipeline.images pipeline.toy",
    "pipeline.datasets": "cache.format cache.storage pipeline.images",
    "cache.store": "cache.format cache.reading cache.storage cache.writing",
    "evaluation.metrics": "cache.format cache.storage pipeline.datasets",
    "cache.tools": "cache.format cache.reading cache.storage cache.store cache.writing",
    "fusion": "cache.storage",
    "fusion.training": "cache.format cache.reading cache.storage cache.store fusion",
    "pipeline.reporting": "cache.format cache.storage cache.store cache.tools pipeline.backbones",
    "pipeline.extraction": (
        "cache.format cache.storage cache.store cache.tools cache.writing pipeline.backbones "
        "pipeline.datasets pipeline.images pipeline.reporting"
    ),
    "pipeline.doctor": (
        "cache.format cache.storage cache.store cache.tools pipeline.backbones pipeline.datasets "
        "pipeline.extraction pipeline.images pipeline.reporting"
    ),
    "pipeline.distributed": (
        "cache.format cache.storage cache.store cache.writing pipeline.backbones pipeline.extraction pipeline.reporting"
    ),
    "evaluation.inference": (
        "cache.format cache.reading cache.storage cache.store cache.writing evaluation.metrics fusion fusion.training "
        "pipeline.backbones pipeline.datasets pipeline.distributed pipeline.extraction pipeline.images "
        "pipeline.reporting"
    ),
    "evaluation.report": (
        "cache.format cache.reading cache.storage cache.store evaluation.inference evaluation.metrics "
        "pipeline.datasets pipeline.images"
    ),
    "evaluation.search": (
        "cache.format cache.reading cache.storage cache.store evaluation.inference evaluation.report fusion "
        "fusion.training pipeline.backbones pipeline.images"
    ),
    "evaluation.serve": (
        "cache.format cache.storage cache.store evaluation.inference evaluation.report evaluation.search fusion "
        "pipeline.backbones pipeline.datasets pipeline.images"
    ),
    "evaluation.demo": "cache.storage evaluation.report",
    "evaluation.options": (
        "evaluation.inference evaluation.metrics evaluation.report pipeline.backbones pipeline.datasets "
        "pipeline.extraction pipeline.images"
    ),
    "evaluation.loading": (
        "cache.format cache.store evaluation.inference evaluation.options fusion pipeline.backbones pipeline.images"
    ),
    "evaluation.evaluate": (
        "cache.format evaluation.inference evaluation.loading evaluation.metrics evaluation.options evaluation.report "
        "pipeline.backbones pipeline.datasets pipeline.distributed"
    ),
    "evaluation.validation": (
        "cache.store evaluation.inference evaluation.metrics fusion fusion.training pipeline.reporting"
    ),
    "commands": (
        "cache.format cache.store cache.tools cache.writing evaluation.demo evaluation.evaluate "
        "evaluation.inference evaluation.report evaluation.search evaluation.serve evaluation.validation fusion "
        "fusion.training pipeline.backbones pipeline.datasets pipeline.distributed pipeline.doctor pipeline.extraction "
        "pipeline.images pipeline.reporting pipeline.toy"
    ),
    "cli": "commands",
}
BASE = {"cache.errors", "cache.machine", "cache.outputs", "cache.process", "cache.progress", "cache.state_dicts"}


def room_of(module: str) -> str:
    """Two parts of a module's name: `cache.storage`, `cache.store`. `commands` is one room; `fusion` has its training
    as a second one."""
    package, name, *_ = [*module.split("."), ""]
    one_room = package == "commands" or (package == "fusion" and name != "training")
    return package if one_room else f"{package}.{name}".rstrip(".")


def modules() -> dict[str, Path]:
    """Every module but the re-exporting `__init__` files, by its name without `regionspot.`."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (*files, ROOT / "cli.py")}


def imports(path: Path, known: Collection[str]) -> set[str]:
    """The modules of `known` that a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("regionspot.") for name in names} & set(known)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def test_rooms_import_only_what_they_may(graph):
    rooms: dict[str, set[str]] = {}
    for module, imported in graph.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update({room_of(name) for name in imported} - {room} - BASE)
    assert {room: " ".join(sorted(imported)) for room, imported in rooms.items()} == MAY_IMPORT | dict.fromkeys(
        BASE, ""
    )


def test_no_room_and_no_module_imports_itself_through_others(graph):
    names = list(MAY_IMPORT)
    assert all(names.index(other) < names.index(room) for room in names for other in MAY_IMPORT[room].split())
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.fixture(scope="module")
def checkout() -> list[Path]:
    """Files that git has, or would take in, relative to the root."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    paths = {Path(name) for name in listed.stdout.split("\0") if name}
    return sorted(path for path in paths if (ROOT / path).is_file())


@pytest.fixture(scope="module")
def shipped(checkout) -> set[str]:
    """What a wheel must hold of the checkout: the modules of the root, and all that is in the packages."""
    packages = {path.parts[0] for path in checkout if len(path.parts) == 2 and path.name == "__init__.py"}
    return {
        path.as_posix()
        for path in checkout
        if (path.suffix == ".py" if len(path.parts) == 1 else path.parts[0] in packages)
    }


def test_every_folder_of_a_package_is_listed_for_the_wheel(shipped):
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(name).parent for name in shipped if name.endswith("__init__.py")}
    assert sorted(listed) == sorted(".".join(("regionspot", *folder.parts)) for folder in folders)


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source")  # a copy, for setuptools leaves its work in the folder it builds
    for path in checkout:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    words = ["build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    built = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return zipfile.ZipFile(next(source.glob("dist/*.whl")))


def test_the_wheel_holds_all_of_the_packages_and_nothing_else(wheel, shipped):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {f"regionspot/{name}" for name in shipped}


def test_the_installed_wheel_starts_every_command(wheel, tmp_path):
    wheel.extractall(tmp_path)  # which is all that installing a wheel of pure Python does
    (entry_points,) = tmp_path.glob("*.dist-info/entry_points.txt")
    assert "regionspot = regionspot.cli:main" in entry_points.read_text()
    # Not this checkout, which is installed too: what is in PYTHONPATH comes first.
    start = f"import regionspot.cli; assert regionspot.__file__.startswith({str(tmp_path)!r}); regionspot.cli.main()"
    for words, expected in (((), "eval-lvis"), (("extract",), "--part-size"), (("cache", "verify"), "--threads")):
        result = subprocess.run(
            [sys.executable, "-c", start, *words, "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        )
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout


def test_only_one_place_asks_how_many_processors_there_are():
    """`os.cpu_count` does not know which of them this process may use, and ThreadPoolExecutor() asks it."""
    asking = [
        path.name
        for folder in (*PACKAGES, "benchmarks", ".")
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
        if "cpu_count" in (text := path.read_text()) or "ThreadPoolExecutor()" in text
    ]
    assert asking == ["machine.py"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_may_use_one_processor_uses_one():
    def restricted():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        assert (processors(), default_threads()) == (1, 1)

    assert not was_killed(fork(restricted))
