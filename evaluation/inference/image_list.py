"""The images that a command line names: files, folders, patterns, and "-" for a list on standard input."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

from regionspot.cache.errors import InputError

STDIN = "-"
# What a folder is searched for. A file that is named itself may have any suffix.
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2"}


def names_one_file(arguments: Sequence[str]) -> bool:
    """Whether the command line names one image by its path, which may not exist."""
    if len(arguments) != 1 or arguments[0] == STDIN:
        return False
    path = Path(arguments[0])
    return not path.is_dir() and (path.exists() or not glob.has_magic(arguments[0]))


def list_images(arguments: Sequence[str], stdin: Iterable[str]) -> list[Path]:
    """The images in the order of the arguments, each once; those of a folder and its sub-folders by their paths.

    stdin  lines with a path each, read where an argument is "-"

    A path that does not exist is kept: reading it gives the error. Raises InputError for a folder without images, a
    pattern that fits no file, and an empty list.
    """
    images: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN:
            images += [Path(line.strip()) for line in stdin if line.strip()]
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise InputError(f"{path}: this folder has no image; expected files such as .jpg or .png")
            images += found
        elif path.exists() or not glob.has_magic(argument):
            images.append(path)
        else:
            matching = sorted(Path(file) for file in glob.glob(argument, recursive=True))
            if not matching:
                raise InputError(f"{argument}: no file fits this pattern; '**/*.jpg' also looks into sub-folders")
            images += [file for file in matching if file.is_file()]
    if not images:
        raise InputError("there are no images; give files, folders, patterns, or paths on standard input with -")
    return list(dict.fromkeys(images))
