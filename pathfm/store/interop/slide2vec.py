"""slide2vec and hs2p: ``tiles/<slide_id>.coordinates.npz``, ``tile_embeddings/<slide_id>.npz`` or ``.pt``.

Beside each lies a ``.meta.json``. That of the features is written last: without it they are not finished.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pathfm.geometry import Size
from pathfm.store.commit import read_json
from pathfm.store.interop.foreign import ForeignTiles, UnfitError, needed, positive, whole
from pathfm.store.interop.foreign_features import ForeignFeatures, feature_rows, tile_features

ENDING = ".coordinates.npz"
FOLDER = "tile_embeddings"


def read_slide2vec(path: Path) -> ForeignTiles:
    """Tiles of slide2vec.

    Raises:
        StoreError: the file beside it is absent or damaged.
        OSError, KeyError, ValueError: not such a file, or damaged.
    """
    # Opened here, because NumPy leaves damaged files open.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        xy = np.stack([arrays["x"], arrays["y"]], axis=1).astype(np.float64)
    meta = read_json(path.with_name(path.name.removesuffix(".npz") + ".meta.json"))
    tiling, slide = meta["tiling"], meta["slide"]
    side, tile_px = needed(tiling, "tile_size_lv0"), positive(tiling, "requested_tile_size_px")
    mpp = positive(slide, "base_spacing_um")
    width, height = slide["dimensions"]
    return ForeignTiles(
        "slide2vec", xy, side, whole(tile_px), mpp * side / tile_px if mpp and tile_px else None, Size(int(width), int(height))
    )


def is_slide2vec(path: Path) -> bool:
    """Whether a file of features is slide2vec's, by its place or by what lies beside it."""
    return path.parent.name == FOLDER or _meta(path).is_file()


def read_slide2vec_features(path: Path) -> ForeignFeatures:
    """Features of slide2vec from an npz file, each with the tile that its index names.

    Raises:
        UnfitError, StoreError: not finished, or features and tiles do not fit.
        OSError, KeyError, ValueError: not such a file, or damaged.
    """
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        if "features" not in arrays:
            raise UnfitError("no file of features")
        return slide2vec_features(path, arrays["features"], arrays.get("tile_index"))


def slide2vec_features(
    path: Path, values: npt.NDArray[Any], tile_index: npt.NDArray[np.int64] | None = None
) -> ForeignFeatures:
    """Features of slide2vec with what lies beside their file.

    Args:
        path: the file they come from.
        values: [N, D], or [D] for a slide.
        tile_index: [N] numbers of their tiles; without it they are in the order of the coordinates.

    Raises:
        UnfitError, StoreError: not finished, or features and tiles do not fit.
    """
    if not _meta(path).is_file():
        raise UnfitError(f"not finished: {_meta(path).name} is not there")
    meta = read_json(_meta(path))
    encoder = str(meta["encoder_name"]) if "encoder_name" in meta else None
    if values.ndim == 1 and len(values):
        return ForeignFeatures("slide2vec", feature_rows(values[None]), encoder=encoder, level="slide")
    stated = (meta.get("num_tiles", len(values)), meta.get("feature_dim", *values.shape[1:2]))
    if values.shape != stated and len(values):
        raise UnfitError(f"features {values.shape}, where {_meta(path).name} says {stated}")
    place = path.parents[1] / "tiles" / f"{path.stem}{ENDING}"
    if not place.is_file():
        return ForeignFeatures("slide2vec", feature_rows(values), encoder=encoder)
    tiles = read_slide2vec(place)
    if tile_index is not None:
        tiles = replace(tiles, xy_level0=tiles.xy_level0[_rows(place, tile_index)])
    return tile_features(values, tiles, encoder)


def _meta(path: Path) -> Path:
    return path.with_name(f"{path.stem}.meta.json")


def _rows(coordinates: Path, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of tiles among the coordinates, by their numbers."""
    with coordinates.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        row_of = {number: row for row, number in enumerate(arrays["tile_index"].tolist())}
    if len(set(wanted.tolist()) & row_of.keys()) != len(wanted):
        raise UnfitError("features of tiles that the coordinates do not have")
    return np.array([row_of[number] for number in wanted.tolist()], dtype=np.int64)
