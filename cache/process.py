"""Identity of a process, to distinguish files left behind by a dead run from those of a live one.

A process id alone is ambiguous: ids are reused, each container counts from 1, and containers may share a host name. So
an identity also holds the boot id, the process namespace and the start time. Only Linux provides these; on other
systems no process is ever reported dead.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_DEAD_STATES = "ZXx"  # zombie or dead (proc_pid_stat(5))


@dataclass(frozen=True)
class Process:
    """A process on any machine.

    boot       random id of the machine's boot, "" if unknown
    namespace  of process ids; each container has its own
    started    clock ticks from boot to the start of the process, 0 if unknown
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    def is_here(self) -> bool:
        """Whether it runs, or ran, in this process's boot and namespace."""
        return bool(self.boot) and (self.boot, self.namespace) == process_place()

    def is_gone(self) -> bool:
        """Whether it has certainly ended; False if that cannot be known."""
        return self.is_here() and has_ended(self.pid, self.started)


def has_ended(pid: int, started: int = 0) -> bool:
    """Whether a process of this machine has certainly ended.

    started   clock ticks from boot to its start, to detect a reused id; 0 if unknown
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process: /proc may still be readable
    current = _started(pid)
    return current is not None and (current < 0 or (started > 0 and current != started))


def this_process() -> Process:
    """The calling process."""
    return Process(socket.gethostname(), *process_place(), os.getpid(), _started(os.getpid()) or 0)


def process_place() -> tuple[str, str]:
    """Boot id and process namespace of this process; both "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; -1 if it is dead, None if unknown."""
    try:
        # The command name in brackets may itself hold spaces and brackets. After it: the state, and the start as 20th.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in _DEAD_STATES else int(fields[18])
