"""Progress lines: content, and output on a terminal and in a log."""

import logging
import os
import pty
import subprocess
import sys

import pytest

from regionspot.cache.progress import Progress


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_time_left_follows_recent_throughput_and_not_a_slow_start(clock):
    progress = Progress(10_000, "images", clock=clock)
    for _ in range(100):  # 10 s each: libraries load, the page cache is cold
        clock.now += 10
        progress.step()
    for _ in range(400):  # 1 s each, for longer than the window
        clock.now += 1
        progress.step()
    assert progress.rate == pytest.approx(1.0, rel=0.03)
    assert progress.done / progress.seconds < 0.4
    assert "500/10,000 images  1/s  2h 3" in progress.line()


def test_bursts_of_images_after_slow_batches_give_the_rate_of_the_batches(clock):
    progress = Progress(1000, "images", clock=clock)
    for _ in range(10):
        clock.now += 100
        for _ in range(8):
            progress.step()
    assert progress.rate == pytest.approx(0.08, rel=0.05)


def test_the_window_stays_small(clock):
    progress = Progress(10**6, "images", clock=clock)
    for _ in range(50_000):
        clock.now += 0.02
        progress.step()
    assert len(progress._window) < 150
    assert progress.rate == pytest.approx(50, rel=0.02)


def test_a_line_is_logged_every_interval_and_at_the_end(clock, caplog):
    caplog.set_level(logging.INFO, "regionspot")
    progress = Progress(40, "images", detail=lambda: "0.2 GB written", clock=clock)
    for _ in range(40):
        with progress.timed("encode"):
            clock.now += 0.9
        with progress.timed("write"):
            clock.now += 0.1
        progress.step()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 8
    assert lines[0] == "5/40 images  1/s  0.2 GB written  35s left  (encode 90%, write 10%)"
    assert lines[-1].startswith("40/40 images  1/s  0.2 GB written  0s left")


_JOB = """
import logging, sys
from regionspot.cache.progress import Progress, log_to
log_to(sys.stderr)
progress = Progress(5, "parts", interval=0.0)
for number in range(4):
    progress.step()
    if number == 1:
        logging.getLogger("regionspot").warning("an image is broken")
logging.shutdown()
print("regionspot: stopped", file=sys.stderr)
"""


def test_a_terminal_line_is_overwritten_and_messages_appear_above_it():
    reader, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", _JOB], stderr=terminal, check=True, env={**os.environ, "COLUMNS": "60"})
    os.close(terminal)
    shown = os.read(reader, 65536).decode().replace("\r\n", "\n")
    os.close(reader)
    assert shown.count("\n") == 3
    assert "\r\x1b[Kan image is broken\n3/5 parts" in shown
    assert shown.count("\r\x1b[K") == 3
    assert shown.endswith("left\nregionspot: stopped\n")


def test_a_log_gets_one_line_after_another():
    output = subprocess.run([sys.executable, "-c", _JOB], capture_output=True, text=True, check=True).stderr
    assert "\r" not in output
    assert [line.split()[0] for line in output.splitlines()] == ["1/5", "2/5", "an", "3/5", "4/5", "regionspot:"]
