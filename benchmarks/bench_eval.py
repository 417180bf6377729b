"""`make bench-eval`: LVIS AP by hotcoco and by the official package, its parity, and its confidence intervals."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_eval_data import LVIS_VAL_IMAGES, world
from benchmarks.bench_eval_intervals import coverage
from benchmarks.goals import Report, alone, options, say, versions
from regionspot.evaluation.metrics import lvis_package
from regionspot.evaluation.metrics.average_precision import average_precision
from regionspot.evaluation.metrics.results_file import read_results_json, write_results_json

ROOT = Path(__file__).resolve().parents[1]
PER_IMAGE = 300

PROTOCOL = f"""
Synthetic ground truth like that of LVIS val (bench_eval_data.py): 1203 classes; 12 boxes and 12 listed classes in an
image. {PER_IMAGE} detections an image: a third near an annotated box, a third elsewhere of a listed class, a third of
any class; 71 % are of listed classes and are matched. Scores have three digits, so many are equal.

* Every case runs alone in a new process. CPU seconds are those of all threads, without making the data. Memory is the
  peak of the process (maximum resident set), data included.
* `lvis` is the official package as its users call it: a list of dicts in memory, all classes at once. `lvis in blocks`
  is `--engine lvis`: 32 classes at a time. hotcoco gets arrays. The official package does not run at the size of LVIS
  val, where it would need about 22 GB.
* Parity: the slow tests of tests/evaluation/test_engine_parity.py. They compare every number of the precision and
  recall arrays with ==, of `lvis` for LVIS AP and of pycocotools for COCO AP. All arrays computed above are compared
  too.
* Intervals: datasets of 60 images and 6 classes from one population. How many of their 95 % intervals contain the value
  of all of them together: a figure itself, and its change when a fifth of the detections are removed.
