"""Feature files: one HDF5 per slide, ``features [N, D]`` and ``coords [N, 2]``, contiguous, whole or absent.

Specified in ``docs/feature-file.md``. Contiguous storage is read at disk speed and in random rows; row-sized chunks, as some
tools write, make both several times slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.faults import crash_point
from pathfm.store.commit import commit_file

FORMAT = "pathfm-features"
VERSION = 1


@dataclass(frozen=True)
class FeatureFile:
    """Features of one slide.

    Attributes:
        features: [N, D] float16 or float32, row i belongs to tile i of the store.
        coords: [N, 2] int64, x and y of the tiles' upper left corners in level-0 pixels.
        attrs: encoder, recipe, fingerprint and geometry, as written.
    """

    features: npt.NDArray[Any]
    coords: npt.NDArray[np.int64]
    attrs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What the features depend on."""
        return str(self.attrs["fingerprint"])


def write_features(
    path: Path, features: npt.NDArray[Any], coords: npt.NDArray[np.int64], attrs: Mapping[str, str | int | float | bool]
) -> None:
    """Writes a feature file, whole or not at all.

    Raises:
        StoreError: rows of features and coordinates differ, or a feature is not finite.
    """
    if len(features) != len(coords):
        raise StoreError(f"{len(features)} feature rows for {len(coords)} tiles", where=str(path))
    if not np.isfinite(features).all():
        raise StoreError("features are not finite", where=str(path), fix="try extract.precision: fp32, dtype: float32")
    with commit_file(path) as temporary, h5py.File(temporary, "w", libver="latest") as file:
        # track_times off: the same features give the same bytes.
        file.create_dataset("features", data=features, track_times=False)
        crash_point("store.feature_file.between_datasets")
        file.create_dataset("coords", data=coords.astype(np.int64), track_times=False)
        file.attrs.update({"format": FORMAT, "version": VERSION, **dict(attrs)})


def open_features(path: Path | str) -> FeatureFile:
    """Reads and verifies a feature file.

    Raises:
        StoreError: absent, damaged, of another tool, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError("no feature file", where=str(path), fix="run `pathfm extract` first")
    try:
        with h5py.File(path, "r") as file:
            attrs = {name: _plain(value) for name, value in file.attrs.items()}
            _check_format(path, attrs)
            features, coords = file["features"][()], file["coords"][()]
    except (OSError, KeyError) as error:
        raise StoreError("damaged feature file", where=str(path), fix="delete it and run `pathfm extract` again") from error
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise StoreError(f"features {features.shape} do not fit coords {coords.shape}", where=str(path))
    return FeatureFile(features, coords, attrs)


def read_feature_attrs(path: Path) -> dict[str, Any] | None:
    """Attributes of a feature file without its data; None when it is absent or cannot be read."""
    try:
        with h5py.File(path, "r") as file:
            attrs = {name: _plain(value) for name, value in file.attrs.items()}
            return attrs if {"features", "coords"} <= set(file) else None
    except OSError:
        return None


def _check_format(path: Path, attrs: Mapping[str, Any]) -> None:
    if attrs.get("format") != FORMAT:
        raise StoreError("not a pathfm feature file", where=str(path))
    if int(attrs["version"]) > VERSION:
        raise StoreError(
            f"written by a newer pathfm (format version {attrs['version']})", where=str(path), fix="upgrade pathfm"
        )


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value
