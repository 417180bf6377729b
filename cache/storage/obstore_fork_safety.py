"""Makes obstore work in a forked process, such as a PyTorch DataLoader worker, by loading it a second time.

obstore runs its requests on threads that its extension module starts once and keeps in a static variable. A fork copies
the module without the threads, so every request of the child hangs, even from a new client (seen with 0.12.1). A copy
of the extension's file is loaded as another library with its own static variables, so a forked child replaces the
inherited module by such a copy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

_EXTENSION = "obstore._obstore"

_lock = threading.Lock()
_is_inherited = False
_kept: list[object] = []  # inherited objects: freeing them would need the parent's threads


def current_obstore() -> Any:
    """The `obstore` module that works in this process. Raises ImportError if it is not installed."""
    global _is_inherited
    with _lock:
        if _is_inherited:
            _reload()
            _is_inherited = False
    import obstore

    return obstore


def keep(inherited: object) -> None:
    """Keep a client of the parent process alive until this process ends."""
    _kept.append(inherited)


def _after_fork() -> None:
    global _lock, _is_inherited
    _lock = threading.Lock()  # a thread of the parent may have held it
    _is_inherited = _is_inherited or "obstore" in sys.modules


os.register_at_fork(after_in_child=_after_fork)


def _reload() -> None:
    inherited = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "obstore"}
    keep(inherited)
    for name in inherited:
        del sys.modules[name]
    if _EXTENSION in inherited:
        file = inherited[_EXTENSION].__file__ or ""
        sys.modules[_EXTENSION] = _load_copy(file)


def _load_copy(file: str) -> ModuleType:
    with _copied(file) as copy:
        loader = ExtensionFileLoader(_EXTENSION, copy)
        spec = spec_from_file_location(_EXTENSION, copy, loader=loader)
        if spec is None:
            raise ImportError(f"{file} cannot be loaded again")
        module = module_from_spec(spec)
        sys.modules[_EXTENSION] = module
        loader.exec_module(module)
    module.__file__ = file  # so that a child of this process can copy it, too
    return module


@contextlib.contextmanager
def _copied(file: str) -> Iterator[str]:
    """Path of a temporary copy of a file; a library loaded from it stays loaded."""
    if hasattr(os, "memfd_create"):  # Linux: in memory, because /tmp may be mounted noexec
        with open(file, "rb") as source, os.fdopen(os.memfd_create("obstore"), "wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            yield f"/proc/self/fd/{target.fileno()}"
    else:
        with open(file, "rb") as source, tempfile.NamedTemporaryFile(suffix=".so") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            yield target.name
