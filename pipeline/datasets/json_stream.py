"""Read one annotation or proposals file: map it into memory, hash it, and decode it slice by slice.

A JSON file of ten million boxes takes 3 GB as Python objects. Here its long lists are located as raw bytes (msgspec
skips unused fields such as segmentations) and then decoded 16 MB at a time, so that the caller can convert each slice
to columns and release its objects.

Records that msgspec rejects are parsed one by one (field_parsing.py). Unreadable records are counted and left out,
unless they are more than a limit allows.
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

SLICE_BYTES = 16 * 2**20  # about 100,000 boxes without segmentation; their objects take about 40 MB
_BETWEEN_OBJECTS = re.compile(rb"\}\s*,\s*(?=\{)")
# Python's json writes NaN and Infinity, which are not valid JSON. Strings are matched first, so that a name that
# contains one of them is not changed.
_STRING_OR_NOT_FINITE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?\b(?:NaN|Infinity)\b')
_NOT_FINITE = re.compile(rb"NaN|Infinity")
_KEY = re.compile(rb'\s*[{,]\s*"[^"\\]*(?:\\.[^"\\]*)*"\s*:\s*')  # a key of an object and what precedes it
_END = re.compile(rb"\s*(\{\s*)?\}\s*")  # the end of an object, which may be empty
_KEY_TEXT = re.compile(r'[\s,]*("[^"\\]*(?:\\.[^"\\]*)*")\s*:\s*')
_UTF8_BOM = b"\xef\xbb\xbf"
# First bytes of files that are not JSON in UTF-8, and what to do.
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
    (b"\x80", "is a Python pickle, which may run code when it is loaded; write its lists as JSON"),
    (b"//", "has comments, which JSON does not allow; remove them"),
    (b"/*", "has comments, which JSON does not allow; remove them"),
    (b"<", "is HTML or XML, not JSON, perhaps a server's error page; download it again"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
)


@dataclass(frozen=True)
class Slice(Generic[T]):
    """Some of a list's objects, and their indices in the list."""

    items: list[T]
    indices: Sequence[int]


