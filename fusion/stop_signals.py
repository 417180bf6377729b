"""SIGINT and SIGTERM during training: the step under way is finished and a checkpoint saved before they take effect.

A signal may come in the middle of an update, where half of the weights are new: there is nothing whole to save then. So
it is answered between two steps only, or at once while the run waits for data, which may take long.

    with StopSignals() as signals:
        while (batch := signals.interruptible(next_batch)) is not None:   # Stopped is raised in here only
            update(batch)

    except Stopped:      save; then `signals.take_effect()`, which does what would have happened without all this
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """A signal came. No Exception: code that handles errors must not take it for one."""


class StopSignals:
    """Holds SIGINT and SIGTERM back while it is entered; in other threads than the main one it does nothing.

    A second signal takes effect at once, as it would have without this.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._received: int | None = None
        self._interruptible = False

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # Ignored, as in a script's `command &`, or set by something else than Python: not ours to change.
            if handler in (signal.SIG_IGN, None):
                continue
            try:
                signal.signal(number, self._receive)
            except ValueError:  # not the main thread, which alone receives signals
                return self
            self._before[number] = handler
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def interruptible(self, work: Callable[[], T]) -> T:
        """`work()`, or Stopped as soon as a signal comes, also for one that came before."""
        self._interruptible = True
        try:
            if self._received is not None:
                raise Stopped
            return work()
        finally:
            self._interruptible = False

    def take_effect(self) -> None:
        """What the signal that came would have done: as a rule it raises KeyboardInterrupt or ends the process."""
        received = self._received
        self.__exit__()
        if received is not None:
            signal.raise_signal(received)

    def _receive(self, number: int, _: FrameType | None) -> None:
        second = self._received is not None
        self._received = number
        if second:
            self.take_effect()
        elif self._interruptible:
            raise Stopped
