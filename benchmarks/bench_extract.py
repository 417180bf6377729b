"""Extraction against the authors' path, in CPU time, and on a GPU where there is one: `make bench-extract`.

The sides run in processes of their own, one thread of math each, and take turns within a round. The authors' has two:
with glibc's allocator as it comes, and tuned from outside so that large blocks cost no page faults.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.bench_extract_authors import Authors
from benchmarks.bench_extract_data import SIZES, Job
from benchmarks.bench_extract_decoders import measure_decoders
from benchmarks.bench_extract_errors import error_of, measure_errors
from benchmarks.bench_extract_gpu import FULL_GPU, REHEARSAL, measure_gpu
from benchmarks.bench_extract_ours import Ours
from benchmarks.bench_extract_process import DEFAULT_MALLOC, TUNED_MALLOC, Contender
from benchmarks.goals import SCRATCH, Report, Samples, interleaved, options, ratio, say, versions
from regionspot.cache.machine import cpu_supports

PACKAGES = ["torch", "torchvision", "segment-anything", "open_clip_torch", "pillow", "numpy"]
TABLE = "CPU seconds, one thread"

DEFAULT, TUNED, EXACT, ROUGH = "authors, default malloc", "authors, tuned malloc", "ours, float32", "ours, bfloat16"


@dataclass(frozen=True)
class Scale:
    """How much is measured. In full about a quarter of an hour on two cores, and 13 GB of memory.

    prompts   of the authors' side and of ours; the time of each is the same for a prompt, whatever their number
    """

    preset: str
    rounds: int
    images: int
    prompts: tuple[int, int]
    boxes: tuple[int, ...] = (1, 16, 64)


FULL = Scale("bl", rounds=3, images=2, prompts=(50, 1000))
SMALL = Scale("toy", rounds=2, images=2, prompts=(20, 200))


@dataclass(frozen=True)
class Goal:
    """Least ratios of the authors' time to ours: with default malloc, with tuned malloc."""

    over_default: float
    over_tuned: float | None


GOALS = {
    ("encoder", EXACT): Goal(2, 1.1),
    ("encoder", ROUGH): Goal(4, 2.1),
    ("tokens of 16 boxes", EXACT): Goal(9, 5),
    ("whole stage", EXACT): Goal(1.9, 1.15),
    ("whole stage", ROUGH): Goal(4, 2.2),
    ("1,000 prompts", EXACT): Goal(9, None),
}


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    scale = SMALL if arguments.quick else FULL
    scratch = SCRATCH / "extract"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was stopped
    job = Job(scale.preset, scratch / "photos", scale.images)
    job.write_images()
    if torch.cuda.is_available() or arguments.quick:
        _measure_gpu(arguments)
    report = Report("extract", "Extraction against the authors' path", _protocol(scale), versions(PACKAGES))
    _measure_steps(report, scale, job)
    measure_decoders(report, job.paths()[: len(SIZES)], rounds=5 if arguments.quick else 20, long_side=1024)
    measure_errors(report, scratch / "world", count=2 if arguments.quick else 16)
    shutil.rmtree(scratch)
    report.finish(arguments.results)


def _measure_gpu(arguments: Any) -> None:
    """Runs first, into a file of its own: time on a GPU may be shorter than the rest takes."""
    device, scale = ("cuda", FULL_GPU) if torch.cuda.is_available() else ("cpu", REHEARSAL)
    name = torch.cuda.get_device_name() if device == "cuda" else "none: a rehearsal with toy models on the CPU"
    report = Report("extract_gpu", f"Extraction on a GPU ({name})", _GPU_PROTOCOL, versions(PACKAGES))
    measure_gpu(report, scale, device, SCRATCH / "extract_gpu")
    report.finish(arguments.results)


def _measure_steps(report: Report, scale: Scale, job: Job) -> None:
    say("random weights")
    sides = {
        DEFAULT: Contender(DEFAULT_MALLOC, Authors, job),
        TUNED: Contender(TUNED_MALLOC, Authors, job),
        EXACT: Contender(DEFAULT_MALLOC, Ours, job, "float32"),
    }
    for side in sides.values():  # warm up
        side("tokens", 1)
    found = {step: _in_turn(step, sides, scale, run) for step, run in _steps(scale).items()}
    shown = {name: sides[name].results for name in (DEFAULT, EXACT)}
    for side in (DEFAULT, TUNED):
        sides.pop(side).close()
    exact_tokens = _tokens_of_encoded(sides[EXACT])
    sides.pop(EXACT).close()
    _measure_bfloat16(report, scale, job, found, exact_tokens)
    for step, samples in found.items():
        _add_step(report, step, samples)
    outside = shown[EXACT]["whole"]
    report.add_row("Share of CPU time outside the image encoders, whole stage", side=EXACT, share=outside)
    if scale is FULL:
        for (step, side), goal in GOALS.items():
            _add_goals(report, step, side, goal, found[step])
        if cpu_supports("bfloat16"):
            for step in ("encoder", "CLIP", "CLIP, 8 images"):
                report.add_goal(f"{step}: {EXACT} / {ROUGH}", ratio(found[step], EXACT, ROUGH), at_least=1)
        report.add_goal("share of CPU time outside the encoders, whole stage", outside, at_most=0.05)
    for step, title in (("encode", "embedding"), ("tokens", "tokens of 64 boxes"), ("text", "prompts")):
        theirs, ours = shown[DEFAULT][step], shown[EXACT][step]
        report.add_row(
            "Largest difference to the official result, of its largest value", of=title, value=_difference(ours, theirs)
        )


