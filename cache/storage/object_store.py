"""A cache in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage; by obstore.

Reading is by byte ranges, from as many threads as the caller likes. A file is streamed up in parts while it is
written; it appears at once and whole when it is published. What a killed writer had sent appears never.

A client belongs to the process that made it: after a fork another one is made (see obstore_forks.py).
"""

from __future__ import annotations

import configparser
import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from regionspot.cache.errors import InputError
from regionspot.cache.storage.base import NewFile
from regionspot.cache.storage.obstore_errors import trouble_of
from regionspot.cache.storage.obstore_fork_safety import current_obstore, keep
from regionspot.cache.storage.remote import RemoteStorage, Trouble, Version

_PART_BYTES = 8 << 20  # of a multipart upload: S3 takes 5 MB to 5 GB, and 10,000 of them, so files up to 80 GB
_PARTS_AT_ONCE = 4  # so a file being written takes at most 40 MB of memory
_LONGEST_SILENCE = 30.0  # seconds without a byte after which a request counts as failed


# What says where keys come from, so that the files are not asked.
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
    """Connections of one process. `once` asks once, for what we ask again ourselves; `patient` asks by itself."""

    process: int
    obstore: Any
    once: Any
    patient: Any


class ObjectStorage(RemoteStorage):
    """A prefix in a bucket."""

    def __init__(self, address: str, retry_seconds: float) -> None:
        super().__init__(address, retry_seconds)
        self._held = self._connect()

    def version(self, name: str) -> Version:
        if not name:
            return self._version_of_root()
        found = self._ask(name, lambda clients: clients.obstore.head(clients.once, name))
        return _version(found)

    def _version_of_root(self) -> Version:
        if not self.listing(""):
            raise FileNotFoundError(errno.ENOENT, "there is nothing", self.address)
        return Version(0, "")

    def listing(self, folder: str) -> dict[str, Version | None]:
        found = self._ask(
            folder, lambda clients: clients.obstore.list_with_delimiter(clients.once, folder or None)["objects"]
        )
        return {each["path"].rpartition("/")[2]: _version(each) for each in found}

    def read(self, name: str) -> bytes:
        return bytes(self._ask(name, lambda clients: clients.obstore.get(clients.once, name).bytes()))

    def read_range(self, name: str, start: int, stop: int, version: Version | None = None) -> Any:
        options: dict[str, Any] = {"range": (start, stop)}
        if version is not None and version.mark.startswith('"'):
            options["if_match"] = version.mark
        try:
            return self._ask(name, lambda clients: clients.obstore.get(clients.once, name, options=options).bytes())
        except OSError as error:
            if error.errno == errno.ERANGE:
                return b""
            raise

    def create(self, name: str) -> NewFile:
        return _Upload(self, name)

    def write(self, name: str, data: bytes) -> None:
        self._ask(name, lambda clients: clients.obstore.put(clients.once, name, data))

    def write_new(self, name: str, data: bytes) -> bool:
        """As Storage says, by a put on condition (If-None-Match). A store that knows none is looked at before.

        A file of just this content counts as written by us: the answer to an earlier try may have been lost. So what
        several writers compete with has to say whose it is.
        """
        try:
            self._ask(
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
            self._ask(name, lambda clients: clients.obstore.delete(clients.once, name))

    def zarr_library_store(self, read_only: bool) -> Any:
        from zarr.storage import ObjectStore  # zarr takes a second to import

        return ObjectStore(self.clients().patient, read_only=read_only)

    def clients(self) -> _Clients:
        """The connections of this process."""
        held = self._held
        if held.process != os.getpid():
            keep(held)
            held = self._held = self._connect()  # two threads may both do it; either result will do
        return held

    def _connect(self) -> _Clients:
        try:
            obstore = current_obstore()
        except ImportError:
            raise InputError(f'{self.address}: needs obstore: pip install "regionspot[remote]"') from None
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        connect: Any = from_url  # typed by the names of each store's own options
        silence = timedelta(seconds=min(_LONGEST_SILENCE, max(self.retry_seconds, 1)))
        client_options = {
            "allow_http": True,  # where an endpoint is given as http://
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": silence,
            "timeout": timedelta(hours=1),  # of a whole transfer, however slow the line
        }
        patient = {
            "max_retries": 20,
            "retry_timeout": timedelta(seconds=self.retry_seconds),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
        }
        config = _aws_profile() if urlsplit(self.address).scheme in ("s3", "s3a") else {}
        try:
            made = [
                connect(self.address, client_options=client_options, retry_config=retries, **config)
                for retries in ({"max_retries": 0}, patient)
            ]
        except (BaseError, ValueError) as error:
            raise InputError(f"{self.address}: is no address of a store: {_first_line(error)}") from None
        return _Clients(os.getpid(), obstore, *made)

    def _ask(self, name: str, ask: Any) -> Any:
        return self.with_retries(name, lambda: ask(self.clients()))

    def _trouble(self, name: str, error: Exception) -> Trouble:
        return trouble_of(error, self.address, name)

    @contextlib.contextmanager
    def in_one_line(self, name: str) -> Iterator[None]:
        """Errors of obstore inside become OSErrors; for what obstore asks again by itself."""
        try:
            yield
        except Exception as error:
            raise self._trouble(name, error).error from error


class _Upload:
    """A file on its way up. The store shows it once `publish` has closed it."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        self._storage, self._name = storage, name
        clients = storage.clients()
        with storage.in_one_line(name):
            self._writer = clients.obstore.open_writer(
                clients.patient, name, buffer_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
            )

    def write(self, data: Any) -> None:
        with self._storage.in_one_line(self._name):
            # A copy, for obstore keeps the buffer itself until it is sent, and writers use theirs again at once.
            self._writer.write(bytes(memoryview(data).cast("B")))

    def finish(self) -> None:
        """Wait for the parts on their way. The last one goes with `publish`."""
        with self._storage.in_one_line(self._name):
            self._writer.flush()

    def publish(self) -> None:
        with self._storage.in_one_line(self._name):
            self._writer.close()
        self._writer = None

    def discard(self) -> None:
        self._writer = None  # never closed, so never shown


def _version(found: Any) -> Version:
    mark = found["e_tag"] or found["last_modified"].isoformat()
    return Version(found["size"], mark)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _aws_profile() -> dict[str, str]:
    """What the files say and the environment does not, by the names of obstore's S3 options."""
    if any(os.environ.get(name) for name in _AWS_KEY_SOURCES):
        return {}
    profile = os.environ.get("AWS_PROFILE") or "default"
    words: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(os.environ.get(variable) or f"~/.aws/{file}").expanduser())
        except configparser.Error:
            continue  # as if it were not there: the store will say that keys are missing
        if parser.has_section(section):
            words |= dict(parser.items(section))
    if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        words.pop("region", None)
    if os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
        words.pop("endpoint_url", None)
    return {option: words[field] for field, option in _AWS_FIELDS.items() if words.get(field)}
