"""`make stress`: the tests that damage, kill and starve caches, in full, and what they counted.

The tests are those of tests/test_flips.py, test_kills.py, test_faults.py and test_workers.py that are marked `slow`; a
sample of each is in the usual run. What they count goes into build/stress, a file each, and from there into one table.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.goals import RESULTS, Report, say, versions

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ROOT / "build" / "stress"

PROTOCOL = """
A cache of ten pictures with a feature set of every encoding, in three parts: float16, bfloat16 with zstd, float32, int8
with scales, maps and tokens, one picture that failed. Everything is drawn from seeds.

* Damage: one bit flipped anywhere in a file drawn at random, or (one time in five) the file cut short. `cache verify`
  has to find it; then all of the cache is opened and read, and what is handed out is compared with the truth.
* Kills: three writers share one cache that is not even made yet. Each is killed by SIGKILL at a drawn call to the
  system, or at a drawn moment, or lives. After each round all that is committed is verified; in the end the bytes equal
  those of an undisturbed run.
* Faults: a fault begins at a drawn picture and call. The run goes through or ends with one line; then what is committed
  is verified, and the same run without the fault ends with the bytes of an undisturbed one.
* Workers: four of a scheduler on this machine are killed, or frozen and woken, at drawn moments; two lose their
  scheduler and get a new one; one is in another network namespace, whose cable is pulled and plugged in again. Each
  time the cache ends complete, verified, and equal to the byte to that of one process.
"""


def main() -> int:
    shutil.rmtree(COUNTED, ignore_errors=True)
    say("the slow tests of flips, kills, faults and workers, two at a time")
    tests = [f"tests/test_{name}.py" for name in ("flips", "kills", "faults", "workers")]
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-n", "2", "--dist", "worksteal", *tests, *sys.argv[1:]]
    code = subprocess.run(command, cwd=ROOT).returncode
    counted = [json.loads(file.read_bytes()) for file in sorted(COUNTED.glob("*.json"))]
    if code or not counted:
        say("a test failed, so no result is written")
        return code or 1
    _report(counted).finish(RESULTS)
    return 0


def _report(counted: list[dict[str, Any]]) -> Report:
    packages = ("zarr", "numpy", "google-crc32c", "numcodecs")
    report = Report("stress", "What was done to caches, and what was lost", PROTOCOL, versions(packages))
    flips, one_file, kills, faults, workers = (
        _of(counted, name) for name in ("damage", "hdf5", "writers", "fault", "workers")
    )
    report.add_goal("bits flipped and files cut short", _sum(flips, "damages"), at_least=10_000)
    report.add_goal(
        "of these found by `cache verify`, share", _sum(flips, "found") / _sum(flips, "damages"), at_least=1
    )
    report.add_goal("reads that gave wrong data", _sum(flips + one_file, "wrong"), at_most=0)
    report.add_goal("writers killed", _sum(kills, "kills"), at_least=1000)
    report.add_goal("kinds of fault", len(faults), at_least=10)
    report.add_goal("committed parts lost or changed", _sum(kills + faults + workers, "lost"), at_most=0)
    for file, counts in _damages_by_file(flips).items():
        report.add_row("Damage", file=file, flips=counts["flip"], cuts=counts["cut"])
    for outcome in ("refused to open", "refused some reads", "read right"):
        report.add_row("What readers of damaged caches met", outcome=outcome, times=_sum(flips, outcome))
    for outcome in [key for test in one_file for key in test if key.startswith(("flip in", "cut in", "re"))]:
        report.add_row("Damage to a cache in one HDF5 file", outcome=outcome, times=_sum(one_file, outcome))
    for kind in ("kills", "rounds", "caches", "committed parts verified"):
        report.add_row("Kills", what=kind, times=_sum(kills, kind))
    for what in ("killed", "frozen", "schedulers", "cut", "caches"):
        report.add_row("Workers", what=what, times=_sum(workers, what))
    for fault in sorted(faults, key=lambda each: str(each["fault"])):
        refused, through = fault.get("refused", 0), fault.get("went through", 0)
        report.add_row("Faults", fault=fault["fault"], runs=fault["runs"], refused=refused, through=through)
    for name, tests in (
        ("damage", flips),
        ("damage to one file", one_file),
        ("kills", kills),
        ("faults", faults),
        ("workers", workers),
    ):
        seeds = sorted({seed for test in tests for seed in test["seeds"]})
        report.add_row("Seeds", what=name, seeds=", ".join(map(str, seeds)), seconds=_sum(tests, "seconds"))
    return report


def _of(counted: list[dict[str, Any]], word: str) -> list[dict[str, Any]]:
    return [each for each in counted if word in each["test"]]


def _sum(tests: list[dict[str, Any]], key: str) -> Any:
    return sum(test.get(key, 0) for test in tests)


def _damages_by_file(flips: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """How often which kind of file was damaged how: the tests count "flip of metadata" and the like."""
    found: dict[str, Counter[str]] = {}
    for test in flips:
        for key, times in test.items():
            how, of, file = key.partition(" of ")
            if of and how in ("flip", "cut"):
                found.setdefault(file, Counter())[how] += times
    return dict(sorted(found.items()))


if __name__ == "__main__":
    sys.exit(main())
