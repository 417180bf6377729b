"""Shared by all benchmarks: interleaved rounds, goals as ratios, and reports as table, JSON and Markdown.

Machines are shared and noisy. Everything compared runs in turn within a round, in a new random order each round, and a
goal is the median of the ratios within the rounds, so that what slows down a whole round cancels. A missed goal is
reported and is no error, so that nobody is tempted to bend it.

    samples = interleaved({"ours": read_ours, "raw": read_raw}, rounds=5)
    report.add_goal("ours / raw", ratio(samples, "ours", "raw"), at_least=0.9)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Samples = dict[str, list[float]]  # one value per case and round

RESULTS = Path(__file__).resolve().parent / "results"
SCRATCH = Path(__file__).resolve().parents[1] / "build" / "bench"


def options(what: str) -> argparse.Namespace:
    """Parse a benchmark's command line: `quick`, and `results`, the folder that results are written into."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--quick", action="store_true", help="a smaller run, written into build/bench")
    arguments = parser.parse_args()
    arguments.results = SCRATCH if arguments.quick else RESULTS
    return arguments


def interleaved(cases: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0) -> Samples:
    """Call every case once per round, in a random order, and return its results."""
    order, shuffle = list(cases), random.Random(seed).shuffle
    samples: Samples = {name: [] for name in cases}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(cases[name]())
    return samples


def ratio(samples: Samples, of: str, to: str) -> float:
    """Median over the rounds of the ratio of two cases."""
    return median(one / other for one, other in zip(samples[of], samples[to], strict=True))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alone(section: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What a section returns, from a new process: its threads and memory do not reach into another's figures."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(section, *arguments, **named).result()


def say(text: str) -> None:
    """Print progress to stderr; stdout is for the table."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Goal:
    """A value and its bound, exactly one of `at_least` and `at_most`."""

    goal: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        return self.value >= self.at_least if self.at_least is not None else self.value <= (self.at_most or 0)

    @property
    def bound(self) -> dict[str, float]:
        return {"at_least": self.at_least} if self.at_least is not None else {"at_most": self.at_most or 0}

    def to_json(self) -> dict[str, Any]:
        return {"goal": self.goal, "value": _rounded(self.value), **self.bound, "met": self.met}


@dataclass
class Report:
    """The results of one benchmark.

    name       stem of the result files
    protocol   Markdown: everything that the numbers depend on
    versions   of the packages measured
    """

    name: str
    title: str
    protocol: str
    versions: Mapping[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def add_row(self, table: str, **columns: Any) -> None:
        """Add a row to the table of that title; the first row decides the columns."""
        self.rows.append({"table": table, **columns})

    def add_goal(self, goal: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
        self.goals.append(Goal(goal, value, at_least, at_most))

    def finish(self, folder: Path) -> None:
        """Write `<name>.json` and `<name>.md` and print the tables."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": machine(),
            "versions": dict(self.versions),
            "rows": [{key: _rounded(value) for key, value in row.items()} for row in self.rows],
            "goals": [goal.to_json() for goal in self.goals],
        }
        (folder / f"{self.name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        (folder / f"{self.name}.md").write_text(self.to_markdown())
        print(self.to_text())

    def to_markdown(self) -> str:
        parts = [f"# {self.title}", self.protocol.strip(), _machine_line(self.versions)]
        for title, rows in self._tables():
            parts += [f"## {title}", _markdown_table(rows)]
        return "\n\n".join(parts) + "\n"

    def to_text(self) -> str:
        return "\n\n".join(f"{title}\n{_text_table(rows)}" for title, rows in self._tables())

    def _tables(self) -> Iterable[tuple[str, list[dict[str, str]]]]:
        """Title and rows of each table as text, goals first."""
        if self.goals:
            yield "Goals", [_goal_row(goal) for goal in self.goals]
        for title in dict.fromkeys(row["table"] for row in self.rows):
            rows = [row for row in self.rows if row["table"] == title]
            yield title, [{key: as_text(row.get(key)) for key in rows[0] if key != "table"} for row in rows]


def machine() -> dict[str, Any]:
    """Hardware and system, without the host name."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of packages."""
    return {name: metadata.version(name) for name in packages}


def as_text(value: Any) -> str:
    """A table cell; floats with three significant digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return "" if value is None else str(value)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _goal_row(goal: Goal) -> dict[str, str]:
    sign, bound = next((">=" if key == "at_least" else "<=", value) for key, value in goal.bound.items())
    met = "met" if goal.met else "MISSED"
    return {"goal": goal.goal, "value": as_text(float(goal.value)), "wanted": f"{sign} {bound:g}", "": met}


def _machine_line(versions: Mapping[str, str]) -> str:
    hardware = machine()
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Machine: {hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gb']} GB, {hardware['system']}, "
        f"Python {hardware['python']}; {packages}."
    )


def _markdown_table(rows: list[dict[str, str]]) -> str:
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([cell.replace("|", "\\|") for cell in row.values()] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text_table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