class AnnotationFile:
    """A JSON or CSV file and its SHA-256. Raises AnnotationError if it does not exist or is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = _mapped(path)
        self.sha256 = hashlib.sha256(mapped).hexdigest()
        self._bytes = memoryview(mapped)
        if self._bytes[:3] == _UTF8_BOM:
            self._bytes = self._bytes[3:]

    @property
    def source(self) -> dict[str, dict[str, str]]:
        """The `source` of a manifest."""
        return {"files": {self.path.name: self.sha256}}

    @property
    def is_list(self) -> bool:
        """Whether the JSON is a list rather than an object."""
        return bytes(self._bytes[:4096]).lstrip()[:1] == b"["

    def decode(self, target: type[T]) -> T:
        """The whole file as an object of type `target`; parts typed msgspec.Raw stay bytes, for `slices`.

        NaN and Infinity, which Python's json writes, become null. Raises AnnotationError.
        """
        try:
            return msgspec.json.decode(self._bytes, type=target)
        except msgspec.ValidationError as error:
            raise self.error(str(error)) from None
        except UnicodeDecodeError as error:
            raise self._not_utf8(error) from None
        except RecursionError as error:
            raise self._not_json(error) from None
        except msgspec.DecodeError as error:
            if not self._replace_not_finite():
                raise self._not_json(error) from None
        return self.decode(target)

    def decode_part(self, raw: msgspec.Raw) -> Any:
        """A part of the file as plain Python values. Raises AnnotationError."""
        try:
            return msgspec.json.decode(raw)
        except UnicodeDecodeError as error:
            raise self._not_utf8(error) from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._not_json(error) from None

    def first_item(self, raw: msgspec.Raw) -> Any:
        """The first value of the list `raw`; None if it is empty."""
        text, decoder, size = memoryview(raw)[1:], json.JSONDecoder(), 2**16
        while True:
            beginning = bytes(text[:size]).decode(errors="ignore").lstrip()
            try:
                return decoder.raw_decode(beginning)[0]
            except json.JSONDecodeError:
                if size >= len(text):
                    return None
                size *= 16

    def pairs(self) -> list[tuple[str, msgspec.Raw]]:
        """Keys and values of the file's JSON object; a repeated key is returned each time."""
        pairs, position = self.decode(dict[str, msgspec.Raw]), 0
        for raw in pairs.values():
            key, value = _KEY.match(self._bytes, position), memoryview(raw)
            position = key.end() if key else 0
            if self._bytes[position : (end := position + len(value))] != value:
                break  # the key is repeated, and the dict has its last value
            position = end
        if not _END.fullmatch(self._bytes, position):
            return _all_pairs(bytes(self._bytes).decode())
        return list(pairs.items())

    def slices(
        self, field: str, raw: msgspec.Raw, item: type[T], read: Callable[[Any], T], skipped: SkippedRecords
    ) -> Iterator[Slice[T]]:
        """The objects of the list `raw`, in order, about 16 MB of JSON at a time.

        `field` is the name of the list, or "" if the file itself is the list. `read` converts a record that does not
        match the type `item`; if it raises FieldError, the record is added to `skipped`.
        """
        decoder, one_by_one = msgspec.json.Decoder(list[item]), msgspec.json.Decoder(list[msgspec.Raw])  # type: ignore[valid-type]
        whole = memoryview(raw)
        if bytes(whole[:1]) != b"[":
            kind = {b"{": "an object", b'"': "text", b"n": "null"}.get(bytes(whole[:1]), "a number")
            raise self.error(f"`{field or 'the file'}` is {kind}, expected a list")
        first, start, cut, end = 0, 1, 1, len(whole) - 1
        while cut < end:
            between = _BETWEEN_OBJECTS.search(whole, max(cut, start + SLICE_BYTES), end)
            cut = between.start() + 1 if between else end
            text = b"[" + whole[start:cut] + b"]"
            try:
                try:
                    decoded = Slice(items := decoder.decode(text), range(first, first + len(items)))
                    count = len(items)
                except msgspec.ValidationError:
                    records = one_by_one.decode(text)
                    decoded, count = _one_by_one(field, records, first, item, read, skipped), len(records)
            except UnicodeDecodeError as error:
                raise self._not_utf8(error) from None
            except msgspec.DecodeError as error:
                if between is None:
                    raise self._not_json(error) from None
                cut = between.end()  # the cut was inside a nested list or a string: try the next one
                continue
            yield decoded
            first += count
            start = cut = between.end() if between else end

    def error(self, message: str) -> AnnotationError:
        """An AnnotationError that names this file."""
        return AnnotationError(f"{self.path}: {message}")

    def _not_utf8(self, error: UnicodeDecodeError) -> AnnotationError:
        byte = error.object[error.start]
        return self.error(f"is not valid UTF-8 (byte 0x{byte:02x}); save it as UTF-8")

    def _not_json(self, error: msgspec.DecodeError | RecursionError) -> AnnotationError:
        beginning = bytes(self._bytes[:64]).lstrip()
        for magic, message in _OTHER_KINDS:
            if beginning.startswith(magic):
                return self.error(message)
        if "truncated" in str(error):
            return self.error(f"is truncated ({self.path.stat().st_size:,} bytes); download it again")
        reason = str(error).removeprefix("JSON is malformed: ")
        if "trailing characters" in reason:
            return self.error(f"has text after the end of its JSON ({reason}); expected one JSON value in the file")
        return self.error(f"is not valid JSON ({reason})")

    def _replace_not_finite(self) -> bool:
        """Replace NaN and Infinity by null; whether there were any."""
        if not _NOT_FINITE.search(self._bytes):
            return False
        replaced = _STRING_OR_NOT_FINITE.sub(lambda match: match[0] if match[0][:1] == b'"' else b"null", self._bytes)
        before, self._bytes = self._bytes, memoryview(replaced)
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
    items, indices = [], []
    for index, raw in enumerate(records, first):
        try:
            try:
                record = decoder.decode(raw)
            except msgspec.ValidationError:
                record = read(msgspec.json.decode(raw))
        except FieldError as error:
            skipped.add(field or "records", f"{field}[{index}]{error}")
            continue
        items.append(record)
        indices.append(index)
    return Slice(items, indices)


def _all_pairs(text: str) -> list[tuple[str, msgspec.Raw]]:
    """Keys and values of a JSON object with repeated keys, by Python's slow decoder."""
    decoder, pairs = json.JSONDecoder(), []
    position = text.index("{") + 1
    while key := _KEY_TEXT.match(text, position):
        _, end = decoder.raw_decode(text, key.end())
        pairs.append((json.loads(key[1]), msgspec.Raw(text[key.end() : end])))
        position = end
    return pairs


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise AnnotationError(f"{path}: does not exist; check the path") from None
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); check its type and permissions") from None
    except ValueError:  # mmap raises this for an empty file
        raise AnnotationError(f"{path}: is empty; download it again") from None
