"""Storage in an object store, by obstore: S3 and compatible stores, Google Cloud Storage, Azure Blob Storage.

Reads are byte ranges, from any number of threads. A file is uploaded in parts while it is written and appears whole
when it is published; the parts of a killed writer never appear.

A client works only in the process that created it; a forked child creates another (obstore_fork_safety.py).
"""

from __future__ import annotations

import configparser
import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from regionspot.cache.errors import InputError
from regionspot.cache.storage.base import NewFile
from regionspot.cache.storage.obstore_errors import classify_obstore_error
from regionspot.cache.storage.obstore_fork_safety import current_obstore, keep
from regionspot.cache.storage.remote import ClassifiedError, RemoteStorage, Version

_PART_BYTES = 8 << 20  # of a multipart upload: S3 takes 5 MB to 5 GB, and 10,000 of them, so files up to 80 GB
_PARTS_AT_ONCE = 4  # so a file being written takes at most 40 MB of memory
_READ_TIMEOUT = 30.0  # seconds without a byte after which a request has failed


# If one is set, the keys do not come from Amazon's configuration files.
_AWS_KEY_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_AWS_FIELDS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}


@dataclass(frozen=True)
class _Clients:
    """Connections of one process: `once` never retries (RemoteStorage does), `retrying` retries by itself."""

    process: int
    obstore: Any
    once: Any
    retrying: Any


class ObjectStorage(RemoteStorage):
    """A prefix in a bucket."""

    def __init__(self, address: str, retry_seconds: float) -> None:
        super().__init__(address, retry_seconds)
        self._clients = self._connect()

    def version(self, name: str) -> Version:
        if not name:
            return self._version_of_root()
        return _version(self._request(name, lambda clients: clients.obstore.head(clients.once, name)))

    def _version_of_root(self) -> Version:
        if not self.list_versions(""):
            raise FileNotFoundError(errno.ENOENT, "no files at this address", self.address)
        return Version(0, "")

    def list_versions(self, folder: str) -> dict[str, Version | None]:
        entries = self._request(
            folder, lambda clients: clients.obstore.list_with_delimiter(clients.once, folder or None)["objects"]
        )
        return {entry["path"].rpartition("/")[2]: _version(entry) for entry in entries}

    def read(self, name: str) -> bytes:
        return bytes(self._request(name, lambda clients: clients.obstore.get(clients.once, name).bytes()))

    def read_range(self, name: str, start: int, stop: int, version: Version | None = None) -> Any:
        options: dict[str, Any] = {"range": (start, stop)}
        if version is not None and version.etag.startswith('"'):
            options["if_match"] = version.etag
        try:
            return self._request(name, lambda clients: clients.obstore.get(clients.once, name, options=options).bytes())
        except OSError as error:
            if error.errno == errno.ERANGE:
                return b""
            raise

    def create(self, name: str) -> NewFile:
        return _Upload(self, name)

    def write(self, name: str, data: bytes) -> None:
        self._request(name, lambda clients: clients.obstore.put(clients.once, name, data))

    def write_new(self, name: str, data: bytes) -> bool:
        """As Storage.write_new, by a conditional put (If-None-Match). A store without it is checked before the write.

        A file with the same content counts as written by this call, because the response to an earlier try may have
        been lost. So competing writers must write different content.
        """
        try:
            self._request(
                name,
                lambda clients: clients.obstore.put(clients.once, name, data, mode="create", use_multipart=False),
            )
        except FileExistsError:
            return self.read(name) == data
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            if self.exists(name):
                return self.read(name) == data
            self.write(name, data)
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._request(name, lambda clients: clients.obstore.delete(clients.once, name))

    def zarr_library_store(self, read_only: bool) -> Any:
        from zarr.storage import ObjectStore  # importing zarr takes a second

        return ObjectStore(self.clients().retrying, read_only=read_only)

    def clients(self) -> _Clients:
        """The connections of this process."""
        clients = self._clients
        if clients.process != os.getpid():
            keep(clients)
            clients = self._clients = self._connect()  # two threads may both connect; either result works
        return clients

    def _connect(self) -> _Clients:
        try:
            obstore = current_obstore()
        except ImportError:
            raise InputError(f'{self.address}: needs obstore: pip install "regionspot[remote]"') from None
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        connect: Any = from_url  # its type hints depend on the kind of store
        read_timeout = timedelta(seconds=min(_READ_TIMEOUT, max(self.retry_seconds, 1)))
        client_options = {
            "allow_http": True,  # for endpoints with http://
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": read_timeout,
            "timeout": timedelta(hours=1),  # of a whole transfer over a slow network
        }
        retrying = {
            "max_retries": 20,
            "retry_timeout": timedelta(seconds=self.retry_seconds),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
        }
        config = _aws_profile() if urlsplit(self.address).scheme in ("s3", "s3a") else {}
        try:
            stores = [
                connect(self.address, client_options=client_options, retry_config=retries, **config)
                for retries in ({"max_retries": 0}, retrying)
            ]
        except (BaseError, ValueError) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise InputError(f"{self.address}: is not a store's address: {first_line}") from None
        return _Clients(os.getpid(), obstore, *stores)

    def _request(self, name: str, request: Callable[[_Clients], Any]) -> Any:
        return self.with_retries(name, lambda: request(self.clients()))

    def _classify(self, name: str, error: Exception) -> ClassifiedError:
        return classify_obstore_error(error, self.address, name)

    @contextlib.contextmanager
    def as_os_error(self, name: str) -> Iterator[None]:
        """Turn obstore's errors into OSErrors, for requests that obstore retries by itself."""
        try:
            yield
        except Exception as error:
            raise self._classify(name, error).error from error


