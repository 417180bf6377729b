"""One annotation or proposals file: mapped into memory, hashed, and decoded a slice at a time.

A ten-million-box JSON file takes 3 GB as Python objects at once. Here its long lists are first found as raw bytes
(msgspec skips what it does not need, segmentations above all) and then decoded 16 MB at a time, so that the caller
can turn each slice into columns and let its objects go.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from regionspot.cache.errors import AnnotationError

T = TypeVar("T")

SLICE_BYTES = 16 * 2**20  # about 100,000 boxes without segmentation; their objects take some 40 MB
_BETWEEN_OBJECTS = re.compile(rb"\}\s*,\s*(?=\{)")
# Python's json writes these for floats that are not finite, though JSON has no such words. Strings are matched
# first, so that a name that holds one of them is stepped over.
_STRING_OR_NOT_FINITE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?\b(?:NaN|Infinity)\b')


class AnnotationFile:
    """A file that is there and not empty, with its SHA-256. Raises AnnotationError where it is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: mmap.mmap | bytes = _mapped(path)
        self.sha256 = hashlib.sha256(self._bytes).hexdigest()

    @property
    def source(self) -> dict[str, dict[str, str]]:
        """What a manifest says of its origin."""
        return {"files": {self.path.name: self.sha256}}

    @property
    def is_list(self) -> bool:
        """Whether the JSON is a list rather than an object."""
        return self._bytes[:4096].lstrip()[:1] == b"["

    def decode(self, wanted: type[T]) -> T:
        """The whole file as `wanted`; parts typed msgspec.Raw stay bytes, for `slices`.

        NaN and Infinity, which Python's json writes, are read as null. Raises AnnotationError.
        """
        try:
            return msgspec.json.decode(self._bytes, type=wanted)
        except msgspec.ValidationError as error:
            raise self.refuse(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if not self._take_out_not_finite():
                raise self.refuse(f"this is not whole JSON ({error})") from None
        return self.decode(wanted)

    def slices(self, field: str, raw: msgspec.Raw, item: type[T]) -> Iterator[list[T]]:
        """The objects of the list `raw`, in order, some 16 MB of JSON at a time.

        `field` is where the list stands in the file, for messages: "annotations", or "" for the file itself.
        """
        decoder = msgspec.json.Decoder(list[item])  # type: ignore[valid-type]
        whole = memoryview(raw)
        if bytes(whole[:1]) != b"[":
            raise self.refuse(f"`{field or 'the file'}` is not a list")
        first, start, cut, end = 0, 1, 1, len(whole) - 1
        while cut < end:
            between = _BETWEEN_OBJECTS.search(whole, max(cut, start + SLICE_BYTES), end)
            cut = between.start() + 1 if between else end
            try:
                items = decoder.decode(b"[" + whole[start:cut] + b"]")
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if between is None or isinstance(error, msgspec.ValidationError):
                    raise self._refuse_item(field, error, first) from None
                cut = between.end()  # this cut lay inside a nested list or a string: go on to the next one
                continue
            yield items
            first += len(items)
            start = cut = between.end() if between else end

    def refuse(self, what: str) -> AnnotationError:
        """The error for this file, ready to be raised."""
        return AnnotationError(f"{self.path}: {what}; check that it is the right file, or fetch it again")

    def _refuse_item(self, field: str, error: Exception, first: int) -> AnnotationError:
        """msgspec counts from the slice's first object (`$[3].bbox`); the message counts from the file's."""
        root = f"$.{field}" if field else "$"
        told, moved = re.subn(r"\$\[(\d+)\]", lambda at: f"{root}[{int(at[1]) + first}]", str(error), count=1)
        return self.refuse(told if moved else f"{told} - at `{root}`")

    def _take_out_not_finite(self) -> bool:
        """Whether there was any NaN or Infinity; each is null from now on."""
        if self._bytes.find(b"NaN") < 0 and self._bytes.find(b"Infinity") < 0:
            return False
        mended = _STRING_OR_NOT_FINITE.sub(lambda at: at[0] if at[0][:1] == b'"' else b"null", self._bytes)
        changed = len(mended) != len(self._bytes) or mended != self._bytes[:]
        self._bytes = mended
        return changed


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise AnnotationError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); check what it is and its rights") from None
    except ValueError:  # mmap's word for a file of no bytes
        raise AnnotationError(f"{path}: the file is empty; fetch it again") from None
