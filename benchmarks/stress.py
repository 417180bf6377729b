"""`make stress`: the tests that damage, kill and starve caches, in full, and what they counted.

These are all tests that are marked `slow`; a sample of each is in the usual run. What they count goes into
build/stress, a file each, and from there into one table. It is one run, of one commit on one machine: what other runs
of the tests count is not kept, and nothing is written unless every test passes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.goals import RESULTS, SCRATCH, Report, say, versions
from regionspot.cache.machine import processors

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ROOT / "build" / "stress"

PROTOCOL = """
A cache of ten images with a feature set of every encoding, in three parts: float16, bfloat16 with zstd, float32, int8
with scales, maps and tokens, one image that failed. Everything is drawn from seeds.

* Damage: one bit flipped anywhere in a file drawn at random, or (one time in five) the file cut short. `cache verify`
  has to find it; then all of the cache is opened and read, and what is handed out is compared with the truth.
* Kills: three writers share one cache that is not even made yet. Each is killed by SIGKILL at a drawn call to the
  system, or at a drawn moment, or lives. After each round all that is committed is verified; in the end the bytes equal
  those of an undisturbed run.
* Faults: a fault begins at a drawn image and call. The run goes through or ends with one line; then what is committed
  is verified, and the same run without the fault ends with the bytes of an undisturbed one.
* Claims: runs that reach for the same parts take turns at each single call to the store, in a drawn order; between two
  calls a run may be killed, or sleep for so long that it counts as dead. No two that are awake have one part.
* Workers: four of a scheduler on this machine are killed, or frozen and woken, at drawn moments; others lose their
  scheduler and get a new one; one is in another network namespace, whose cable is pulled and plugged in again. Each
  time the cache ends complete, verified, and equal to the byte to that of one process.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage, kill and starve caches, and count what is lost.")
    parser.add_argument(
        "--quick", action="store_true", help="a fiftieth of it; as with words for pytest, into build/bench"
    )
    asked, of_pytest = parser.parse_known_args()
    shutil.rmtree(COUNTED, ignore_errors=True)
    COUNTED.mkdir(parents=True)
    say("a fiftieth of the slow tests" if asked.quick else "the slow tests")
    started, commit = datetime.now(UTC), _commit()
    outcomes, workers = COUNTED / "outcomes.xml", str(max(2, processors()))
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-n", workers, "--dist", "worksteal"]
    command += ["--junitxml", str(outcomes), *of_pytest, "tests"]
    environment = {**os.environ, "STRESS_COUNTS": str(COUNTED), "STRESS_QUICK": str(int(asked.quick))}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    counted = [json.loads(file.read_bytes()) for file in sorted(COUNTED.glob("*.json"))]
    if code or not counted:
        say("a test failed, so no result is written")
        return code or 1
    minutes = (datetime.now(UTC) - started).total_seconds() / 60
    suite = ElementTree.parse(outcomes).getroot().find("testsuite")
    ran, skipped = (0, 0) if suite is None else (int(suite.attrib[name]) for name in ("tests", "skipped"))
    one_run = (
        f"One run: begun {started:%Y-%m-%d %H:%M} UTC at commit {commit}, {minutes:.0f} minutes; {ran - skipped} tests "
        f"passed, {skipped} were skipped."
    )
    _report(counted, f"{PROTOCOL}\n{one_run}").finish(SCRATCH if asked.quick or of_pytest else RESULTS)
    return 0


def _commit() -> str:
    """Short name of the commit that is checked out, and whether files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    name = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{name} with changes" if git("status", "--porcelain", "--untracked-files=no") else name


def _report(counted: list[dict[str, Any]], protocol: str) -> Report:
    packages = ("zarr", "numpy", "google-crc32c", "numcodecs")
    report = Report("stress", "What was done to caches, and what was lost", protocol, versions(packages))
    both, kills, faults, claims, workers = (
        [each for each in counted if each["file"] == file]
        for file in ("flips", "kills", "faults", "claims_interleaved", "workers")
    )
    one_file = [each for each in both if "hdf5" in each["test"]]
    flips = [each for each in both if each not in one_file]
    report.add_goal("bits flipped and files cut short", _sum(flips, "damages"), at_least=10_000)
    report.add_goal(
        "of these found by `cache verify`, share", _sum(flips, "found") / max(_sum(flips, "damages"), 1), at_least=1
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
    for what in ("orders", "takeovers"):
        report.add_row("Claims", what=what, times=_sum(claims, what))
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
        ("claims", claims),
        ("workers", workers),
    ):
        seeds = sorted({seed for test in tests for seed in test["seeds"]})
        report.add_row("Seeds", what=name, seeds=", ".join(map(str, seeds)), seconds=_sum(tests, "seconds"))
    return report


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
