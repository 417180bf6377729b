"""Every error that is not a bug of this package, in one small tree grouped by what a handler would do.

    RegionSpotError
    ├── InputError          (ValueError)   correct the input: an option, a file, a field
    │   ├── AnnotationError                an annotation or proposals file
    │   ├── WeightsError                   a weights file or checkpoint
    │   └── ImageError                     one image cannot be read; extraction records it and continues
    └── CacheError          (RuntimeError)
        ├── NotACacheError                 the folder is something else, or damaged beyond reading
        ├── CacheExistsError               a new cache was requested where one exists
        ├── SchemaVersionError             written with a schema version that this package does not read
        ├── ProvenanceMismatchError        made by other backbones or annotations than requested
        ├── NotExtractedError (LookupError) the part that holds the row is not written yet
        └── CorruptPartError               bytes on disk do not match their checksum

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
    """A weights file is missing, has the wrong content, or is not safe to load."""


class ImageError(InputError):
    """One image cannot be read."""


class CacheError(RegionSpotError, RuntimeError):
    """An operation on a feature cache failed."""


class NotACacheError(CacheError):
    """The path holds something that is not a feature cache."""


class CacheExistsError(CacheError):
    """The cache exists already, perhaps created by another run just now."""


class SchemaVersionError(CacheError):
    """The cache was written with another schema version."""


class ProvenanceMismatchError(CacheError):
    """The cache was made from other weights, settings or annotations."""


class NotExtractedError(CacheError, LookupError):
    """The row's part is not committed yet, or its image could not be read."""


class CorruptPartError(CacheError):
    """Stored bytes do not match their checksum."""


def unknown_name(kind: str, name: str, known: Iterable[str], alternatives: str = "") -> InputError:
    """The error for a `name` that is not one of the `known` ones; it suggests the closest one.

    alternatives   text after the known names, for other accepted values
    """
    names = list(known)
    by_lower_case = {candidate.lower(): candidate for candidate in reversed(names)}
    closest = difflib.get_close_matches(name.lower(), by_lower_case, 1)
    suggestion = f"; did you mean {by_lower_case[closest[0]]!r}?" if closest else ""
    return InputError(f"{kind} {name!r}: unknown; expected one of {', '.join(names)}{alternatives}{suggestion}")
