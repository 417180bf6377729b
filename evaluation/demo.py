"""The demo: extract, train and evaluate on a toy dataset, each stage by its public command.

All stages run in this process, because importing torch takes longer than some of them; each is logged as the command
that a user would type. A stopped demo resumes, because its stages do. The result compares the paper's head with the
guided head, which needs fewer steps, and with three baselines of the same frozen CLIP.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regionspot.cache.errors import RegionSpotError
from regionspot.cache.progress import duration
from regionspot.cache.storage.atomic_files import write_file
from regionspot.evaluation.report.tables import LEGEND, ap_markdown, ap_table, row_of

log = logging.getLogger(__name__)

GUIDED_STEPS = 400  # a third of the toy schedule's
HEAD, GUIDED = "head (trained)", f"guided head, {GUIDED_STEPS} steps"
CROP, DENSE, POOLED = "CLIP on every crop", "CLIP dense map, mean in box", "CLIP map, mean in box"
# Of the results of each method.
FOLDERS = {HEAD: "head", GUIDED: "guided", CROP: "crop", DENSE: "dense", POOLED: "pooled"}


def commands(out: Path, images: int, seed: int) -> list[list[str]]:
    """The arguments of each `regionspot` command, in order; they write into `out` only."""
    world, cache = str(out / "world"), str(out / "train.zarr")
    run, guided = str(out / "run"), str(out / "run_guided")
    train = ["train", "--cache", cache, "--preset", "toy", "--schedule", "toy", "--resume", "--out"]
    evaluate = ["eval-lvis", "--dataset", "toy", "--data", world, "--preset", "toy"]
    return [
        ["toy-world", world, "--pictures", str(images), "--seed", str(seed)],
        ["extract", "toy", "--data", world, "--cache", cache, "--preset", "toy"],
        [*train, run],
        [*train, guided, "--head", "guided", "--iterations", str(GUIDED_STEPS)],
        [*evaluate, "--out", str(out / "head"), "--checkpoint", f"{run}/head.safetensors"],
        [*evaluate, "--out", str(out / "guided"), "--checkpoint", f"{guided}/head.safetensors", "--no-masks"],
        [*evaluate, "--out", str(out / "crop"), "--baseline", "crop"],
        [*evaluate, "--out", str(out / "dense"), "--baseline", "dense"],
        [*evaluate, "--out", str(out / "pooled"), "--baseline", "pooled"],
        ["report", str(out / "head"), "--data", world],
    ]


def run_demo(run: Callable[[Sequence[str]], object], out: Path, images: int = 3000, seed: int = 0) -> str:
    """Call `run` with the arguments of every command, write `report.md`, and return the table and the paths of files.

    Raises RegionSpotError with the command that failed; the demo resumes with that command when it is run again.
    """
    begin = time.perf_counter()
    for arguments in commands(out, images, seed):
        command, started = f"regionspot {shlex.join(arguments)}", time.perf_counter()
        log.info("\n$ %s", command)
        try:
            run(arguments)
        except RegionSpotError as error:
            raise RegionSpotError(f"demo: `{command}` failed: {error}; run the demo again to resume") from error
        log.info("(%s)", duration(time.perf_counter() - started))
    results = {name: _results(out / folder) for name, folder in FOLDERS.items()}
    rows = [row_of(method_results, "bbox", name) for name, method_results in results.items()]
    masks = [row_of(results[HEAD], "segm", f"{HEAD}, masks")]
    write_file(out / "report.md", f"{ap_markdown([*rows, *masks])}\n\n{LEGEND}\n".encode())
    images = results[HEAD]["images"]
    title = f"toy world, {images} validation images, ground-truth boxes; rare classes never trained on"
    return "\n".join(
        [
            "",
            ap_table(rows, title),
            "",
            ap_table(masks, mark_best=False),
            "",
            LEGEND,
            "",
            f"{out}/head/report.html the head's evaluation on a page, for a browser",
            f"{out}/head/sheet.png   labelled images, right names in green",
            f"{out}/run/curves.png   the training run",
            f"{out}/report.md        this table; results.json and detections.json in {'/, '.join(FOLDERS.values())}/",
            f"in all {duration(time.perf_counter() - begin)}",
        ]
    )


def _results(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results
