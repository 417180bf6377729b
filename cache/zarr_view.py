"""Any Storage as a store that zarr-python reads: for those that have none of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from regionspot.cache.storage import Storage


class ZarrView(Store):
    """The files of a storage, to read. Folders are not listed: zarr.json names all that is read here."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, storage: Storage) -> None:
        super().__init__(read_only=True)
        self._storage = storage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrView) and other._storage is self._storage

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            data = await asyncio.to_thread(self._read, key, byte_range)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, asked) for key, asked in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._storage.exists, key)

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError("a cache is not written through zarr")

    async def delete(self, key: str) -> None:
        raise NotImplementedError("a cache is not written through zarr")

    async def list(self) -> AsyncIterator[str]:
        raise NotImplementedError("a cache is not listed through zarr")
        yield  # an iterator, of nothing

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("a cache is not listed through zarr")
        yield

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("a cache is not listed through zarr")
        yield

    def _read(self, key: str, asked: ByteRequest | None) -> bytes:
        if asked is None:
            return self._storage.read(key)
        size = self._storage.size(key)
        if isinstance(asked, RangeByteRequest):
            start, stop = asked.start, min(asked.end, size)
        elif isinstance(asked, OffsetByteRequest):
            start, stop = asked.offset, size
        elif isinstance(asked, SuffixByteRequest):
            start, stop = max(size - asked.suffix, 0), size
        data: Any = bytearray(max(stop - start, 0))
        self._storage.read_into(key, start, memoryview(data))
        return bytes(data)