"""


def main() -> int:
    arguments = options(__doc__ or "")
    quick = arguments.quick
    report = Report("eval", "LVIS AP: hotcoco and the official package", PROTOCOL, _versions())
    _boxes(report, 100 if quick else 5000)
    _masks(report, 50 if quick else 400)
    _lvis_val(report, LVIS_VAL_IMAGES // 10 if quick else LVIS_VAL_IMAGES)
    _parity(report, quick)
    say("coverage of the intervals")
    for row in alone(coverage, 10 if quick else 60):
        report.add_row("Intervals that contain the figure of the population", **row)
    report.finish(arguments.results)
    return 0


def _versions() -> dict[str, str]:
    return versions(("hotcoco", "lvis", "pycocotools", "numpy"))


def _boxes(report: Report, images: int) -> None:
    table = f"Boxes, {images:,} images"
    ours = _run(report, table, "hotcoco", images, "bbox")
    official = _run(report, table, "lvis", images, "bbox")
    of_images = f"at {images:,} images x {PER_IMAGE} boxes"
    report.add_goal(f"CPU time of lvis / of hotcoco, {of_images}", official["cpu"] / ours["cpu"], at_least=60)
    report.add_goal(f"memory of hotcoco / of lvis, {of_images}", ours["memory"] / official["memory"], at_most=1 / 6)
    _add_parity_goal(report, ours, official, of_images)


def _masks(report: Report, images: int) -> None:
    table = f"Masks, {images:,} images"
    ours = _run(report, table, "hotcoco", images, "segm")
    official = _run(report, table, "lvis", images, "segm")
    of_images = f"at {images:,} images x {PER_IMAGE} masks"
    report.add_goal(f"CPU time of lvis / of hotcoco, {of_images}", official["cpu"] / ours["cpu"], at_least=8)
    _add_parity_goal(report, ours, official, of_images)
    _run(report, table, "lvis in blocks", images, "segm")


def _add_parity_goal(report: Report, ours: dict[str, Any], official: dict[str, Any], of_images: str) -> None:
    different = int(ours["arrays"] != official["arrays"])
    report.add_goal(f"arrays of precision and recall that differ, {of_images}", different, at_most=0)


def _lvis_val(report: Report, images: int) -> None:
    ours = _run(report, "Boxes, the size of LVIS val", "hotcoco", images, "bbox")
    report.add_goal("CPU seconds of hotcoco at the size of LVIS val", ours["cpu"], at_most=15)
    report.add_goal("memory of hotcoco at the size of LVIS val (GB)", ours["memory"], at_most=3)
    say("detections.json")
    report.add_row("detections.json of the size of LVIS val", **alone(_results_file, images))


def _run(report: Report, table: str, case: str, images: int, iou_type: str) -> dict[str, Any]:
    say(f"{table}: {case}")
    result = alone(_evaluate, case, images, iou_type)
    report.add_row(table, engine=case, cpu_seconds=result["cpu"], memory_gb=result["memory"], AP=result["AP"])
    return result


def _evaluate(case: str, images: int, iou_type: Any) -> dict[str, Any]:
    """CPU seconds, peak memory in GB, AP, and a hash of the arrays."""
    ground_truth, detections = world(images, PER_IMAGE, masks=iou_type == "segm")
    if case == "lvis":
        dicts = list(detections.as_dicts(with_box=iou_type == "bbox", with_mask=iou_type == "segm"))
        started = time.process_time()
        with lvis_package._lvis() as lvis:
            dataset = {name: getattr(ground_truth, name) for name in ("images", "categories", "annotations")}
            official = type("InMemory", (lvis_package._InMemory, lvis.LVIS), {})(dataset)
            evaluator = lvis.LVISEval(official, dicts, iou_type)
            evaluator.run()
        arrays, ap = (evaluator.eval["precision"], evaluator.eval["recall"]), evaluator.results["AP"]
    else:
        started = time.process_time()
        engine = "hotcoco" if case == "hotcoco" else "lvis"
        result = average_precision(ground_truth, detections, iou_type, engine=engine)
        arrays, ap = (result.precision, result.recall), result["AP"]
    cpu = time.process_time() - started
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
    return {"cpu": cpu, "memory": _peak_gb(), "AP": ap, "arrays": digest}


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _results_file(images: int) -> dict[str, Any]:
    """CPU seconds to write and read the official results file, its size, and the peak memory while it is read."""
    _, detections = world(images, PER_IMAGE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "detections.json")
        before, started = _peak_gb(), time.process_time()
        write_results_json(path, detections)
        written, peak = time.process_time(), _peak_gb()
        read = read_results_json(path)
        seconds = time.process_time() - written
        if not all(map(np.array_equal, (read.boxes_xywh, read.scores), (detections.boxes_xywh, detections.scores))):
            raise RuntimeError("the detections read are not those written")
        return {
            "detections": f"{len(detections):,}",
            "file_gb": path.stat().st_size / 1e9,
            "write_cpu_seconds": written - started,
            "memory_added_gb": peak - before,
            "read_cpu_seconds": seconds,
        }


def _parity(report: Report, quick: bool) -> None:
    say("parity tests")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "STRESS_COUNTS": folder, "STRESS_QUICK": str(int(quick))}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "tests/evaluation/test_engine_parity.py"]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        results = [json.loads(file.read_bytes()) for file in Path(folder).glob("*.json")]
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    counts: Counter[str] = Counter()
    for result in results:
        counts["worlds"] += len(result["seeds"])
        counts["numbers compared with =="] += result["compared"]
        counts += Counter({name: count for name, count in result.items() if " " in name})
    report.add_goal("parity tests that failed", done.returncode, at_most=0)
    report.add_goal("worlds with equal arrays, boxes and masks, LVIS and COCO", counts["worlds"], at_least=100)
    for name, count in counts.items():
        report.add_row("Parity", what=name, count=f"{int(count):,}")


if __name__ == "__main__":
    sys.exit(main())
