"""A new cache put into a store that cannot rename: all of its files, and last the one that makes it a cache."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from regionspot.cache.storage.base import Storage


def upload_tree(folder: Path, storage: Storage, last: str) -> bool:
    """Put every file under `folder` into the storage, `last` when all others are there; whether it was put.

    False says that somebody else was first with `last`. No file is replaced. One of the same bytes will do, of a run
    that was killed while it did the same, or does it just now; so a cache is never made up of two.

    Raises FileExistsError where a file of other bytes lies, OSError for what the store refuses.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.remove(last)

    def put(name: str) -> None:
        data = (folder / name).read_bytes()
        if not storage.write_new(name, data) and storage.read(name) != data:
            told = f"{name} of something else lies there; remove all that does, or give another place"
            raise FileExistsError(errno.EEXIST, told, f"{storage.address}/{name}")

    with ThreadPoolExecutor(storage.readers) as pool:
        try:
            list(pool.map(put, names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return storage.write_new(last, (folder / last).read_bytes())
