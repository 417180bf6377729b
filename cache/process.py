"""Which process on which machine: so that what a run left behind is told from what a living one is doing.

A process id alone says little: ids are used again, each container counts its own from 1, and containers may share the
name of their machine. So the boot, the process namespace and the moment the process began stand beside it. Only Linux
tells these; elsewhere nothing is ever said to be gone.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_DEAD_STATES = "ZXx"  # died, but its parent has not asked for it (proc_pid_stat(5))


@dataclass(frozen=True)
class Process:
    """A process anywhere.

    boot       random number of the machine's boot, "" where the system has none
    namespace  of process ids; containers of one machine have one each
    started    clock ticks from the boot to its begin, 0 where the system does not say
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    def is_here(self) -> bool:
        """Whether it runs, or ran, where this one can see it."""
        return bool(self.boot) and (self.boot, self.namespace) == process_place()

    def is_gone(self) -> bool:
        """Whether it certainly runs no more; False where that cannot be known."""
        return self.is_here() and has_ended(self.pid, self.started)


def has_ended(pid: int, started: int = 0) -> bool:
    """Whether a process of this machine certainly runs no more.

    started   clock ticks from the boot to its start, which tell it from a later process with the same id; 0: unknown
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's; what /proc says of it may be hidden
    found = _started(pid)
    return found is not None and (found < 0 or (started > 0 and found != started))


def this_process() -> Process:
    """The calling process."""
    return Process(socket.gethostname(), *process_place(), os.getpid(), _started(os.getpid()) or 0)


def process_place() -> tuple[str, str]:
    """The boot and the namespace that this process's id is of; each "" where the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; -1 when it is dead, None when that is not to be seen."""
    try:
        # Behind the command's name, which may hold spaces and brackets itself: the state, and as 20th the begin.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in _DEAD_STATES else int(fields[18])
