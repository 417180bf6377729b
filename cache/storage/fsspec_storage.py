"""Storage at any URL that fsspec supports: sftp://, smb://, hf://, memory://, ...

fsspec caches one file system per thread and process, so it is looked up at every use. A file appears when it is
published, by fsspec's transactions; URL schemes without transactions are read-only.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from regionspot.cache.errors import InputError
from regionspot.cache.storage.base import NewFile
from regionspot.cache.storage.remote import ClassifiedError, RemoteStorage, Version

T = TypeVar("T")

# Keys under which file systems report an ETag or modification time; the first one present is used.
_ETAG_KEYS = ("ETag", "etag", "e_tag", "md5Hash", "crc32c", "oid", "mtime", "LastModified", "last_modified", "created")


class FsspecStorage(RemoteStorage):
    """A folder of an fsspec file system."""

    readers = 8  # more rarely helps on file systems that are not object stores

    def __init__(self, address: str, retry_seconds: float) -> None:
        super().__init__(address, retry_seconds)
        _require_supported(address)

    def version(self, name: str) -> Version:
        info = self._request(name, lambda fs, path: _uncached(fs, path).info(path))
        if info["type"] != "file" and name:
            raise FileNotFoundError(errno.ENOENT, "is a folder", f"{self.address}/{name}")
        return _version(info)

    def list_versions(self, folder: str) -> dict[str, Version | None]:
        try:
            entries = self._request(folder, lambda fs, path: _uncached(fs, path).ls(path, detail=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: _version(entry) for entry in entries if entry["type"] == "file"}

    def read(self, name: str) -> bytes:
        return bytes(self._request(name, lambda fs, path: fs.cat_file(path)))

    def read_range(self, name: str, start: int, stop: int, version: Version | None = None) -> Any:
        return self._request(name, lambda fs, path: fs.cat_file(path, start=start, end=stop))

    def download(self, name: str, version: Version, fd: int) -> None:
        super().download(name, version, fd)
        if self.version(name) != version:  # fsspec has no conditional range requests, so check afterwards
            raise OSError(errno.ESTALE, "was replaced while it was being read", f"{self.address}/{name}")

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
        """As Storage.write_new. Not atomic on file systems without exclusive creation: they are checked first."""
        try:
            self._request(name, lambda fs, path: _create(fs, path, data))
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._request(name, lambda fs, path: fs.rm_file(path))

    def zarr_library_store(self, read_only: bool) -> Any:
        from zarr.storage import FsspecStore  # importing zarr takes a second

        return FsspecStore.from_url(self.address, read_only=read_only)

    def once(self, name: str, request: Callable[[Any, str], T]) -> T:
        """The result of `request(file system, path of the file)`, without retries; errors become OSErrors."""
        try:
            return request(*self._locate(name))
        except Exception as error:
            raise self._classify(name, error).error from error

    def _request(self, name: str, request: Callable[[Any, str], T]) -> T:
        return self.with_retries(name, lambda: request(*self._locate(name)))

    def _locate(self, name: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # imported on demand: an optional dependency

        fs, root = url_to_fs(self.address)
        return fs, f"{root}/{name}" if name else root

    def _classify(self, name: str, error: Exception) -> ClassifiedError:
        where, kind = f"{self.address}/{name}", type(error).__name__
        retryable = isinstance(error, TimeoutError | ConnectionError) or "Connection" in kind or "Timeout" in kind
        message = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0][:200] or kind
        code = errno.EIO
        for error_class, class_code, class_message in (
            (FileNotFoundError, errno.ENOENT, "no such file"),
            (FileExistsError, errno.EEXIST, "exists already"),
            (PermissionError, errno.EACCES, "access is refused"),
            (NotImplementedError, errno.ENOTSUP, "this URL scheme is read-only"),
        ):
            if isinstance(error, error_class):
                code, message = class_code, class_message
        return ClassifiedError(OSError(code, message, where), retryable)


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
            with contextlib.suppress(Exception):  # an uncommitted file does not appear anyway
                self._file.discard()
            self._file = None


def _begin(fs: Any, path: str) -> Any:
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    if fs.protocol == "memory":  # its `open` shows the file at once, MemoryFile only on commit
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
    except (NotImplementedError, ValueError):  # no exclusive creation
        if fs.exists(path):
            raise FileExistsError from None
        fs.pipe_file(path, data)


def _uncached(fs: Any, path: str) -> Any:
    """The file system without its cached listing of the folder, because other processes write there."""
    fs.invalidate_cache(path)
    fs.invalidate_cache(path.rpartition("/")[0])
    return fs


def _version(info: dict[str, Any]) -> Version:
    etag = next((info[key] for key in _ETAG_KEYS if info.get(key) is not None), "")
    return Version(info["size"] or 0, str(etag.timestamp() if isinstance(etag, datetime) else etag))


def _require_supported(address: str) -> None:
    """Raises InputError if no installed library supports this URL scheme."""
    import fsspec  # imported on demand: an optional dependency

    scheme = address.partition("://")[0].partition("::")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise InputError(
            f"{address}: no installed library supports {scheme}://; give a folder, s3://, gs://, az:// or an fsspec URL"
        ) from None
    except ImportError as error:
        raise InputError(f"{address}: {error!s:.200}") from None
