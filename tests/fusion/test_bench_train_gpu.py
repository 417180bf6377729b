"""The benchmark for a GPU runs from beginning to end, so that it can be trusted on the day that a GPU is at hand."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_gpu_benchmark_runs_on_a_cpu_with_tiny_features(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    bench = importlib.import_module("benchmarks.bench_train_gpu")
    bench.main(["--device", "cpu", "--tiny", "--results", str(tmp_path), "--scratch", str(tmp_path / "caches")])
    rows = json.loads((tmp_path / "train_gpu.json").read_text())["rows"]
    fed = {row["case"] for row in rows if row["table"].startswith("Batches of 4") and row["images/s"] > 0}
    assert fed == {
        "batches on the device",
        *(f"{dtype}, {source}" for dtype in ("float16", "int8") for source in ("page cache", "disk")),
    }
    assert {row["batch"] for row in rows if row["table"].startswith("Variants")} == {4, 8}
    assert not (tmp_path / "caches").exists()
