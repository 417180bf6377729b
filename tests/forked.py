"""Processes that start at once: they are forked from this one, which has imported torch and regionspot."""

import importlib
import multiprocessing
import os
import pty
import signal
import tempfile
import time
from pathlib import Path

import torch

PATIENCE = 120.0
MAIN = "from regionspot.cli import main; main()"

# Torch does not train in a process forked from one that has used a GPU.
_CONTEXT = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
_MODULES = ["open_clip", "segment_anything", "regionspot.cli"]
_MODULES += ["regionspot.pipeline.extraction.extract", "regionspot.evaluation.evaluate"]
_CONTEXT.set_forkserver_preload(_MODULES)
for _name in _MODULES:
    importlib.import_module(_name)  # now, because otherwise every process would
_START = """
import logging, os, sys
if terminal:
    os.setsid()  # the terminal becomes the controlling one when it is opened
output = os.open(terminal or file, os.O_RDWR)
os.dup2(output, 1), os.dup2(output, 2)
sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
logging.getLogger().handlers.clear()  # pytest's
os.environ.update(environment)
sys.argv = ["regionspot", *arguments]
import torch
torch.set_num_threads(1)
exec(code)
"""


class ForkedCommand:
    """A running `regionspot` command, or other Python `code` with these arguments.

    terminal   run it in the foreground of a terminal of its own
    """

    def __init__(self, *arguments, code=MAIN, environment=None, terminal=False) -> None:
        handle, self._file = tempfile.mkstemp()
        os.close(handle)
        self._terminal, slave = pty.openpty() if terminal else (None, None)
        names = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "environment": environment or {},
            "terminal": slave and os.ttyname(slave),
            "file": self._file,
        }
        self._slave = slave
        self._process = _CONTEXT.Process(target=exec, args=(_START, names), daemon=True)
        self._process.start()

    def is_running(self) -> bool:
        return self._process.is_alive()

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.is_running(), f"it ended too early: {self.end()}"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def stop(self, number: signal.Signals) -> tuple[int, list[str]]:
        """Send a signal, on a terminal as Ctrl-C if possible, and return what `end` returns."""
        if self._terminal and number == signal.SIGINT:
            os.write(self._terminal, b"\x03")
        else:
            os.kill(self._process.pid, number)
        return self.end()

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end; returns the exit code and the lines of stdout and stderr."""
        written = b""
        if self._terminal:
            os.close(self._slave)
            try:
                while piece := os.read(self._terminal, 65536):
                    written += piece
            except OSError:
                pass  # the process has closed its end
            os.close(self._terminal)
        self._process.join(PATIENCE)
        written += Path(self._file).read_bytes()
        os.unlink(self._file)
        return self._process.exitcode, written.decode().replace("\r\x1b[K", "\n").splitlines()
