"""What zarr-python reads a remote cache by: files come through our Storage, with its retries and its local copy;
folders are listed by zarr-python's own store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from regionspot.cache.storage.base import Storage


class ZarrView(Store):
    """The files of a storage, to read. `listing` is a store of zarr-python at the same place."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, storage: Storage, listing: Store) -> None:
        super().__init__(read_only=True)
        self._storage, self._listing = storage, listing

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
        raise PermissionError("this view of a cache is to read; write through zarr_store(read_only=False)")

    async def delete(self, key: str) -> None:
        raise PermissionError("this view of a cache is to read; write through zarr_store(read_only=False)")

    async def list(self) -> AsyncIterator[str]:
        async for key in self._listing.list():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self._listing.list_prefix(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for key in self._listing.list_dir(prefix):
            yield key

    def _read(self, key: str, asked: ByteRequest | None) -> bytes:
        if asked is None:
            return self._storage.read(key)
        if isinstance(asked, RangeByteRequest):
            start, stop = asked.start, asked.end
        else:
            size = self._storage.size(key)
            start = asked.offset if isinstance(asked, OffsetByteRequest) else max(size - _suffix(asked), 0)
            stop = size
        data = bytearray(stop - start)
        self._storage.read_into(key, start, memoryview(data))
        return bytes(data)


def _suffix(asked: ByteRequest) -> int:
    if not isinstance(asked, SuffixByteRequest):
        raise TypeError(f"zarr asks for {asked!r}, which is no range of bytes known here")
    return asked.suffix
