"""Open the storage at a path or URL.

    s3:// gs:// az:// abfs://   ObjectStorage   (object_store.py)
    http:// https://            HttpStorage     (http_storage.py)
    other URLs of fsspec        FsspecStorage   (fsspec_storage.py): memory://, sftp://, hf://, smb://, ...
    *.h5 *.hdf5                 Hdf5Storage     (hdf5_storage.py)
    file:// and other paths     LocalStorage    (local.py)

The modules of remote storages and HDF5 are imported on demand: they need obstore, fsspec or h5py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from regionspot.cache.errors import InputError
from regionspot.cache.storage.base import Storage
from regionspot.cache.storage.local import LocalStorage

HDF5_SUFFIXES = (".h5", ".hdf5")
RETRY_SECONDS = 60.0  # survives the restart of a server, and still reports a wrong address soon
_OBJECT_STORES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss")


def open_storage(address: str | Path | Storage) -> Storage:
    """Open the storage at a path or URL; a `Storage` is returned as is. Nothing is read yet.

    Raises InputError for a URL scheme that no installed library supports.
    """
    if isinstance(address, Storage):
        return address
    if "://" in str(address):
        return open_remote(str(address))
    path = Path(address)
    if path.suffix in HDF5_SUFFIXES and not path.is_dir():
        from regionspot.cache.storage.hdf5_storage import Hdf5Storage

        return Hdf5Storage(path)
    return LocalStorage(path)


def open_remote(address: str, retry_seconds: float | None = None) -> Storage:
    """Open the storage at a URL. Nothing is read yet.

    retry_seconds   how long a failing request is retried (default: REGIONSPOT_PATIENCE, else 60)

    Credentials and endpoints come from the usual environment variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_REGION, AWS_ENDPOINT_URL, AWS_SKIP_SIGNATURE=true for public buckets, ~/.aws; GOOGLE_APPLICATION_CREDENTIALS;
    AZURE_STORAGE_ACCOUNT_NAME and _KEY. Raises InputError for a URL scheme that no installed library supports.
    """
    address = re.sub(r"(?<![:/])/+$", "", address)  # memory:// and file:/// keep their slashes
    scheme = urlsplit(address).scheme
    seconds = _retry_seconds() if retry_seconds is None else retry_seconds
    if scheme == "file":
        return LocalStorage(Path(urlsplit(address).path))
    if scheme in _OBJECT_STORES:
        from regionspot.cache.storage.object_store import ObjectStorage

        return ObjectStorage(address, seconds)
    if scheme in ("http", "https"):
        from regionspot.cache.storage.http_storage import HttpStorage

        return HttpStorage(address, seconds)
    from regionspot.cache.storage.fsspec_storage import FsspecStorage

    return FsspecStorage(address, seconds)


def _retry_seconds() -> float:
    text = os.environ.get("REGIONSPOT_PATIENCE") or str(RETRY_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # rejects NaN, too
        raise InputError(f"REGIONSPOT_PATIENCE is {text!r}, expected a number of seconds, 0 or more")
    return seconds
