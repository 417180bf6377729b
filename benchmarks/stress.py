"""`make stress`: all tests marked `slow`, which damage, kill and starve caches, and a table of what they counted.

Each test writes its counts to a file in build/stress. The table is of one run of one commit on one machine, and is
written only if every test passed.
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
A cache of ten images in three parts with a feature set of every encoding: float16, bfloat16 with zstd, float32, int8
with scales; maps and tokens; one failed image. All randomness comes from seeds.

* Damage: one bit of a random file is flipped, or (one time in five) the file is truncated. `cache verify` must find it;
  then the whole cache is opened and read, and what is returned is compared with the original.
* Kills: three writers start on one cache that does not exist yet. Each is killed by SIGKILL at a random system call, at
  a random moment, or not at all. After each round all committed parts are verified; at the end the bytes equal those of
  an undisturbed run.
* Faults: a fault begins at a random image and call. The run completes or ends with one line; then all committed parts
  are verified, and the same run without the fault ends with the bytes of an undisturbed one.
* Claims: runs that compete for the same parts are interleaved at every single call to the store, in random order;
  between two calls a run may be killed, or sleep until it counts as dead. No two running processes ever hold the same
  part.
* Workers: the four workers of a local scheduler are killed, or frozen and woken, at random moments; others lose their
  scheduler and get a new one; one is in another network namespace that is disconnected and connected again. Each time
  the cache ends complete, verified, and byte-identical to that of one process.
* Strangers' files: annotations, proposals, checkpoints, images and the metadata of a cache, changed at random. Reading
  one returns or raises an error of the package, within 30 seconds, and neither writes elsewhere nor loads a pickle.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage, kill and starve caches, and count what is lost.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a fiftieth of the work; with this or options for pytest, results go into build/bench",
    )
    arguments, pytest_options = parser.parse_known_args()
    shutil.rmtree(COUNTED, ignore_errors=True)
    COUNTED.mkdir(parents=True)
    say("a fiftieth of the slow tests" if arguments.quick else "the slow tests")
    started, commit = datetime.now(UTC), _commit()
    outcomes, workers = COUNTED / "outcomes.xml", str(max(2, processors()))
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-n", workers, "--dist", "worksteal"]
    command += ["--junitxml", str(outcomes), *pytest_options, "tests"]
    environment = {**os.environ, "STRESS_COUNTS": str(COUNTED), "STRESS_QUICK": str(int(arguments.quick))}
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
    _report(counted, f"{PROTOCOL}\n{one_run}").finish(SCRATCH if arguments.quick or pytest_options else RESULTS)
    return 0


def _commit() -> str:
    """Short hash of the commit, and whether the working tree has changes."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    name = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{name} with changes" if git("status", "--porcelain", "--untracked-files=no") else name


def _report(counted: list[dict[str, Any]], protocol: str) -> Report:
    packages = ("zarr", "numpy", "google-crc32c", "numcodecs")
    report = Report("stress", "Damage, kills and faults, and what was lost", protocol, versions(packages))
    both, kills, faults, claims, workers, fuzz = (
        [each for each in counted if each["file"] == file]
        for file in ("flips", "kills", "faults", "claims_interleaved", "workers", "fuzz")
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
    report.add_goal(
        "changed files of each kind, read or refused",
        min((each["examples"] for each in fuzz), default=0),
        at_least=1000,
    )
    report.add_goal("committed parts lost or changed", _sum(kills + faults + workers, "lost"), at_most=0)
    for file, counts in _damages_by_file(flips).items():
        report.add_row("Damage", file=file, flips=counts["flip"], cuts=counts["cut"])
    for outcome in ("refused to open", "refused some reads", "read right"):
        report.add_row("Readers of damaged caches", outcome=outcome, times=_sum(flips, outcome))
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
    for each in sorted(fuzz, key=lambda each: str(each["kind"])):
        report.add_row("Strangers' files", **{key: each[key] for key in ("kind", "examples", "refused", "read")})
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
    """Number of flips and truncations by kind of file, from counts such as "flip of metadata"."""
    damages: dict[str, Counter[str]] = {}
    for test in flips:
        for key, times in test.items():
            how, of, file = key.partition(" of ")
            if of and how in ("flip", "cut"):
                damages.setdefault(file, Counter())[how] += times
    return dict(sorted(damages.items()))


if __name__ == "__main__":
    sys.exit(main())
