"""Where a run's metrics go besides metrics.jsonl: TensorBoard event files, and Trackio or Weights & Biases on request.

All three packages are extras. The event files are written into the run's folder whenever TensorBoard is installed:
`tensorboard --logdir runs` then shows all runs below a folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from regionspot.cache.errors import InputError, unknown_name

TRACKERS = ("trackio", "wandb")  # both have wandb's interface
PROJECT = "regionspot"


class Tracker(Protocol):
    """What the run objects of trackio and wandb have in common."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class _EventFiles:
    """TensorBoard event files in the folder of a run. A file is created with the first values."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


def require_tracker(name: str | None) -> None:
    """Raises InputError for an unknown tracker and for one that is not installed. None is always allowed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise unknown_name("tracker", name, TRACKERS)
    if importlib.util.find_spec(name) is None:
        raise InputError(f"tracker {name}: is not installed; pip install 'regionspot[{name}]', or leave --log-to out")


def open_trackers(folder: Path, name: str | None, run_id: str, config: Mapping[str, Any]) -> list[Tracker]:
    """TensorBoard, if it is installed, and the tracker `name`, if given.

    run_id   under which trackio and wandb find a run that is resumed

    Raises InputError if the tracker does not start, for example without a network or a login.
    """
    trackers: list[Tracker] = [_EventFiles(folder)] if importlib.util.find_spec("tensorboard") else []
    if name is not None:
        options = {"id": run_id, "dir": str(folder)} if name == "wandb" else {}
        try:
            with redirect_stdout(sys.stderr):  # trackio prints; stdout is for results
                module = importlib.import_module(name)
                trackers.append(module.init(project=PROJECT, name=run_id, config=config, resume="allow", **options))
        except Exception as error:  # anything: it is another program's
            raise InputError(f"tracker {name}: does not start ({error}); leave --log-to out") from error
    return trackers
