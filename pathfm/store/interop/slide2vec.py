"""slide2vec and hs2p: ``tiles/<slide_id>.coordinates.npz`` and beside it ``.coordinates.meta.json``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pathfm.geometry import Size
from pathfm.store.commit import read_json
from pathfm.store.interop.foreign import ForeignTiles, needed, positive, whole

ENDING = ".coordinates.npz"


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
