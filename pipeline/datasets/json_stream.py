"""One annotation or proposals file: mapped into memory, hashed, and decoded a slice at a time.

A ten-million-box JSON file takes 3 GB as Python objects at once. Here its long lists are first found as raw bytes
(msgspec skips what it does not need, segmentations above all) and then decoded 16 MB at a time, so that the caller
can turn each slice into columns and let its objects go.

Records that msgspec refuses are read one by one (json_values.py). Those that cannot be read at all are counted and left
out, unless they are more than a limit allows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from regionspot.cache.errors import AnnotationError
from regionspot.pipeline.datasets.failure_limit import SkippedRecords
from regionspot.pipeline.datasets.field_parsing import FieldError

T = TypeVar("T")

SLICE_BYTES = 16 * 2**20  # about 100,000 boxes without segmentation; their objects take some 40 MB
_BETWEEN_OBJECTS = re.compile(rb"\}\s*,\s*(?=\{)")
# Python's json writes these for floats that are not finite, though JSON has no such words. Strings are matched
# first, so that a name that holds one of them is stepped over.
_STRING_OR_NOT_FINITE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?\b(?:NaN|Infinity)\b')
_NOT_FINITE = re.compile(rb"NaN|Infinity")
_KEY = re.compile(rb'\s*[{,]\s*"[^"\\]*(?:\\.[^"\\]*)*"\s*:\s*')  # of an object, with what stands before it
_END = re.compile(rb"\s*(\{\s*)?\}\s*")  # of an object, be it empty
_KEY_TEXT = re.compile(r'[\s,]*("[^"\\]*(?:\\.[^"\\]*)*")\s*:\s*')
_UTF8_BOM = b"\xef\xbb\xbf"
# What a file begins with that is no JSON text in UTF-8, and what to do about it.
_OTHER_KINDS = (
    (b"\xff\xfe", "is text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is text in UTF-16; save it as UTF-8"),
    (b"{\0", "is text in UTF-16; save it as UTF-8"),
    (b"[\0", "is text in UTF-16; save it as UTF-8"),
    (b"\0", "is text in UTF-16, or no text at all; save it as JSON in UTF-8"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"PK\3\4", "is a zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it first"),
    (b"BZh", "is compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ", "is compressed by xz; unpack it first"),
    (b"\x80", "is a Python pickle, which could run anything when it is loaded; write its lists as JSON"),
    (b"//", "has comments, which JSON does not allow; take them out"),
    (b"/*", "has comments, which JSON does not allow; take them out"),
    (b"<", "is HTML or XML, not JSON: perhaps an error page in place of the file; fetch it again"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
)


@dataclass(frozen=True)
class Slice(Generic[T]):
    """Some of a list's objects, and where in the list each of them stands."""

    items: list[T]
    places: Sequence[int]


