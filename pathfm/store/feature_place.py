"""Where the features lie in an HDF5 file, so that they can be read without HDF5: at disk speed, from several threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.store.feature_file import DAMAGE


@dataclass(frozen=True)
class FeaturePlace:
    """A matrix in a file, row after row.

    Attributes:
        path: the file.
        start: byte where the first row begins.
        shape: rows N and columns D.
        dtype: of the values.
        stamp: of the file as it was then.
    """

    path: Path
    start: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    stamp: tuple[int, ...]


def find_place(path: Path, dataset: str = "features") -> FeaturePlace | None:
    """The place of a two-dimensional dataset; None when it is chunked, compressed or absent, or this is no HDF5 file."""
    try:
        stamp = file_stamp(path.stat())
        with h5py.File(path, "r") as file:
            found = file[dataset]
            start = found.id.get_offset()
            if start is None or found.chunks is not None or len(found.shape) != 2:
                return None
            return FeaturePlace(path, int(start), (int(found.shape[0]), int(found.shape[1])), found.dtype, stamp)
    except DAMAGE:
        return None


def file_stamp(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_place(place: FeaturePlace) -> npt.NDArray[Any]:
    """All rows of a place.

    Raises:
        StoreError: the file has gone or changed.
    """
    values = np.empty(place.shape, place.dtype)
    view = memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    try:
        with place.path.open("rb", buffering=0) as file:
            changed = file_stamp(os.fstat(file.fileno())) != place.stamp
            file.seek(place.start)
            while view and (count := file.readinto(view)):
                view = view[count:]
    except OSError as error:
        raise StoreError(f"cannot be read any more ({error.strerror})", where=str(place.path)) from error
    if view or changed:
        raise StoreError("the file has changed while it was in use", where=str(place.path), fix="run the command again")
    return values
