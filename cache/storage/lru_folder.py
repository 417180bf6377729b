"""A folder of copies of files that lie elsewhere, of a size that is not passed: the least recently used goes first.

Threads, processes and machines may share it. A file is fetched by one of them, into `<name>.partial`, which it holds
locked meanwhile (POSIX record locks: they end with a killed process, and no forked child inherits them); whoever else
wants it waits. A partial file has its full length from the start, so that what is being fetched counts, and is cut and
written again by the next one where its writer was killed.

    .room      locked while room is made or a name given; holds the bytes of all files, counted anew whenever some
               have to go
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

_PARTIAL, _ROOM = ".partial", ".room"
_OURS = re.compile(r"@[0-9a-f]{16}~?(\.partial)?$")
_LOOK_AGAIN = 0.1  # seconds between two looks whether a running download has left room

# Record locks keep processes apart, not threads. What threads of this process have locked stands here.
_changed = threading.Condition()
_locked: set[Path] = set()


def _after_fork() -> None:
    global _changed, _locked
    _changed, _locked = threading.Condition(), set()  # of the parent's threads none came along


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class _Kept:
    path: Path
    size: int
    used: float


class LruFolder:
    """Names are `<cache>/<path in the cache>@<16 hex digits>`; each stands for one content for ever.

    Whatever else lies in the folder is not counted and never touched.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        # Resolved, so that a file has one path in this process, whoever opened the folder: see _remove_abandoned.
        self.folder, self.limit = folder.resolve(), limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._room():
                pass
        except OSError as error:
            raise InputError(
                f"{folder}: cannot hold a local copy: {error.strerror}; give a folder where you may write"
            ) from None

    def find(self, name: str) -> Path | None:
        """The file, if it is there; it counts as used now."""
        path = self.folder / name
        try:
            # Set by us, for a mount may be told not to; the other time tells readers one file from the next.
            os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
        except FileNotFoundError:
            return None
        except PermissionError:
            log.debug("%s: is another user's, so it keeps its time", path)
        return path

    def fetch(self, name: str, size: int, write: Callable[[int], None], is_part: bool) -> Path:
        """The file, which `write` puts into an open descriptor if it is not there.

        is_part   of features: flushed to the disk, and others go for it where the folder is full. What is none is
                  little and carries a checksum of its own; room for it is made with the next part

        Raises CacheError where it is larger than all of the folder may be, OSError for what the disk refuses, and
        whatever `write` raises. Nothing of it is left then.
        """
        if is_part and size > self.limit:
            asked = name.partition("@")[0]
            raise CacheError(
                f"{self.folder}: a limit of {self.limit:,} bytes is less than one part, the {size:,} of {asked}; "
                "allow many times as much, or read without a local copy"
            )
        final = self.folder / name
        found = self.find(name)
        if found is not None:
            return found
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked_file(final.with_name(final.name + _PARTIAL)) as (fd, partial):
            found = self.find(name)  # another one may have fetched it while we waited
            if found is not None:
                partial.unlink()
                return found
            try:
                self._take_room(fd, size, is_part)
                write(fd)
                if is_part:
                    os.fsync(fd)
                with self._room():  # or files being counted might be missed under both their names
                    os.replace(partial, final)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return final

    def _take_room(self, fd: int, size: int, is_part: bool) -> None:
        os.ftruncate(fd, 0)  # what a killed writer had left of it
        while True:
            with self._room() as room:
                total = _read_total(room)
                if is_part and total + size > self.limit:
                    total = self._evict(size)
                if not is_part or total + size <= self.limit:
                    os.ftruncate(fd, size)
                    _write_total(room, total + size)
                    return
            time.sleep(_LOOK_AGAIN)  # all the room is taken by running downloads

    def _evict(self, size: int) -> int:
        """Remove what was used longest ago until `size` fits or nothing is left to remove; the bytes that stay."""
        kept = [each for each in _files_under(self.folder) if _OURS.search(each.path.name)]
        total = sum(each.size for each in kept)
        # What is no part of features goes last: it is little, and a cache cannot be opened without it.
        for each in sorted(kept, key=lambda each: (self._folder_in_cache(each.path) != ("features",), each.used)):
            if total + size <= self.limit:
                break
            if each.path.name.endswith(_PARTIAL) and not _remove_abandoned(each.path):
                continue
            each.path.unlink(missing_ok=True)
            total -= each.size
        return total

    def _folder_in_cache(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.folder).parts[1:2]

    @contextlib.contextmanager
    def _room(self) -> Iterator[int]:
        with _locked_file(self.folder / _ROOM) as (fd, _):
            yield fd


def _files_under(folder: Path) -> Iterator[_Kept]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_under(Path(entry.path))
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed or removed just now
                status = entry.stat(follow_symlinks=False)
                yield _Kept(Path(entry.path), status.st_size, status.st_atime)


def _read_total(fd: int) -> int:
    try:
        return int(os.pread(fd, 32, 0) or 0)
    except ValueError:
        return sys.maxsize  # not as we wrote it: have the files counted


def _write_total(fd: int, total: int) -> None:
    os.pwrite(fd, f"{total:020d}".encode(), 0)


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[tuple[int, Path]]:
    """Descriptor of a file that no other thread, process or machine holds locked meanwhile; made where it is not."""
    with _changed:
        while path in _locked:
            _changed.wait()
        _locked.add(path)
    try:
        fd = _open_locked(path)
        try:
            yield fd, path
        finally:
            os.close(fd)  # ends the lock
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
        os.close(fd)  # renamed or removed by the one who had it before


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(partial: Path) -> bool:
    """Remove a partial file whose writer was killed; whether it was one."""
    with _changed:
        if partial in _locked:  # opening and closing it would end the lock of our own thread
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
