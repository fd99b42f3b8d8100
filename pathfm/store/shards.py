"""zarr v3 shard files, written and read directly: one encoded tile per inner chunk.

A shard is the bytes of its chunks, then an index of (offset, length) pairs as little-endian uint64, one per chunk slot,
then the CRC-32C of that index; an absent chunk has both numbers at 2^64 - 1 (zarr v3 sharding_indexed codec, index at the
end). Reading through the general zarr machinery costs about a millisecond per tile; a cached index and one positioned read
cost microseconds.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4
OPEN_SHARDS = 64
"""Shard files kept open by one reader."""


def write_shard(path: Path, chunks: Sequence[bytes], slots: int) -> None:
    """Writes ``chunks`` as one shard file with ``slots`` index entries."""
    lengths = np.array([len(chunk) for chunk in chunks], dtype=np.uint64)
    index = np.full((slots, 2), ABSENT, dtype="<u8")
    index[: len(chunks), 0] = np.concatenate([[np.uint64(0)], np.cumsum(lengths)[:-1]]) if len(chunks) else 0
    index[: len(chunks), 1] = lengths
    encoded = index.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.writelines(chunks)
        stream.write(encoded)
        stream.write(google_crc32c.value(encoded).to_bytes(CRC_BYTES, "little"))


class ShardReader:
    """Encoded tiles by number, from the shard files of one array.

    Args:
        folder: the array's folder; shard k is ``folder/c/k/0/0/0``.
        slots: tiles per shard.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self._folder, self._slots = folder, slots
        self._open: OrderedDict[int, tuple[int, npt.NDArray[np.uint64]]] = OrderedDict()

    def read(self, number: int) -> bytes:
        """The encoded bytes of tile ``number``.

        Raises:
            StoreError: the shard is absent, truncated or its index is damaged.
        """
        shard, slot = divmod(number, self._slots)
        handle, index = self._shard(shard)
        offset, length = (int(value) for value in index[slot])
        if offset == int(ABSENT):
            raise StoreError(f"tile {number} is absent", where=str(self._folder))
        data = os.pread(handle, length, offset)
        if len(data) != length:
            raise StoreError(f"tile {number} is cut off", where=str(self._folder), fix="delete the store and tile again")
        return data

    def _shard(self, shard: int) -> tuple[int, npt.NDArray[np.uint64]]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self._folder / "c" / str(shard) / "0" / "0" / "0"
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError("shard cannot be opened", where=str(path), fix="delete the store and tile again") from error
        try:
            index = self._index(handle, path)
        except StoreError:
            os.close(handle)
            raise
        self._open[shard] = handle, index
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return handle, index

    def _index(self, handle: int, path: Path) -> npt.NDArray[np.uint64]:
        length = self._slots * 16 + CRC_BYTES
        size = os.fstat(handle).st_size
        tail = os.pread(handle, length, max(0, size - length))
        encoded, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
        if len(tail) != length or google_crc32c.value(encoded) != int.from_bytes(crc, "little"):
            raise StoreError("shard index is damaged", where=str(path), fix="delete the store and tile again")
        return np.frombuffer(encoded, dtype="<u8").reshape(self._slots, 2)

    def close(self) -> None:
        """Closes all shard files."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()
