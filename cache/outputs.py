"""Where a command may write: checked before any work is done, and never over what the command reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from regionspot.cache.errors import InputError


def check_output_file(path: Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The path itself, where a file can be written there.

    inputs   files that must not be replaced, and folders none of whose files may be; links to them count as well.
             None and URLs are passed over

    Raises InputError for an input, for something that is no file, and for a folder that is not there or not writable.
    To be written by `durable.write_file`, which puts a new file in the place of a link instead of writing through it.
    """
    if path.exists() and any(_is_or_holds(each, path) for each in inputs):
        raise InputError(f"{path}: is an input of this command and must not be replaced; name another output")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is there already and no file; name another output")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it, or name another output")
    _require_writable(path.parent, path)
    return path


def check_output_folder(path: Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The path itself, where a folder is or can be made and files can be written in it.

    Raises InputError for an input or a folder inside of one, for something that is no folder, and where nothing can be
    written.
    """
    require_apart(path, inputs)
    there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if (path / "zarr.json").exists():
        raise InputError(f"{path}: is a Zarr store; name another output")
    if not there.is_dir():
        raise InputError(f"{there}: is there already and no folder; name another output")
    _require_writable(there, path)
    return path


def require_apart(path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises InputError for a path that is one of the inputs, by whatever name, or inside of one."""
    for each in inputs:
        if _is_or_holds(each, path):
            raise InputError(f"{path}: is, or is inside of, an input of this command ({each}); name another output")


def _is_or_holds(given: str | Path | None, path: Path) -> bool:
    """Whether `path` is the file or folder `given`, by whatever name, or lies inside of that folder."""
    if given is None or not os.path.exists(given):
        return False
    if path.exists() and os.path.samefile(path, given):
        return True
    return os.path.isdir(given) and path.resolve().is_relative_to(Path(given).resolve())


def _require_writable(folder: Path, path: Path) -> None:
    try:
        # Tried, not asked for: a read-only file system and a full quota are not in the folder's mode.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another output") from None
