"""New HDF5 files. HDF5 does not survive a full disk: what it cannot close stays open, broken, until the process ends.

It therefore writes to memory, and what it wrote is copied to the drive, where errors are those of any file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import h5py

from pathfm.errors import StoreError

MEMORY = Path("/dev/shm")
"""Files in it lie in memory, gaps take none; where there is no such folder, that of temporary files does."""
BLOCK_BYTES = 2**16

Made = TypeVar("Made")


def write_hdf5(path: Path, libver: str | tuple[str, str], fill: Callable[[h5py.File], Made]) -> Made:
    """Makes an HDF5 file, the same bytes as if HDF5 wrote to the drive; data that ``fill`` leaves unwritten take no memory.

    Args:
        path: the file to make or replace.
        libver: oldest and newest format of what is in it.
        fill: gets the empty file; what it returns is passed on.

    Raises:
        StoreError: there is no room for the draft.
        OSError: of the drive that ``path`` lies on.
    """
    folder = MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryDirectory(prefix="pathfm-", dir=folder) as drafts:
            draft = Path(drafts, "draft.h5")
            with h5py.File(draft, "w", libver=libver) as file:
                made = fill(file)
            size, blocks = draft.stat().st_size, _blocks(draft)
    except (OSError, RuntimeError) as error:
        raise StoreError("temporary files cannot be written", where=str(folder), fix="make room there") from error
    with path.open("wb") as target:
        target.truncate(size)
        for start, block in blocks.items():
            target.seek(start)
            target.write(block)
    return made


def _blocks(path: Path) -> dict[int, bytes]:
    """What a file holds, by where it starts, without blocks of zeros: gaps are read as such."""
    blocks = {}
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            if block != bytes(len(block)):
                blocks[file.tell() - len(block)] = block
    return blocks
