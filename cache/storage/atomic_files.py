"""Files that appear under their name whole or not at all, and are still there after a power cut.

A file is written beside its place as `<name>.<host>-<pid>-<start>-<random>.partial`, flushed, renamed, and its folder
flushed: without the first flush a rename can survive a power cut that the bytes did not, without the second the rename
itself is lost. The random digits keep apart two threads that write the same file; the host, the process id and the time
at which that process started tell a later run whether the writer is still alive.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c

from regionspot.cache.process import has_ended, process_place, this_process

# No dots or dashes, so that the end of a partial file's name can be taken apart again. Machines and containers may
# share a host's name; where one's process ids mean nothing to another, the mark behind it differs.
_HOST = re.sub(r"\W", "_", f"{socket.gethostname()}_{google_crc32c.value(repr(process_place()).encode()):08x}")
# Earlier versions wrote neither the start nor the random digits; their leftovers are still removed.
_PARTIAL = re.compile(r"\.(?P<host>\w+)-(?P<pid>\d+)(-(?P<start>\d+)-[0-9a-f]{8})?\.partial$")
# crc32c of any bytes with their own crc32c behind them, whatever they are: it follows from how a CRC is made.
_RESIDUE = 0x48674BC7
# Bytes after which the disk is told to begin: it then writes while the next ones are computed, and the flush at the end
# has little left to wait for: 270 MB at 1.6 GB/s instead of 1.2 (a raw file 1.4), medians of five rounds.
_WRITE_BEHIND = 8 << 20
_ABANDONED_SECONDS = 86_400  # a day without a write: no part takes that long, on any machine


class DurableFile:
    """A file being written. `finish` puts its bytes on disk, `publish` gives it its name, `discard` gives it up."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.partial = partial_path(final)
        self._fd = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._written = self._begun = 0

    def write(self, data: Any) -> None:
        """Append the bytes of any contiguous buffer. A write may take only a part of them, so it is asked again."""
        left = memoryview(data).cast("B")
        self._written += len(left)
        while left:
            left = left[os.write(self._fd, left) :]
        if self._written - self._begun >= _WRITE_BEHIND:
            self._write_behind()

    def _write_behind(self) -> None:
        """Have the system begin to write what it holds of the file, without waiting for it."""
        if sys.platform == "linux":
            # Elsewhere it may drop pages; Linux keeps those that are not on disk yet, and begins to write them.
            os.posix_fadvise(self._fd, self._begun, self._written - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = self._written

    def finish(self) -> None:
        os.fsync(self._fd)
        self._close()

    def publish(self) -> None:
        os.replace(self.partial, self.final)
        sync_folder(self.final.parent)

    def discard(self) -> None:
        """Remove what was written so far; does nothing once the file is published.

        Where the disk refuses that as well, the file stays and counts as abandoned later: why it is given up must
        not be lost over it.
        """
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self.partial.unlink(missing_ok=True)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1  # first: closed it is also where closing says that something went wrong
        if fd >= 0:
            os.close(fd)


def write_file(final: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    file = DurableFile(final)
    try:
        file.write(data)
        file.finish()
        file.publish()
    except BaseException:
        file.discard()
        raise


IMAGES_KEY = "pictures"  # what JSON files call a number of images, since the first cache


def rename_key(document: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same document, in the same order, with one key renamed where it is there."""
    return {new if key == old else key: value for key, value in document.items()}


def to_json(document: dict[str, Any]) -> bytes:
    """The document as people read it, in one stable form: equal documents give equal bytes."""
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def from_json(data: bytes) -> Any:
    """The document in a file that may hold anything. Raises ValueError where it is none."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("is nested without end") from None


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the crc32c of its own content in it."""
    return {**document, "crc32c": _content_crc(document)}


def is_sealed(document: Any) -> bool:
    """Whether a document still is what `seal` made of it."""
    try:
        return isinstance(document, dict) and document.get("crc32c") == _content_crc(document)
    except ValueError:  # half a surrogate, an infinity: damage may turn a document into one that cannot be written
        return False


def file_crc(data: bytes) -> int:
    """crc32c of a file that tells it from every other one; of a file that ends with its own, what stands before that.

    Zarr's crc32c codec writes such files. Taken over all of them it would be one and the same number, and a chunk in
    the place of another would not be noticed.
    """
    crc = int(google_crc32c.value(data))
    return int(google_crc32c.value(data[:-4])) if crc == _RESIDUE else crc


def _content_crc(document: dict[str, Any]) -> int:
    content = {key: value for key, value in document.items() if key != "crc32c"}
    return int(google_crc32c.value(to_json(content)))


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, for what other libraries wrote without flushing."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync_folder(Path(root, name))  # the same call: a file's descriptor flushes the file
        sync_folder(Path(root))


def partial_path(final: Path) -> Path:
    """A new name, beside `final`, for what this process writes before it becomes `final`."""
    writer = this_process()
    return final.with_name(f"{final.name}.{_HOST}-{writer.pid}-{writer.started}-{secrets.token_hex(4)}.partial")


def is_partial(name: str) -> bool:
    """Whether a file of this name is one that some process is writing, or was when it died."""
    return _PARTIAL.search(name) is not None


def remove_abandoned(folder: Path, prefix: str = "") -> None:
    """Remove partial files and folders under `folder`, not below it, whose writer is gone; leave those of living ones.

    A writer of this machine is looked up by its process id and start. One of another machine, or from before this one
    was restarted, cannot be, so what it left counts as abandoned only after a day without a change, by the clock of
    the file system: machines' own clocks may be days apart.
    """
    unknown = []
    for path in folder.glob(f"{prefix}*.partial"):
        name = _PARTIAL.search(path.name)
        if name is None:
            continue  # not ours
        start = int(name["start"] or 0)
        if name["host"] == _HOST and has_ended(int(name["pid"]), start):
            _remove(path)
        elif name["host"] != _HOST or not start:
            unknown.append(path)
    if unknown and (now := _file_system_time(folder)) is not None:
        for path in unknown:
            with suppress(FileNotFoundError):  # renamed or removed meanwhile
                if now - path.stat().st_mtime > _ABANDONED_SECONDS:
                    _remove(path)


def _remove(path: Path) -> None:
    # Another run may be removing the same one just now; what stays is removed by the next.
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _file_system_time(folder: Path) -> float | None:
    """The modification time that a file written now gets; None where nothing can be written."""
    try:
        probe = DurableFile(folder / "clock")
    except OSError:
        return None
    try:
        probe.write(b".")
        return probe.partial.stat().st_mtime
    except OSError:
        return None
    finally:
        probe.discard()
