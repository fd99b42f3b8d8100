"""Writes features as CLAM, TRIDENT and STAMP do: the same datasets, types, chunks and attributes. See ``docs/interop.md``.

Other tools know no tiles that could not be read, so that only valid rows are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.geometry import Size
from pathfm.store.feature_file import FeatureFile
from pathfm.store.interop.coords_file import Attribute
from pathfm.store.interop.foreign import positive
from pathfm.store.interop.trident import Grid, trident_attrs

CLAM_ROWS = 32
"""Rows of a chunk: those of a batch."""
STAMP_VERSION = "2.0.0"
"""The oldest version with this layout: STAMP refuses files of versions newer than its own."""
SQUARE_WITHIN = 0.01
"""How much the sides of tiles may differ for tools that know one."""
AGAIN = "run `pathfm extract` again: the file is of an older version"


def write_clam_features(path: Path, slide_id: str, file: FeatureFile) -> None:
    """Writes ``h5_files/<slide_id>.h5`` of CLAM, at the place given: float32 features, int32 corners."""
    features, coords = file.features[file.valid].astype(np.float32), file.coords[file.valid].astype(np.int32)
    rows = max(1, min(CLAM_ROWS, len(coords)))
    with h5py.File(path, "w") as target:
        _growing(target, "features", features, rows)
        _growing(target, "coords", coords, rows)


def write_trident_features(path: Path, slide_id: str, file: FeatureFile) -> None:
    """Writes ``features_<encoder>/<slide_id>.h5`` of TRIDENT, at the place given: features in their type, int64 corners.

    Raises:
        StoreError: the slide's size, or both mpp and objective, are unknown.
    """
    _check_square(slide_id, file)
    attrs, coords = file.attrs, file.coords[file.valid]
    tile_px, side = positive(attrs, "tile_px"), positive(attrs, "tile_side_level0")
    width, height = positive(attrs, "slide_width_level0"), positive(attrs, "slide_height_level0")
    if not (tile_px and side and width and height):
        what = "TRIDENT needs the sizes of tiles and slide, which the features do not say"
        raise StoreError(what, where=slide_id, fix=AGAIN)
    size, mpp, objective = Size(round(width), round(height)), positive(attrs, "mpp"), positive(attrs, "objective")
    grid = Grid(Path(slide_id), slide_id, round(tile_px), side, mpp, size, coords, objective)
    said = trident_attrs(grid)
    with h5py.File(path, "w") as target:
        features = _growing(target, "features", file.features[file.valid], 1)
        features.attrs.update({"encoder": encoder_name(file), "name": slide_id, "savetodir": ""})
        _growing(target, "coords", coords, 1).attrs.update(said)


def write_stamp_features(path: Path, slide_id: str, file: FeatureFile) -> None:
    """Writes ``<extractor>-<hash>/<slide_id>.h5`` of STAMP, at the place given: float16 features, corners in micrometres.

    Raises:
        StoreError: mpp is unknown, or a feature is too large for float16.
    """
    _check_square(slide_id, file)
    mpp, tile_px, side = (positive(file.attrs, name) for name in ("mpp", "tile_px", "tile_side_level0"))
    if not mpp or not tile_px or not side:
        raise StoreError("STAMP counts in micrometres, and the slide's mpp is unknown", where=slide_id)
    with np.errstate(over="ignore"):
        features = file.features[file.valid].astype(np.float16)
    if not np.isfinite(features).all():
        raise StoreError("features too large for STAMP's float16", where=slide_id)
    um_per_px = mpp * tile_px / side
    attrs: dict[str, Attribute] = {
        "stamp_version": STAMP_VERSION,
        "extractor": encoder_name(file),
        "unit": "um",
        "tile_size_um": mpp * tile_px,
        "tile_size_px": round(tile_px),
        "code_hash": recipe_hash(file),
        "feat_type": "tile",
    }
    with h5py.File(path, "w") as target:
        target.create_dataset("coords", data=(file.coords[file.valid] * um_per_px).astype(np.float32), track_times=False)
        target.create_dataset("feats", data=features, track_times=False)
        target.attrs.update(attrs)


def encoder_name(file: FeatureFile) -> str:
    """The encoder as a name of folders."""
    name = str(file.attrs.get("encoder", "encoder"))
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)


def recipe_hash(file: FeatureFile) -> str:
    """Eight digits that differ wherever the recipe does."""
    return str(file.attrs.get("recipe_hash", ""))[:8] or "00000000"


def _check_square(slide_id: str, file: FeatureFile) -> None:
    side = positive(file.attrs, "tile_side_level0") or 0.0
    height = positive(file.attrs, "tile_height_level0") or side
    if abs(height - side) > SQUARE_WITHIN * side:
        raise StoreError("the tool only knows square tiles, and the slide's pixels are not square", where=slide_id)


def _growing(file: h5py.File, name: str, values: npt.NDArray[Any], rows: int) -> h5py.Dataset:
    """A dataset in chunks of some rows that may grow. track_times off: the same features give the same bytes."""
    width = values.shape[1]
    return file.create_dataset(name, data=values, chunks=(rows, width), maxshape=(None, width), track_times=False)
