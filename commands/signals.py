"""Ctrl-C and SIGTERM end a command with one line that says how to resume, and the exit code that shells expect."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

AGAIN = "run the same command again to resume"

_WORDS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

_received: signal.Signals | None = None
_advice = ""


def on_stop(advice: str) -> None:
    """What the user can do when a signal stops the command from here on, such as how to resume it."""
    global _advice
    _advice = advice


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise KeyboardInterrupt, so that both end a command by the same clean-up."""
    global _received, _advice
    _received, _advice = None, ""
    before = {each: signal.getsignal(each) for each in _WORDS}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:  # as in a script's `command &`, which Ctrl-C must not reach
            with suppress(ValueError):  # not the main thread, where no handler can be set
                signal.signal(each, _interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            with suppress(ValueError):
                # After a signal has been answered, one more ends the process at once, without a traceback of whatever
                # Python is still waiting for.
                signal.signal(each, signal.SIG_DFL if _received and handler is not signal.SIG_IGN else handler)


def stop_line() -> tuple[str, int] | None:
    """What there is to say when a signal has come, and the exit code (128 and the signal's number); else None."""
    if _received is None:
        return None
    return f"stopped by {_WORDS[_received]}{f'; {_advice}' if _advice else ''}", 128 + _received


def _interrupt(number: int, _: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
    raise KeyboardInterrupt(_received.name)
