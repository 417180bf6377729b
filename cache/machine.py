"""What this process may use of the machine that it runs on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_MEMINFO, _OWN_GROUPS, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that can be had without swapping, and no more than the control groups that this process is in allow."""
    said = re.search(r"^MemAvailable:\s+(\d+) kB", _read(_MEMINFO), re.MULTILINE)
    # Without /proc all that the machine has: better than a guess.
    free = int(said[1]) * 1024 if said else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_group_limits()])


def _group_limits() -> Iterator[int]:
    """Memory limits of this process's groups and of all that these are in."""
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, name = _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        # In a container the path may be the host's, of which only the top is to be seen here.
        for folder in (group, *group.parents):
            limit = _read(folder / name).strip()
            if folder.is_relative_to(top) and limit.isdigit():  # without one it says "max"
                yield int(limit)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
