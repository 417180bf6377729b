"""obstore in a forked process: loaded a second time, because its threads did not come along.

obstore's requests run on threads that its extension module starts once and keeps in a static. A fork copies the module
without the threads, and every request of the child then waits for ever, also one of a client made there (seen with
0.12.1). To the loader a copy of the extension's file is another library with statics of its own; so a child loads one,
in place of the module that it inherited. Worker processes of a PyTorch DataLoader are such children.
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
_kept: list[object] = []  # what was inherited: to free it would be work for threads that are not there


def current_obstore() -> Any:
    """The module `obstore`, one that works in this process. Raises ImportError where it is not installed."""
    global _is_inherited
    with _lock:
        if _is_inherited:
            _load_anew()
            _is_inherited = False
    import obstore

    return obstore


def keep(inherited: object) -> None:
    """Hold a client of the parent process for as long as this process lives, so that it is never freed."""
    _kept.append(inherited)


def _after_fork() -> None:
    global _lock, _is_inherited
    _lock = threading.Lock()  # another thread of the parent may have held it
    _is_inherited = _is_inherited or "obstore" in sys.modules


os.register_at_fork(after_in_child=_after_fork)


def _load_anew() -> None:
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
            raise ImportError(f"{file} cannot be loaded a second time")
        module = module_from_spec(spec)
        sys.modules[_EXTENSION] = module
        loader.exec_module(module)
    module.__file__ = file  # a child of this process copies the file that is still there
    return module


@contextlib.contextmanager
def _copied(file: str) -> Iterator[str]:
    """Path of a copy of a file, gone afterwards; what is loaded from it stays."""
    if hasattr(os, "memfd_create"):  # Linux: in memory, for a temporary folder may forbid to load code from it
        with open(file, "rb") as source, os.fdopen(os.memfd_create("obstore"), "wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            yield f"/proc/self/fd/{target.fileno()}"
    else:
        with open(file, "rb") as source, tempfile.NamedTemporaryFile(suffix=".so") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            yield target.name
