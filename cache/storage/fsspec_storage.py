"""A cache behind any URL that fsspec knows: sftp://, smb://, hf://, memory://, whatever package adds more of them.

fsspec makes one file system a thread and process and keeps it, so it is asked for one at every use. A file that is
written appears when it is published, by fsspec's own transactions; kinds of URL without them can only be read.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from regionspot.cache.errors import InputError
from regionspot.cache.storage.base import NewFile
from regionspot.cache.storage.remote import RemoteStorage, Trouble, Version

T = TypeVar("T")

# What the file systems call their mark of a content; the first that is there counts.
_MARKS = ("ETag", "etag", "e_tag", "md5Hash", "crc32c", "oid", "mtime", "LastModified", "last_modified", "created")


class FsspecStorage(RemoteStorage):
    """A folder of a file system of fsspec."""

    readers = 8  # file systems that are not object stores seldom gain from more

    def __init__(self, address: str, retry_seconds: float) -> None:
        super().__init__(address, retry_seconds)
        _require_known(address)

    def version(self, name: str) -> Version:
        found = self._ask(name, lambda fs, path: _fresh(fs, path).info(path))
        if found["type"] != "file" and name:
            raise FileNotFoundError(errno.ENOENT, "is a folder", f"{self.address}/{name}")
        return _version(found)

    def listing(self, folder: str) -> dict[str, Version | None]:
        try:
            found = self._ask(folder, lambda fs, path: _fresh(fs, path).ls(path, detail=True))
        except FileNotFoundError:
            return {}
        return {each["name"].rpartition("/")[2]: _version(each) for each in found if each["type"] == "file"}

    def read(self, name: str) -> bytes:
        return bytes(self._ask(name, lambda fs, path: fs.cat_file(path)))

    def read_range(self, name: str, start: int, stop: int, version: Version | None = None) -> Any:
        return self._ask(name, lambda fs, path: fs.cat_file(path, start=start, end=stop))

    def download(self, name: str, version: Version, fd: int) -> None:
        super().download(name, version, fd)
        if self.version(name) != version:  # no range can be asked for on condition, so it is looked at afterwards
            raise OSError(errno.ESTALE, "was replaced while it was read", f"{self.address}/{name}")

    def create(self, name: str) -> NewFile:
        return _Transaction(self, name)

    def write(self, name: str, data: bytes) -> None:
        file = self.create(name)
        try:
            file.write(data)
            file.finish()
            file.publish()
        except BaseException:
            file.discard()
            raise

    def write_new(self, name: str, data: bytes) -> bool:
        """As Storage says where the file system can create exclusively; else what lies there is looked for before."""
        try:
            self._ask(name, lambda fs, path: _create(fs, path, data))
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(name, lambda fs, path: fs.rm_file(path))

    def zarr_library_store(self, read_only: bool) -> Any:
        from zarr.storage import FsspecStore  # zarr takes a second to import

        return FsspecStore.from_url(self.address, read_only=read_only)

    def once(self, name: str, ask: Callable[[Any, str], T]) -> T:
        """What `ask(file system, path of the file there)` returns; errors become OSErrors, nothing is asked again."""
        try:
            return ask(*self._place(name))
        except Exception as error:
            raise self._trouble(name, error).error from error

    def _ask(self, name: str, ask: Callable[[Any, str], T]) -> T:
        return self.with_retries(name, lambda: ask(*self._place(name)))

    def _place(self, name: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # only caches at such a URL need it

        fs, root = url_to_fs(self.address)
        return fs, f"{root}/{name}" if name else root

    def _trouble(self, name: str, error: Exception) -> Trouble:
        where, kind = f"{self.address}/{name}", type(error).__name__
        retryable = isinstance(error, TimeoutError | ConnectionError) or "Connection" in kind or "Timeout" in kind
        told = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0][:200] or kind
        number = errno.EIO
        for known, its_number, its_words in (
            (FileNotFoundError, errno.ENOENT, "no such file"),
            (FileExistsError, errno.EEXIST, "exists already"),
            (PermissionError, errno.EACCES, "access is refused"),
            (NotImplementedError, errno.ENOTSUP, "this kind of URL can only be read"),
        ):
            if isinstance(error, known):
                number, told = its_number, its_words
        return Trouble(OSError(number, told, where), retryable)


class _Transaction:
    """A file being written that appears when it is committed."""

    def __init__(self, storage: FsspecStorage, name: str) -> None:
        self._storage, self._name = storage, name
        self._file: Any = storage.once(name, _begin)

    def write(self, data: Any) -> None:
        self._storage.once(self._name, lambda fs, path: self._file.write(memoryview(data).cast("B")))

    def finish(self) -> None:
        self._storage.once(self._name, lambda fs, path: self._file.close())

    def publish(self) -> None:
        self._storage.once(self._name, lambda fs, path: self._file.commit())
        self._file = None

    def discard(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):  # what cannot be given up is not shown either
                self._file.discard()
            self._file = None


def _begin(fs: Any, path: str) -> Any:
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    if fs.protocol == "memory":  # shows a file from its opening on, unless it is made in this way
        from fsspec.implementations.memory import MemoryFile

        return MemoryFile(fs, path)
    file = fs.open(path, "wb", autocommit=False)
    if not hasattr(file, "commit"):
        raise NotImplementedError
    return file


def _create(fs: Any, path: str, data: bytes) -> None:
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    try:
        fs.pipe_file(path, data, mode="create")
    except (NotImplementedError, ValueError):  # a file system that cannot create exclusively
        if fs.exists(path):
            raise FileExistsError from None
        fs.pipe_file(path, data)


def _fresh(fs: Any, path: str) -> Any:
    """The file system, with what it remembers of the folder forgotten: others write there, too."""
    fs.invalidate_cache(path)
    fs.invalidate_cache(path.rpartition("/")[0])
    return fs


def _version(found: dict[str, Any]) -> Version:
    mark = next((found[key] for key in _MARKS if found.get(key) is not None), "")
    return Version(found["size"] or 0, str(mark.timestamp() if isinstance(mark, datetime) else mark))


def _require_known(address: str) -> None:
    """Raises InputError where no installed library knows this kind of URL."""
    import fsspec  # only caches at such a URL need it

    scheme = address.partition("://")[0].partition("::")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise InputError(
            f"{address}: no installed library knows {scheme}://; give a folder, s3://, gs://, az:// or a URL of fsspec"
        ) from None
    except ImportError as error:
        raise InputError(f"{address}: {error!s:.200}") from None
