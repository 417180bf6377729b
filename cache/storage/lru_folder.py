"""A folder of copies of remote files with a size limit; the least recently used file is evicted first.

Threads, processes and machines may share it. One of them downloads a file into `<name>.partial` and holds a lock on it
(POSIX record locks: they end with a killed process, and forked children do not inherit them); others wait. A partial
file has its full length from the start, so it counts towards the limit; if its writer is killed, the next one truncates
and rewrites it.

    .room      lock file for evicting and renaming; holds the total size of all files, recounted at every eviction
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from regionspot.cache.errors import CacheError, InputError

log = logging.getLogger(__name__)

_PARTIAL, _TOTAL = ".partial", ".room"
_COPY_NAME = re.compile(r"@[0-9a-f]{16}~?(\.partial)?$")
_POLL_SECONDS = 0.1  # while running downloads take all of the space

# Record locks exclude other processes, not threads. This holds the paths that threads of this process have locked.
_changed = threading.Condition()
_locked: set[Path] = set()


def _after_fork() -> None:
    global _changed, _locked
    _changed, _locked = threading.Condition(), set()  # the parent's threads do not exist here


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class _Copy:
    path: Path
    size: int
    last_used: float


class LruFolder:
    """A size-limited folder of copies named `<cache>/<path in the cache>@<16 hex digits>`; a copy never changes.

    Other files in the folder are neither counted nor touched.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        # Resolved, so that a file has one path in this process: see _remove_abandoned.
        self.folder, self.limit = folder.resolve(), limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked_total():
                pass
        except OSError as error:
            raise InputError(f"{folder}: cannot hold a local copy: {error.strerror}; give a writable folder") from None

    def find(self, name: str) -> Path | None:
        """Path of a copy, marked as used now; None if it does not exist."""
        path = self.folder / name
        try:
            # Set explicitly: the mount may be noatime. Keep mtime, by which readers detect a replaced file.
            os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
        except FileNotFoundError:
            return None
        except PermissionError:
            log.debug("%s: belongs to another user; access time not updated", path)
        return path

    def fetch(self, name: str, size: int, write: Callable[[int], None], is_part: bool) -> Path:
        """Path of a copy, which `write` downloads into an open descriptor if it does not exist.

        is_part   whether it belongs to features: it is flushed to disk, and others are evicted for it. Other files are
                  small and carry their own checksum; the next part makes space for them

        Raises CacheError if it is larger than the limit, OSError from the disk, and whatever `write` raises; it leaves
        no partial file then.
        """
        if is_part and size > self.limit:
            raise CacheError(
                f"{self.folder}: a limit of {self.limit:,} bytes is less than one part, the {size:,} of "
                f"{name.partition('@')[0]}; raise the limit to many parts, or read without a local copy"
            )
        final = self.folder / name
        if (path := self.find(name)) is not None:
            return path
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked_file(final.with_name(final.name + _PARTIAL)) as (fd, partial):
            if (path := self.find(name)) is not None:  # downloaded by another process while this one waited
                partial.unlink()
                return path
            try:
                self._reserve(fd, size, is_part)
                write(fd)
                if is_part:
                    os.fsync(fd)
                with self._locked_total():  # else a concurrent count could miss it under both names
                    os.replace(partial, final)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return final

    def _reserve(self, fd: int, size: int, is_part: bool) -> None:
        os.ftruncate(fd, 0)  # drop what a killed writer left
        while True:
            with self._locked_total() as total_fd:
                total = _read_total(total_fd)
                if is_part and total + size > self.limit:
                    total = self._evict(size)
                if not is_part or total + size <= self.limit:
                    os.ftruncate(fd, size)
                    _write_total(total_fd, total + size)
                    return
            time.sleep(_POLL_SECONDS)  # running downloads take all of the space

    def _evict(self, size: int) -> int:
        """Remove the least recently used copies until `size` fits; the total size of the remaining ones."""
        copies = [copy for copy in _files_under(self.folder) if _COPY_NAME.search(copy.path.name)]
        total = sum(copy.size for copy in copies)
        # Features first: other files are small, and a cache cannot be opened without them.
        for copy in sorted(copies, key=lambda copy: (not self._is_feature(copy.path), copy.last_used)):
            if total + size <= self.limit:
                break
            if copy.path.name.endswith(_PARTIAL) and not _remove_abandoned(copy.path):
                continue
            copy.path.unlink(missing_ok=True)
            total -= copy.size
        return total

    def _is_feature(self, path: Path) -> bool:
        return path.relative_to(self.folder).parts[1:2] == ("features",)

    @contextlib.contextmanager
    def _locked_total(self) -> Iterator[int]:
        with _locked_file(self.folder / _TOTAL) as (fd, _):
            yield fd


def _files_under(folder: Path) -> Iterator[_Copy]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_under(Path(entry.path))
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed or removed just now
                status = entry.stat(follow_symlinks=False)
                yield _Copy(Path(entry.path), status.st_size, status.st_atime)


def _read_total(fd: int) -> int:
    try:
        return int(os.pread(fd, 32, 0) or 0)
    except ValueError:
        return sys.maxsize  # damaged: forces a recount


def _write_total(fd: int, total: int) -> None:
    os.pwrite(fd, f"{total:020d}".encode(), 0)


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[tuple[int, Path]]:
    """Open a file, created if needed, with a lock against other threads, processes and machines."""
    with _changed:
        while path in _locked:
            _changed.wait()
        _locked.add(path)
    try:
        fd = _open_locked(path)
        try:
            yield fd, path
        finally:
            os.close(fd)  # releases the lock
    finally:
        with _changed:
            _locked.discard(path)
            _changed.notify_all()


def _open_locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the previous holder renamed or removed it


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(partial: Path) -> bool:
    """Remove a partial file if its writer was killed; False if it is being written."""
    with _changed:
        if partial in _locked:  # closing it would release this process's own lock
            return False
        try:
            fd = os.open(partial, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        finally:
            os.close(fd)
    return True
