"""Delay SIGINT and SIGTERM during training until the current step is finished and a checkpoint is saved.

A signal may arrive in the middle of an update, when only some of the weights are new. So it is handled between two
steps only, or immediately while the run waits for data, which may take long.

    with StopSignals() as signals:
        while (batch := signals.interruptible(next_batch)) is not None:   # only this call raises Stopped
            update(batch)

    except Stopped:      save; then call `signals.take_effect()` for the default reaction to the signal
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """A signal arrived. Not a subclass of Exception, so that error handlers do not catch it."""


class StopSignals:
    """Context manager that delays SIGINT and SIGTERM; it does nothing outside the main thread.

    A second signal takes effect immediately.
    """

    def __init__(self) -> None:
        self._old_handlers: dict[int, Any] = {}
        self._received: int | None = None
        self._interruptible = False

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # Ignored, as in a script's `command &`, or not set by Python: keep it.
            if handler in (signal.SIG_IGN, None):
                continue
            try:
                signal.signal(number, self._receive)
            except ValueError:  # not the main thread; only that one receives signals
                return self
            self._old_handlers[number] = handler
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}

    @property
    def received(self) -> bool:
        """Whether a signal has arrived."""
        return self._received is not None

    def interruptible(self, work: Callable[[], T], enabled: bool = True) -> T:
        """The result of `work()`. If `enabled`, raises Stopped as soon as a signal arrives, or arrived before."""
        if not enabled:
            return work()
        self._interruptible = True
        try:
            if self._received is not None:
                raise Stopped
            return work()
        finally:
            self._interruptible = False

    def take_effect(self) -> None:
        """Restore the old handlers and raise the received signal again: usually it ends the process."""
        self.__exit__()
        if self._received is not None:
            signal.raise_signal(self._received)

    def _receive(self, number: int, _: FrameType | None) -> None:
        second = self._received is not None
        self._received = number
        if second:
            self.take_effect()
        elif self._interruptible:
            raise Stopped
