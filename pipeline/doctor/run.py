"""`regionspot doctor`: check whether this machine can extract, by doing each step once.

    machine.py   Python, torch, GPUs, allocator, decoders, packages, the metrics port
    paths.py     the cache's disk and its write throughput, the dataset
    models.py    weights, and one image through every stage

A check that raises an unexpected error is reported as failed; the other checks still run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from regionspot.pipeline.backbones.builders import get_preset
from regionspot.pipeline.doctor import machine, models, paths
from regionspot.pipeline.doctor.report import DoctorOptions, Finding


def examine(options: DoctorOptions) -> Iterator[Finding]:
    """Run all checks and yield the findings. Raises InputError for an unknown preset."""
    if options.preset is not None:
        get_preset(options.preset)
    checks: list[tuple[str, Callable[[DoctorOptions], Iterable[Finding]]]] = [
        ("python", machine.check_python),
        ("packages", machine.check_packages),
        ("torch", machine.check_torch),
        ("gpu", machine.check_gpus),
        ("allocator", machine.check_allocator),
        ("decoder", machine.check_decoder),
        ("metrics", machine.check_metrics_port),
        ("cache", paths.check_cache),
        ("data", paths.check_dataset),
        ("weights", models.check_weights),
        ("stages", models.check_stages),
    ]
    for name, check in checks:
        try:
            yield from check(options)
        except Exception as error:  # a broken library can raise anything
            first_line = next(iter(str(error).splitlines()), "")
            yield Finding(name, "fail", f"{type(error).__name__}: {first_line}", "fix that and run the doctor again")