class _Upload:
    """An upload in progress. The file appears when `publish` closes it."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        self._storage, self._name = storage, name
        clients = storage.clients()
        with storage.as_os_error(name):
            self._writer = clients.obstore.open_writer(
                clients.retrying, name, buffer_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
            )

    def write(self, data: Any) -> None:
        with self._storage.as_os_error(self._name):
            # A copy: obstore keeps the buffer until it is sent, and callers reuse theirs at once.
            self._writer.write(bytes(memoryview(data).cast("B")))

    def finish(self) -> None:
        """Wait for the parts being sent. The last one is sent by `publish`."""
        with self._storage.as_os_error(self._name):
            self._writer.flush()

    def publish(self) -> None:
        with self._storage.as_os_error(self._name):
            self._writer.close()
        self._writer = None

    def discard(self) -> None:
        self._writer = None  # never closed, so it never appears


def _version(entry: Any) -> Version:
    return Version(entry["size"], entry["e_tag"] or entry["last_modified"].isoformat())


def _aws_profile() -> dict[str, str]:
    """Settings from Amazon's configuration files that the environment does not give, as obstore's S3 options.

    Reads the section AWS_PROFILE of ~/.aws/credentials and ~/.aws/config, or of the files that
    AWS_SHARED_CREDENTIALS_FILE and AWS_CONFIG_FILE name
    (https://docs.aws.amazon.com/cli/latest/userguide/cli-configure-files.html). obstore does not read them.
    """
    if any(os.environ.get(name) for name in _AWS_KEY_SOURCES):
        return {}
    profile = os.environ.get("AWS_PROFILE") or "default"
    settings: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(os.environ.get(variable) or f"~/.aws/{file}").expanduser())
        except configparser.Error:
            continue  # ignored: the store will report missing keys
        if parser.has_section(section):
            settings |= dict(parser.items(section))
    if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        settings.pop("region", None)
    if os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
        settings.pop("endpoint_url", None)
    return {option: settings[field] for field, option in _AWS_FIELDS.items() if settings.get(field)}
