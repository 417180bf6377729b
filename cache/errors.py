"""Every error that is not a bug of ours, in one small tree grouped by what a handler would do.

    RegionSpotError
    ├── InputError          (ValueError)   mend what was given: an option, a file, a field
    │   ├── AnnotationError                an annotation or proposals file
    │   ├── WeightsError                   a weights file or checkpoint
    │   └── ImageError                     one image cannot be read; extraction records it and goes on
    └── CacheError          (RuntimeError)
        ├── NotACacheError                 the folder is something else, or damaged beyond reading
        ├── CacheExistsError               there is one already where a new one was asked for
        ├── SchemaVersionError             written by a version that this one does not read
        ├── ProvenanceMismatchError        made by other backbones or annotations than asked for
        ├── NotExtractedError (LookupError) the part that holds the row is not written yet
        └── CorruptPartError               bytes on disk do not match what was written

Each message is one line: the file, the field, what was found, what was expected, and what to do next.
The command line prints that line and exits with 2.
"""

import difflib
from collections.abc import Iterable


class RegionSpotError(Exception):
    """Root of the tree."""


class InputError(RegionSpotError, ValueError):
    """Something the user gave is wrong."""


class AnnotationError(InputError):
    """An annotation or proposals file is missing, unreadable or incomplete."""


class WeightsError(InputError):
    """A weights file is missing, is not the one asked for, or may not be loaded safely."""


class ImageError(InputError):
    """One image cannot be read."""


class CacheError(RegionSpotError, RuntimeError):
    """A feature cache cannot do what was asked."""


class NotACacheError(CacheError):
    """The path holds something that is not a feature cache."""


class CacheExistsError(CacheError):
    """A cache is there already, perhaps made by another run a moment ago."""


class SchemaVersionError(CacheError):
    """The cache was written with another schema version."""


class ProvenanceMismatchError(CacheError):
    """The cache was made from other weights, settings or annotations."""


class NotExtractedError(CacheError, LookupError):
    """The row's part is not committed yet, or its image could not be read."""


class CorruptPartError(CacheError):
    """Stored bytes do not match their checksum."""


def unknown_name(kind: str, name: str, known: Iterable[str], more: str = "") -> InputError:
    """The error for a `name` that is none of the `known` ones; it names the one that was probably meant.

    more   what else could be given
    """
    names = list(known)
    lower = {each.lower(): each for each in reversed(names)}
    close = difflib.get_close_matches(name.lower(), lower, 1)
    meant = f"; did you mean {lower[close[0]]!r}?" if close else ""
    return InputError(f"{kind} {name!r}: unknown; expected one of {', '.join(names)}{more}{meant}")
