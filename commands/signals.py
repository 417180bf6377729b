"""Ctrl-C and SIGTERM end a command with one line that says how to resume, and the exit code that shells expect."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

AGAIN = "run the same command again to resume"

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

_received: signal.Signals | None = None
_advice = ""


def on_stop(advice: str) -> None:
    """Set the message for a signal that stops the command from here on, such as how to resume it."""
    global _advice
    _advice = advice


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside the block, SIGINT and SIGTERM raise KeyboardInterrupt, so both run the same clean-up."""
    global _received, _advice
    _received, _advice = None, ""
    before = {number: signal.getsignal(number) for number in _NAMES}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # ignored for a script's `command &`, which Ctrl-C must not stop
            with suppress(ValueError):  # not the main thread, which alone can set handlers
                signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(ValueError):
                # After one signal, a second one kills the process at once, without a traceback of its threads.
                signal.signal(number, signal.SIG_DFL if _received and handler is not signal.SIG_IGN else handler)


def stop_line() -> tuple[str, int] | None:
    """The last line and the exit code (128 + signal number) if a signal was received."""
    if _received is None:
        return None
    return f"stopped by {_NAMES[_received]}{f'; {_advice}' if _advice else ''}", 128 + _received


def raise_if_stopped() -> None:
    """Raise KeyboardInterrupt if a signal was received: typer returns an exit code instead."""
    if _received is not None:
        raise KeyboardInterrupt


def _interrupt(number: int, _: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
    raise KeyboardInterrupt(_received.name)