class AnnotationFile:
    """A file that is there and not empty, with its SHA-256. Raises AnnotationError where it is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = _mapped(path)
        self.sha256 = hashlib.sha256(mapped).hexdigest()
        self._bytes = memoryview(mapped)
        if self._bytes[:3] == _UTF8_BOM:
            self._bytes = self._bytes[3:]

    @property
    def source(self) -> dict[str, dict[str, str]]:
        """What a manifest says of its origin."""
        return {"files": {self.path.name: self.sha256}}

    @property
    def is_list(self) -> bool:
        """Whether the JSON is a list rather than an object."""
        return bytes(self._bytes[:4096]).lstrip()[:1] == b"["

    def decode(self, wanted: type[T]) -> T:
        """The whole file as `wanted`; parts typed msgspec.Raw stay bytes, for `slices`.

        NaN and Infinity, which Python's json writes, are read as null. Raises AnnotationError.
        """
        try:
            return msgspec.json.decode(self._bytes, type=wanted)
        except msgspec.ValidationError as error:
            raise self.refuse(str(error)) from None
        except UnicodeDecodeError as error:
            raise self._not_utf8(error) from None
        except msgspec.DecodeError as error:
            if not self._take_out_not_finite():
                raise self._not_json(error) from None
        return self.decode(wanted)

    def decode_part(self, raw: msgspec.Raw) -> Any:
        """A part of the file as plain Python values. Raises AnnotationError."""
        try:
            return msgspec.json.decode(raw)
        except UnicodeDecodeError as error:
            raise self._not_utf8(error) from None
        except msgspec.DecodeError as error:
            raise self._not_json(error) from None

    def first_item(self, raw: msgspec.Raw) -> Any:
        """The first value of the list `raw`; None where it has none."""
        text, decoder, size = memoryview(raw)[1:], json.JSONDecoder(), 2**16
        while True:
            begin = bytes(text[:size]).decode(errors="ignore").lstrip()
            try:
                return decoder.raw_decode(begin)[0]
            except json.JSONDecodeError:
                if size >= len(text):
                    return None
                size *= 16

    def pairs(self) -> list[tuple[str, msgspec.Raw]]:
        """Keys and values of the JSON object that the file is; a key that stands there twice comes twice."""
        pairs, at = self.decode(dict[str, msgspec.Raw]), 0
        for raw in pairs.values():
            key, value = _KEY.match(self._bytes, at), memoryview(raw)
            at = key.end() if key else 0
            if self._bytes[at : (end := at + len(value))] != value:
                break  # a later value has taken this key from the one that stands here
            at = end
        if not _END.fullmatch(self._bytes, at):
            return _all_pairs(bytes(self._bytes).decode())
        return list(pairs.items())

    def slices(
        self, field: str, raw: msgspec.Raw, item: type[T], read: Callable[[Any], T], skipped: SkippedRecords
    ) -> Iterator[Slice[T]]:
        """The objects of the list `raw`, in order, some 16 MB of JSON at a time.

        `field` is where the list stands in the file: "annotations", or "" for the file itself. `read` makes an item
        of a record that does not fit the type `item` as it is; those for which it raises FieldError are `skipped`.
        """
        decoder, one_by_one = msgspec.json.Decoder(list[item]), msgspec.json.Decoder(list[msgspec.Raw])  # type: ignore[valid-type]
        whole = memoryview(raw)
        if bytes(whole[:1]) != b"[":
            kind = {b"{": "an object", b'"': "text", b"n": "null"}.get(bytes(whole[:1]), "a number")
            raise self.refuse(f"`{field or 'the file'}` is {kind}, expected a list")
        first, start, cut, end = 0, 1, 1, len(whole) - 1
        while cut < end:
            between = _BETWEEN_OBJECTS.search(whole, max(cut, start + SLICE_BYTES), end)
            cut = between.start() + 1 if between else end
            piece = b"[" + whole[start:cut] + b"]"
            try:
                try:
                    found = Slice(items := decoder.decode(piece), range(first, first + len(items)))
                    count = len(items)
                except msgspec.ValidationError:
                    records = one_by_one.decode(piece)
                    found, count = _one_by_one(field, records, first, item, read, skipped), len(records)
            except UnicodeDecodeError as error:
                raise self._not_utf8(error) from None
            except msgspec.DecodeError as error:
                if between is None:
                    raise self._not_json(error) from None
                cut = between.end()  # this cut lay inside a nested list or a string: go on to the next one
                continue
            yield found
            first += count
            start = cut = between.end() if between else end

    def refuse(self, what: str) -> AnnotationError:
        """The error for this file, ready to be raised."""
        return AnnotationError(f"{self.path}: {what}")

    def _not_utf8(self, error: UnicodeDecodeError) -> AnnotationError:
        byte = error.object[error.start]
        return self.refuse(f"is not text in UTF-8 (byte 0x{byte:02x} cannot stand there); save it as UTF-8")

    def _not_json(self, error: msgspec.DecodeError) -> AnnotationError:
        begin = bytes(self._bytes[:64]).lstrip()
        for kind, what in _OTHER_KINDS:
            if begin.startswith(kind):
                return self.refuse(what)
        if "truncated" in str(error):
            return self.refuse(f"is cut off, its JSON has no end ({self.path.stat().st_size:,} bytes); fetch it again")
        reason = str(error).removeprefix("JSON is malformed: ")
        if "trailing characters" in reason:
            return self.refuse(f"goes on behind the end of its JSON ({reason}); expected one JSON value in the file")
        return self.refuse(f"is not valid JSON ({reason})")

    def _take_out_not_finite(self) -> bool:
        """Whether there was any NaN or Infinity; each is null from now on."""
        if not _NOT_FINITE.search(self._bytes):
            return False
        mended = _STRING_OR_NOT_FINITE.sub(lambda at: at[0] if at[0][:1] == b'"' else b"null", self._bytes)
        before, self._bytes = self._bytes, memoryview(mended)
        return before != self._bytes


def _one_by_one(
    field: str,
    records: list[msgspec.Raw],
    first: int,
    item: type[T],
    read: Callable[[Any], T],
    skipped: SkippedRecords,
) -> Slice[T]:
    decoder = msgspec.json.Decoder(item)
    items, places = [], []
    for place, raw in enumerate(records, first):
        try:
            try:
                found = decoder.decode(raw)
            except msgspec.ValidationError:
                found = read(msgspec.json.decode(raw))
        except FieldError as error:
            skipped.add(field or "records", f"{field}[{place}]{error}")
            continue
        items.append(found)
        places.append(place)
    return Slice(items, places)


def _all_pairs(text: str) -> list[tuple[str, msgspec.Raw]]:
    """Keys and values of a JSON object, read by Python: slow, for objects with a key that comes twice."""
    decoder, pairs = json.JSONDecoder(), []
    at = text.index("{") + 1
    while key := _KEY_TEXT.match(text, at):
        _, end = decoder.raw_decode(text, key.end())
        pairs.append((json.loads(key[1]), msgspec.Raw(text[key.end() : end])))
        at = end
    return pairs


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
