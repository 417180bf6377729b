"""Sizes of images whose annotations do not state them: read once from the file headers, then remembered.

1.7 million headers take minutes, so each size is kept with the image's length in bytes and its time of change, in a
small Parquet file inside the image folder, or under $REGIONSPOT_HOME/sizes where that folder may not be written.
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

ABSENT = 0  # in place of a size: there is no such file
UNREADABLE = -1  # in place of a size: the file's header tells none
SIZES_NAME = ".regionspot-sizes.parquet"
_SAVE_EVERY = 200_000  # headers; a run that is stopped loses no more
_COLUMNS = ("name", "bytes", "mtime_ns", "height", "width")

Stamp: TypeAlias = tuple[int, int]  # length in bytes, time of last change in nanoseconds
Size: TypeAlias = tuple[int, int]  # height, width


def image_sizes(folder: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """int64 (N, 2): height and width of each image, as stored (EXIF orientation not applied).

    A row is ABSENT twice where `folder` holds no such file, UNREADABLE twice where it is no image.
    """
    there = _stamps(folder, set(names))
    known = {name: size for name, (stamp, size) in _remembered(folder).items() if there.get(name) == stamp}
    unread = [name for name in there if name not in known]
    if unread:
        log.info("%s: reading the sizes of %d images from their headers", folder, len(unread))
    for start in range(0, len(unread), _SAVE_EVERY):
        known.update(_read_headers(folder, unread[start : start + _SAVE_EVERY]))
        _remember(folder, there, known)
    absent, unreadable = (ABSENT, ABSENT), (UNREADABLE, UNREADABLE)
    sizes = [known.get(name, unreadable if name in there else absent) for name in names]
    return np.array(sizes, np.int64).reshape(-1, 2)


def _stamps(folder: Path, wanted: set[str]) -> dict[str, Stamp]:
    """The wanted images that are there. One listing of the folder, not a look-up for each name."""
    found = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in wanted:
                    with suppress(OSError):  # a link to nothing, or to itself
                        found[entry.name] = (entry.stat().st_size, entry.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return found


def _read_headers(folder: Path, names: Sequence[str]) -> dict[str, Size]:
    """Sizes of the images whose header can be read. Threads: most of the time is spent waiting for the disk."""
    with ThreadPoolExecutor(max_workers=4 * processors()) as pool:
        sizes = pool.map(lambda name: _header_size(folder / name), names)
        return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}


def _header_size(path: Path) -> Size | None:
    try:
        with open_regular(path) as file, read_header(file) as image:
            width, height = stored_size(image)
            return height, width
    except Exception:  # whatever broken bytes trip PIL's readers into
        return None


def _places(folder: Path) -> tuple[Path, Path]:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return folder / SIZES_NAME, home_folder("sizes") / f"{digest[:32]}.parquet"


def _remembered(folder: Path) -> dict[str, tuple[Stamp, Size]]:
    for place in _places(folder):
        try:
            names, lengths, times, heights, widths = (
                pq.read_table(place, columns=list(_COLUMNS))[name].to_pylist() for name in _COLUMNS
            )
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, pa.ArrowException, KeyError) as error:
            log.warning("%s: the remembered image sizes cannot be read (%s) and are read anew", place, error)
            continue
        stamps, sizes = zip(lengths, times, strict=True), zip(heights, widths, strict=True)
        return dict(zip(names, zip(stamps, sizes, strict=True), strict=True))
    return {}


def _remember(folder: Path, there: dict[str, Stamp], known: dict[str, Size]) -> None:
    """Write what is known, at once or not at all, to the first place that takes it."""
    rows = [(name, *there[name], *size) for name, size in known.items()]
    columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    table = pa.table({name: pa.array(column) for name, column in zip(_COLUMNS, columns, strict=True)})
    for place in _places(folder):
        partial = partial_path(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, partial)
            os.replace(partial, place)
            return
        except OSError as error:
            log.debug("%s: cannot be written (%s)", place, error)
            with suppress(OSError):
                partial.unlink()
    log.warning("%s: the sizes of its images could not be remembered; they are read again next time", folder)
