"""A read-only zarr-python store that reads through a Storage, with its retries and local mirror."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from regionspot.cache.storage.base import Storage


class ReadOnlyZarrStore(Store):
    """The files of a storage. `listing` is zarr-python's own store at the same address."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, storage: Storage, listing: Store) -> None:
        super().__init__(read_only=True)
        self._storage, self._listing = storage, listing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReadOnlyZarrStore) and other._storage is self._storage

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            data = await asyncio.to_thread(self._read, key, byte_range)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._storage.exists, key)

    async def set(self, key: str, value: Buffer) -> None:
        raise PermissionError("this store is read-only; write through zarr_store(read_only=False)")

    async def delete(self, key: str) -> None:
        raise PermissionError("this store is read-only; write through zarr_store(read_only=False)")

    async def list(self) -> AsyncIterator[str]:
        async for key in self._listing.list():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self._listing.list_prefix(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for key in self._listing.list_dir(prefix):
            yield key

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes:
        if byte_range is None:
            return self._storage.read(key)
        if isinstance(byte_range, RangeByteRequest):
            start, stop = byte_range.start, byte_range.end
        else:
            stop = self._storage.size(key)
            if isinstance(byte_range, OffsetByteRequest):
                start = byte_range.offset
            elif isinstance(byte_range, SuffixByteRequest):
                start = max(stop - byte_range.suffix, 0)
            else:
                raise TypeError(f"zarr requested {byte_range!r}, an unknown kind of byte range")
        data = bytearray(stop - start)
        self._storage.read_into(key, start, memoryview(data))
        return bytes(data)
