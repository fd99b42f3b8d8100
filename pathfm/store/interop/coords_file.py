"""HDF5 files with a dataset ``coords``: what CLAM, TRIDENT, STAMP and AtlasPatch have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from pathfm.store.interop.foreign import MAX_TILES, UnfitError

Attribute = int | float | str | npt.NDArray[Any]


class CoordsFile(NamedTuple):
    """Everything in such a file that says where tiles lie.

    Attributes:
        coords: [N, K], x and y first.
        attrs: attributes of the dataset ``coords``, and of ``imgs`` where an older CLAM put them.
        file_attrs: attributes of the file.
        picture_px: side of stored pictures (dataset ``imgs``), None without them.
    """

    coords: npt.NDArray[np.float64]
    attrs: Mapping[str, Any]
    file_attrs: Mapping[str, Any]
    picture_px: int | None


def read_coords_file(path: Path) -> CoordsFile:
    """Reads the coordinates and all attributes, no features and no pictures.

    Raises:
        UnfitError, OSError, RuntimeError, KeyError, ValueError: not such a file, or damaged.
    """
    with h5py.File(path, "r") as file:
        coords = file["coords"]
        if not isinstance(coords, h5py.Dataset) or coords.dtype.kind not in "iuf":
            raise UnfitError("coords are no numbers")
        if coords.ndim != 2 or not 2 <= coords.shape[1] <= 5 or len(coords) > MAX_TILES:
            raise UnfitError(f"coords of shape {coords.shape}")
        if coords.compression is None and coords.id.get_storage_size() < coords.nbytes:
            raise UnfitError("coords that are cut off")
        attrs, picture_px, pictures = dict(coords.attrs), None, file.get("imgs")
        if isinstance(pictures, h5py.Dataset) and pictures.ndim == 4:
            attrs, picture_px = {**pictures.attrs, **attrs}, int(pictures.shape[1])
        return CoordsFile(coords[()].astype(np.float64), attrs, dict(file.attrs), picture_px)


def write_coords_file(path: Path, xy_level0: npt.NDArray[np.int64], attrs: Mapping[str, Attribute]) -> None:
    """Writes ``coords`` [N, 2] int64 in chunks of one row, with attributes on the dataset, as CLAM and TRIDENT do."""
    with h5py.File(path, "w") as file:
        # track_times off: the same tiles give the same bytes.
        coords = file.create_dataset(
            "coords", data=xy_level0.astype(np.int64), chunks=(1, 2), maxshape=(None, 2), track_times=False
        )
        for name, value in attrs.items():
            coords.attrs[name] = value
