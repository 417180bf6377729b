"""The training runs below some folders, as a table: what each trains on, how far it is and how good."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regionspot.cache.errors import InputError, WeightsError
from regionspot.fusion.training.metrics import read_metrics
from regionspot.fusion.training.run_folder import RunFolder

COLUMNS = ("run", "preset", "head", "data", "steps", "loss", "best", "images/s", "state")
LEFT_ALIGNED = ("run", "preset", "head", "data", "state")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run. Fields other than `path` and `error` are unknown if its files cannot be read; `error` is one line then.

    data    dataset and split of each cache
    step    of `iterations`; of a run that is not running, that of its last checkpoint
    loss, images_per_second   of the last line of its metrics
    best    the best value of its first validation score, by that score's name; empty if it was never validated
    state   "running", "finished" or "stopped"
    """

    path: str
    preset: str | None = None
    head: str | None = None
    data: list[str] = field(default_factory=list)
    step: int | None = None
    iterations: int | None = None
    loss: float | None = None
    best: dict[str, float] = field(default_factory=dict)
    images_per_second: float | None = None
    state: str | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_runs(folders: Iterable[Path]) -> list[RunSummary]:
    """The runs in and below the folders, by path. Raises InputError for a folder without any."""
    paths = set[Path]()
    for folder in folders:
        below = set(_run_folders(folder))
        if not below:
            raise InputError(f"{folder}: holds no training run (a folder with run.json); name the --out of `train`")
        paths |= below
    return [summary_of(path) for path in sorted(paths)]


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        if "run.json" in files:
            yield Path(path)
        if "run.json" in files or "zarr.json" in files:  # a cache may have millions of files
            folders.clear()


def summary_of(path: Path) -> RunSummary:
    """The summary of the run in the folder `path`."""
    folder = RunFolder(path)
    try:
        record = json.loads(folder.record.read_text())
        config, caches = record["config"], record["caches"]
        iterations = int(config["iterations"])
        lines, saved, running = read_metrics(folder.metrics), folder.step_done(), folder.is_locked()
        validations = [line["validation"] for line in lines if "validation" in line]
        name = next(iter(validations[-1]), None) if validations else None
        return RunSummary(
            path=str(path),
            preset=record["preset"],
            head=config.get("head", "fusion"),  # the only one of earlier versions
            # Once: the views of a cache are recorded one by one.
            data=list(dict.fromkeys(f"{cache['dataset']} {cache['split']}" for cache in caches)),
            step=lines[-1]["step"] if running and lines else saved,
            iterations=iterations,
            loss=lines[-1]["loss"] if lines else None,
            best={name: max(scores[name] for scores in validations if name in scores)} if name else {},
            images_per_second=lines[-1]["pictures_per_second"] if lines else None,
            state="running" if running else "finished" if saved >= iterations else "stopped",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WeightsError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        return RunSummary(path=str(path), error=f"cannot be read ({reason})")


def as_table(runs: Sequence[RunSummary]) -> str:
    """Aligned columns; a run that cannot be read has its error instead."""
    rows = [COLUMNS, *(_cells(run) for run in runs if run.error is None)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(*cell) for cell in zip(COLUMNS, row, widths, strict=True)).rstrip() for row in rows]
    broken = [f"{run.path}: {run.error}" for run in runs if run.error is not None]
    return "\n".join([*(lines if len(rows) > 1 else []), *broken])


def _cells(run: RunSummary) -> tuple[str, ...]:
    return (
        run.path,
        run.preset or "-",
        run.head or "-",
        " + ".join(run.data),
        f"{run.step:,}/{run.iterations:,}",
        "-" if run.loss is None else f"{run.loss:.4g}",
        " ".join(f"{name} {value:.4f}" for name, value in run.best.items()) or "-",
        "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}",
        run.state or "-",
    )


def _aligned(column: str, cell: str, width: int) -> str:
    return cell.ljust(width) if column in LEFT_ALIGNED else cell.rjust(width)
