"""Read the sizes of images from their file headers, for datasets whose annotations do not contain them.

Reading 1.7 million headers takes minutes. So sizes are cached, with each file's length and modification time, in a
small Parquet file in the image folder, or under $REGIONSPOT_HOME/sizes if that folder is not writable.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from regionspot.cache.machine import home_folder, processors
from regionspot.cache.storage.atomic_files import partial_path
from regionspot.pipeline.images.decode import open_regular, stored_size
from regionspot.pipeline.images.image_header import read_header

log = logging.getLogger(__name__)

ABSENT = 0  # instead of a size: the file does not exist
UNREADABLE = -1  # instead of a size: the file is not an image
SIZES_NAME = ".regionspot-sizes.parquet"
_SAVE_EVERY = 200_000  # headers; an interrupted run loses at most these
_COLUMNS = ("name", "bytes", "mtime_ns", "height", "width")

Stamp: TypeAlias = tuple[int, int]  # length in bytes, modification time in nanoseconds
Size: TypeAlias = tuple[int, int]  # height, width


def image_sizes(folder: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """int64 (N, 2): height and width of each image, as stored (EXIF orientation not applied).

    Both are ABSENT if `folder` does not contain the file, UNREADABLE if the file is not an image.
    """
    stamps = _stamps(folder, set(names))
    known = {name: size for name, (stamp, size) in _load_sizes(folder).items() if stamps.get(name) == stamp}
    unread = [name for name in stamps if name not in known]
    if unread:
        log.info("%s: reading the sizes of %d images from their headers", folder, len(unread))
    for start in range(0, len(unread), _SAVE_EVERY):
        known.update(_read_headers(folder, unread[start : start + _SAVE_EVERY]))
        _save_sizes(folder, stamps, known)
    absent, unreadable = (ABSENT, ABSENT), (UNREADABLE, UNREADABLE)
    sizes = [known.get(name, unreadable if name in stamps else absent) for name in names]
    return np.array(sizes, np.int64).reshape(-1, 2)


def _stamps(folder: Path, names: set[str]) -> dict[str, Stamp]:
    """Stamps of the files that exist, by one listing of the folder instead of a look-up per name."""
    stamps = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in names:
                    with suppress(OSError):  # a dangling or cyclic link
                        stamps[entry.name] = (entry.stat().st_size, entry.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return stamps


def _read_headers(folder: Path, names: Sequence[str]) -> dict[str, Size]:
    """Sizes of the images whose header can be read, by threads that mostly wait for the disk."""
    with ThreadPoolExecutor(max_workers=4 * processors()) as pool:
        sizes = pool.map(lambda name: _header_size(folder / name), names)
        return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}


def _header_size(path: Path) -> Size | None:
    try:
        with open_regular(path) as file, read_header(file) as image:
            width, height = stored_size(image)
            return height, width
    except Exception:  # Pillow's readers raise any exception on damaged files
        return None


def _cache_files(folder: Path) -> tuple[Path, Path]:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return folder / SIZES_NAME, home_folder("sizes") / f"{digest[:32]}.parquet"


def _load_sizes(folder: Path) -> dict[str, tuple[Stamp, Size]]:
    for path in _cache_files(folder):
        try:
            names, lengths, times, heights, widths = (
                pq.read_table(path, columns=list(_COLUMNS))[name].to_pylist() for name in _COLUMNS
            )
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, pa.ArrowException, KeyError) as error:
            log.warning("%s: the cached image sizes cannot be read (%s); reading them again", path, error)
            continue
        stamps, sizes = zip(lengths, times, strict=True), zip(heights, widths, strict=True)
        return dict(zip(names, zip(stamps, sizes, strict=True), strict=True))
    return {}


def _save_sizes(folder: Path, stamps: dict[str, Stamp], sizes: dict[str, Size]) -> None:
    """Write the sizes atomically to the first writable cache file."""
    rows = [(name, *stamps[name], *size) for name, size in sizes.items()]
    columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    table = pa.table({name: pa.array(column) for name, column in zip(_COLUMNS, columns, strict=True)})
    for path in _cache_files(folder):
        partial = partial_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, partial)
            os.replace(partial, path)
            return
        except OSError as error:
            log.debug("%s: cannot be written (%s)", path, error)
            with suppress(OSError):
                partial.unlink()
    log.warning("%s: the image sizes could not be cached; the next run will read them again", folder)
