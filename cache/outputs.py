"""Checks that a command may write its output: before any work is done, and never over the command's own inputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from regionspot.cache.errors import InputError


def check_output_file(path: Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Return `path` if a file can be written there.

    inputs   files that must not be replaced, and folders none of whose files may be, also through links. None and URLs
             are ignored

    Raises InputError for an input, for something that is not a file, and for a folder that is missing or not writable.
    Write with `atomic_files.write_file`, which replaces a link instead of writing through it.
    """
    if path.exists() and any(_is_or_contains(source, path) for source in inputs):
        raise InputError(f"{path}: is an input of this command and must not be replaced; name another output")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: exists and is not a file; name another output")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it, or name another output")
    _require_writable(path.parent, path)
    return path


def check_output_folder(path: Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Return `path` if it is, or can be created as, a folder that files can be written into.

    Raises InputError for an input, a folder inside an input, a Zarr store, and where nothing can be written.
    """
    require_apart(path, inputs)
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if (path / "zarr.json").exists():
        raise InputError(f"{path}: is a Zarr store; name another output")
    if not existing.is_dir():
        raise InputError(f"{existing}: exists and is not a folder; name another output")
    _require_writable(existing, path)
    return path


def require_apart(path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises InputError when `path` is one of the inputs or inside one, also through links."""
    for source in inputs:
        if _is_or_contains(source, path):
            raise InputError(f"{path}: is, or is inside, an input of this command ({source}); name another output")


def _is_or_contains(source: str | Path | None, path: Path) -> bool:
    if source is None or not os.path.exists(source):
        return False
    if path.exists() and os.path.samefile(path, source):
        return True
    return os.path.isdir(source) and path.resolve().is_relative_to(Path(source).resolve())


def _require_writable(folder: Path, path: Path) -> None:
    try:
        # Tested by writing: the mode does not show a read-only file system or a full quota.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another output") from None
