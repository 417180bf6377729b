"""The main job on a toy world, every stage by its public command: what a newcomer runs first.

The stages run one after the other in this process, as importing torch for each would cost more than some of them do;
each is printed as the command that a user would type, and is given to the command line as just that. A stopped demo
resumes because the stages do. What it adds is the table that sets the head beside two ways to use the same frozen CLIP
without any training.
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

HEAD, CROP, POOLED = "head (trained)", "CLIP on every crop", "CLIP map, mean in box"


def commands(out: Path, images: int, seed: int) -> list[list[str]]:
    """The arguments of each `regionspot` command, in order; everything they write lies in `out`."""
    world, cache, run = str(out / "world"), str(out / "train.zarr"), str(out / "run")
    evaluate = ["eval-lvis", "--dataset", "toy", "--data", world, "--preset", "toy"]
    return [
        ["toy-world", world, "--pictures", str(images), "--seed", str(seed)],
        ["extract", "toy", "--data", world, "--cache", cache, "--preset", "toy"],
        ["train", "--cache", cache, "--preset", "toy", "--schedule", "toy", "--out", run, "--resume"],
        [*evaluate, "--out", str(out / "head"), "--checkpoint", f"{run}/head.safetensors"],
        [*evaluate, "--out", str(out / "crop"), "--baseline", "crop"],
        [*evaluate, "--out", str(out / "pooled"), "--baseline", "pooled"],
    ]


def run_demo(run: Callable[[Sequence[str]], object], out: Path, images: int = 3000, seed: int = 0) -> str:
    """Give `run` the arguments of every command, write `report.md` and return the table with where everything lies.

    Raises RegionSpotError, naming the command, when one fails; run again, the demo resumes with that one.
    """
    begin = time.perf_counter()
    for arguments in commands(out, images, seed):
        command, started = f"regionspot {shlex.join(arguments)}", time.perf_counter()
        log.info("\n$ %s", command)
        try:
            run(arguments)
        except RegionSpotError as error:
            raise RegionSpotError(f"demo: `{command}` failed: {error}; run the demo again to resume with it") from error
        log.info("(%s)", duration(time.perf_counter() - started))
    found = {name: _results(out / folder) for name, folder in ((HEAD, "head"), (CROP, "crop"), (POOLED, "pooled"))}
    rows = [row_of(results, "bbox", name) for name, results in found.items()]
    masks = [row_of(found[HEAD], "segm", f"{HEAD}, masks")]
    write_file(out / "report.md", f"{ap_markdown([*rows, *masks])}\n\n{LEGEND}\n".encode())
    title = f"toy world, {found[HEAD]['pictures']} validation images, ground-truth boxes; rare classes never trained on"
    return "\n".join(
        [
            "",
            ap_table(rows, title),
            "",
            ap_table(masks, mark_best=False),
            "",
            LEGEND,
            "",
            f"{out}/head/sheet.png   labelled images, right names in green",
            f"{out}/run/curves.png   the training run",
            f"{out}/report.md        this table; results.json and detections.json in head/, crop/, pooled/",
            f"in all {duration(time.perf_counter() - begin)}",
        ]
    )


def _results(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results