def _steps(scale: Scale) -> dict[str, Callable[[Contender, bool], float]]:
    """CPU seconds of each step, called with a side and whether it is ours."""
    theirs, ours = scale.prompts
    steps: dict[str, Callable[[Contender, bool], float]] = {
        "encoder": lambda side, _: side("encode"),
        "CLIP": lambda side, _: side("clip"),
        "CLIP, 8 images": lambda side, mine: side("clip", 8) if mine else 8 * side("clip"),
        "whole stage": lambda side, _: side("whole", scale.images) / scale.images,
        "1,000 prompts": lambda side, mine: side("text", count := ours if mine else theirs) * 1000 / count,
    }
    for count in scale.boxes:
        steps[f"tokens of {count} boxes"] = partial(lambda count, side, _: side("tokens", count), count)
    return steps


def _in_turn(step: str, sides: dict[str, Contender], scale: Scale, run: Callable[[Contender, bool], float]) -> Samples:
    say(step)
    return interleaved({name: partial(run, side, name in (EXACT, ROUGH)) for name, side in sides.items()}, scale.rounds)


def _measure_bfloat16(
    report: Report, scale: Scale, job: Job, found: dict[str, Samples], exact_tokens: NDArray[np.float32]
) -> None:
    """Adds our times in bfloat16 to `found`: once, where the CPU has to emulate it."""
    say("bfloat16")
    rounds, few = (scale.rounds, scale) if cpu_supports("bfloat16") else (1, replace(scale, images=1))
    side = Contender(DEFAULT_MALLOC, Ours, job, "bfloat16")
    for step in ("encoder", "CLIP", "CLIP, 8 images", "whole stage"):
        run = _steps(few)[step]
        found[step][ROUGH] = (scale.rounds * [run(side, True) for _ in range(rounds)])[: scale.rounds]
    rough = _tokens_of_encoded(side)
    side.close()
    rms, largest = error_of(rough, exact_tokens)
    title = "Token error of a bfloat16 image encoder, drawn weights (tokens have rms 1)"
    report.add_row(title, model=scale.preset, rms=rms, largest=largest)


def _tokens_of_encoded(side: Contender) -> NDArray[np.float32]:
    side("tokens_of_encoded", 16)
    found: NDArray[np.float32] = side.results["tokens_of_encoded"]
    return found


def _add_step(report: Report, step: str, samples: Samples) -> None:
    times = {name: median(samples[name]) if name in samples else None for name in (DEFAULT, TUNED, EXACT, ROUGH)}
    over = {f"{baseline} / {EXACT}": ratio(samples, baseline, EXACT) for baseline in (DEFAULT, TUNED)}
    report.add_row(TABLE, step=step, **times, **over)


def _add_goals(report: Report, step: str, side: str, goal: Goal, samples: Samples) -> None:
    emulated = (
        " (emulated: this CPU has no instructions for it)" if side == ROUGH and not cpu_supports("bfloat16") else ""
    )
    for baseline, least in ((DEFAULT, goal.over_default), (TUNED, goal.over_tuned)):
        if least is not None:
            report.add_goal(f"{step}: {baseline} / {side}{emulated}", ratio(samples, baseline, side), at_least=least)


def _difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found[: len(expected)] - expected).max() / np.abs(expected).max())


_GPU_PROTOCOL = """
Random weights, generated JPEGs of 640 x 480 and 2000 x 1500 in turn, 16 boxes each. Rates are wall time between two
waits for the device, after a warm-up. The matrix rate is that of one bfloat16 product of 8192 x 8192. Operations of an
image are counted in the official models' own products. The authors' path: one image at a time, float16 autocast, masks
and their postprocessing, one file an image. The whole stage is `extract` into a new cache, decoding included.
"""


def _protocol(scale: Scale) -> str:
    few = (
        ""
        if cpu_supports("bfloat16")
        else " This CPU emulates bfloat16: its figures are of one round and of the smaller image."
    )
    sizes = " and ".join(f"{width} x {height}" for width, height in SIZES)
    tuned = " ".join(f"`{name}={value}`" for name, value in TUNED_MALLOC.items())
    rehearsal = "" if scale is FULL else "**A rehearsal with the toy backbones, without goals.** "
    return f"""
{rehearsal}Preset `{scale.preset}`, weights drawn from a seed.
Images of {sizes} drawn by the benchmark, 16 boxes each. Every side
has its own process with one thread of math; figures are CPU seconds of all threads of that process, medians of
{scale.rounds} rounds in which the sides take turns, in another order each. Ratios are medians of the ratio within a
round.{few}

- **Authors**: the steps of RegionSpot's authors in their order, one image at a time: segment_anything's image encoder,
  prompt encoder and mask decoder, masks resized to the image; open_clip's image tower; one `torch.save` an
  image. *Default malloc*: glibc unchanged. *Tuned malloc*: with {tuned},
  which avoids most page faults of their code.
- **Ours**: `extract` for the whole stage, into a real cache with its checksums and flushes; parts of it for the steps.
  Our process sets its allocator itself.
- **1,000 prompts**: names of ImageNet's classes in one template. The authors' side embeds {scale.prompts[0]} and is
  scaled up: each of its prompts has the tower's full 77 places, so the time is proportional to their number. Ours
  embeds {scale.prompts[1]}.
- **JPEG to RGB**: CPU time, the least of all rounds. Differences are in steps of 8-bit pixels.
- **Errors of dtypes**: the toy backbones, which are trained, on their own world; and drawn weights at full size.
"""


if __name__ == "__main__":
    main()
