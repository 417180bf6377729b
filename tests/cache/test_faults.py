"""Disks that fill up, fail, write partially, vanish or turn read-only during a run, and clocks that jump.

A run with a fault succeeds or ends with a one-line error. In both cases the committed parts verify, and the same run
without the fault completes the cache byte-identically.

Faults are injected into system calls, starting at a random image. A really full disk is used where this machine can
mount one.
"""

import errno
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from makers import error_in_fork

from regionspot.cache import CacheError
from regionspot.cache.storage.local import LocalStorage
from regionspot.cache.tools.verify import verify

NOBODY = 65534


class Armed:
    """Counts images and calls; `due()` tells whether the fault strikes, from one call on or at one call only."""

    def __init__(self, rng, lasting):
        self.images, self.calls, self.lasting = rng.randrange(10), rng.randrange(8), lasting

    def at_image(self):
        self.images -= 1

    def due(self):
        if self.images >= 0:
            return False
        self.calls -= 1
        return self.calls < 0 if self.lasting else self.calls == -1


def failing(target, names, number, armed):
    """Make these functions of a module or class fail with this error when the fault is due."""
    for name in names:
        real = getattr(target, name)

        def instead(*args, _real=real, **kwargs):
            if armed.due():
                raise OSError(number, os.strerror(number), "somewhere")
            return _real(*args, **kwargs)

        setattr(target, name, instead)


def disk_full(path, rng, armed):
    real = os.write

    def write(fd, data):
        if not armed.due():
            return real(fd, data)
        if len(data) > 1 and rng.random() < 0.5:
            return real(fd, bytes(data)[: len(data) // 2])  # the bytes that fit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.write = write


def short_writes(path, rng, armed):
    real = os.write
    os.write = lambda fd, data: real(fd, bytes(data)[: rng.randrange(1, 100)])


def permission_lost(path, rng, armed):
    real = os.open

    def open_as_nobody(*args, **kwargs):
        if armed.due() and os.geteuid() == 0:
            os.seteuid(NOBODY)
        elif armed.due():
            for folder in (path, *path.rglob("*")):
                folder.chmod(0o500 if folder.is_dir() else 0o400)
        return real(*args, **kwargs)

    os.open = open_as_nobody


def clock_goes_back(path, rng, armed):
    real, moved = time.time, [0.0]

    def jumping():
        moved[0] -= rng.choice((0, 1, 3600, 400 * 86_400))
        return real() + moved[0]

    time.time = jumping
    for file in path.rglob("*"):
        os.utime(file, (real() + rng.choice((-1, 1)) * 40 * 86_400,) * 2)


def folder_removed(path, rng, armed):
    real = os.fsync

    def fsync(fd):
        if armed.due():
            shutil.rmtree(path, ignore_errors=True)
        return real(fd)

    os.fsync = fsync


def folder_moved_away(path, rng, armed):
    real = os.fsync

    def fsync(fd):
        if armed.due():
            path.rename(f"{path}.away")
        return real(fd)

    os.fsync = fsync


def left_by_another_host(path, rng, armed):
    for name in ("features/clip/feature_map/c.1.0.0", "parts/clip/00001.json", "zarr.json"):
        left = path / f"{name}.otherhost-{os.getpid()}.partial"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"half")
        os.utime(left, (time.time() - 2 * 86_400,) * 2)  # old enough for the next run to remove it


def os_failing(number, *names):
    return lambda path, rng, armed: failing(os, names, number, armed)


FAULTS = {
    "disk full": (disk_full, True),
    "quota exceeded": (os_failing(errno.EDQUOT, "write"), True),
    "short writes": (short_writes, True),
    "EIO on write": (os_failing(errno.EIO, "write"), False),
    "EIO on fsync": (os_failing(errno.EIO, "fsync"), False),
    "EIO on close": (os_failing(errno.EIO, "close"), False),
    "EIO on read": (lambda path, rng, armed: failing(LocalStorage, ("read", "list_files"), errno.EIO, armed), False),
    "permission lost": (permission_lost, True),
    "clock going back": (clock_goes_back, True),
    "folder removed": (folder_removed, False),
    "folder moved away and back": (folder_moved_away, False),
    "partial files of another host": (left_by_another_host, True),
    "rename failing": (os_failing(errno.ESTALE, "replace"), False),
    "link failing": (os_failing(errno.EIO, "link"), True),
    "read-only remount": (os_failing(errno.EROFS, "open", "replace", "link", "unlink", "mkdir"), True),
    "too many open files": (os_failing(errno.EMFILE, "open"), True),
}
GOES_THROUGH = {"short writes", "clock going back", "partial files of another host"}


def error_of(run):
    """The error message of a run in another process; "" if it succeeded."""
    error = error_in_fork(run)
    assert error is None or isinstance(error, CacheError), "the run ended with something else than one clear line"
    return str(error or "")


def require_safe(small, small_folder, path, message):
    """Check that committed parts are sound and that the resumed run gives the right bytes."""
    assert "\n" not in message
    if path.exists():
        report = verify(path)
        assert report.sound, report.text()
    small.extract(path)
    assert small.content(path) == small.content(small_folder / "full")


def stress(small, small_folder, tmp_path, name, seed, runs):
    counts, (fault, lasting) = Counter(), FAULTS[name]
    for number in range(runs):
        rng = random.Random(f"{name} {seed} {number}")
        path = shutil.copytree(small_folder / "empty", tmp_path / f"{number}.zarr")

        def run(path=path, rng=rng):
            armed, real_write = Armed(rng, lasting), os.write
            fault(path, rng, armed)
            try:
                small.extract(path, armed.at_image)
            finally:
                os.write = real_write  # for the run's message

        message = error_of(run)
        if Path(f"{path}.away").exists():
            shutil.rmtree(path, ignore_errors=True)
            Path(f"{path}.away").rename(path)
        restore_permission(path)
        if not (path / "zarr.json").exists():
            shutil.rmtree(path, ignore_errors=True)  # may be incomplete: a run was writing into it
        require_safe(small, small_folder, path, message)
        counts["refused" if message else "went through"] += 1
    return counts


def restore_permission(path):
    for entry in (path, *path.rglob("*")) if path.exists() else ():
        entry.chmod(0o755 if entry.is_dir() else 0o644)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_loses_nothing(small, small_folder, tmp_path, name):
    counts = stress(small, small_folder, tmp_path, name, 0, 1)
    assert counts["refused"] == 0 or name not in GOES_THROUGH


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_loses_nothing_in_full(small, small_folder, tmp_path, name, stress_result):
    started = time.monotonic()
    counts = stress(small, small_folder, tmp_path, name, 1, 20)
    assert bool(counts["refused"]) != (name in GOES_THROUGH), "the fault never struck"
    stress_result(fault=name, seeds=[1], seconds=time.monotonic() - started, runs=20, lost=0, **counts)


@pytest.fixture
def disk(tmp_path):
    """A small mounted disk, if this machine allows it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine lets us mount no disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def resize(disk, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def test_a_full_disk_loses_nothing(small, small_folder, disk):
    for free_pages in (4, 16, 24, 40):
        resize(disk, "16m")
        path = shutil.copytree(small_folder / "empty", disk / f"{free_pages}.zarr")
        now = os.statvfs(disk)
        resize(disk, (now.f_blocks - now.f_bfree + free_pages) * now.f_frsize)
        message = error_of(lambda path=path: small.extract(path))
        assert "No space left on device" in message
        resize(disk, "16m")
        require_safe(small, small_folder, path, message)
