"""The repository keeps its shape: one direction of imports, everything packaged, data files in the wheel."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "cache": set(),
    "pipeline": {"cache"},
    "fusion": {"cache"},
    "evaluation": {"pipeline", "cache", "fusion"},
}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("regionspot.")}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_flow_in_one_direction(package):
    for path in (ROOT / package).glob("*.py"):
        others = imported_packages(path) - {package}
        assert others <= MAY_IMPORT[package], f"{package}/{path.name} imports {others}"


def test_every_package_folder_is_listed_for_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {name.removeprefix("regionspot.") for name in listed} - {"regionspot"} == folders
    assert not [path for folder in folders for path in (ROOT / folder).glob("*/__init__.py")], "folders are flat"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: setuptools leaves its work in the folder it builds.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py", "cli.py"):
        shutil.copy(ROOT / name, source / name)
    for name in MAY_IMPORT:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(source.glob("dist/*.whl"))


def test_the_wheel_holds_every_module_and_the_toy_weights(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"regionspot/{path.relative_to(ROOT)}" for folder in MAY_IMPORT for path in (ROOT / folder).glob("*.py")}
    weights = {"regionspot/pipeline/toy_sam.safetensors", "regionspot/pipeline/toy_clip.safetensors"}
    assert modules | weights | {"regionspot/cli.py", "regionspot/__init__.py"} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "regionspot/tests"))]


def test_only_one_place_asks_how_many_processors_there_are():
    """`os.cpu_count` does not know which of them this process may use, and ThreadPoolExecutor() asks it."""
    asking = [
        path.name
        for folder in (*MAY_IMPORT, "benchmarks", ".")
        for path in (ROOT / folder).glob("*.py")
        if "cpu_count" in (text := path.read_text()) or "ThreadPoolExecutor()" in text
    ]
    assert asking == ["machine.py"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_may_use_one_processor_uses_one():
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from regionspot.cache.machine import processors
from regionspot.pipeline.decoding import default_threads
print(processors(), default_threads())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["1", "1"]


def test_the_cache_imports_without_torch_or_the_backbones():
    heavy = {"torch", "torchvision", "segment_anything", "open_clip"}
    code = f"import sys, regionspot.cache; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
