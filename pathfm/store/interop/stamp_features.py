"""STAMP's features where nothing tells the slide's mpp: usable, but nobody knows where their tiles lie."""

from __future__ import annotations

from pathlib import Path

import h5py

from pathfm.errors import StoreError
from pathfm.store.interop.foreign import UnfitError, positive, whole
from pathfm.store.interop.foreign_features import ForeignFeatures, feature_rows, read_values
from pathfm.store.interop.reading import DAMAGE


def read_stamp_features(path: Path) -> ForeignFeatures | None:
    """Features of STAMP's tiles without coordinates, which are micrometres in the file; None for any other file.

    Raises:
        StoreError: the features cannot be used.
    """
    if path.suffix != ".h5":
        return None
    try:
        with h5py.File(path, "r") as file:
            attrs = dict(file.attrs)
            if "feats" not in file or "coords" not in file or attrs.get("feat_type", "tile") not in {"tile", b"tile"}:
                return None
            values, count = read_values(file["feats"]), len(file["coords"])
        if len(values) != count:
            raise UnfitError(f"{len(values)} features for {count} tiles")
        encoder = attrs.get("extractor")
        name = encoder.decode() if isinstance(encoder, bytes) else encoder and str(encoder)
        tile_px = whole(positive(attrs, "tile_size_px"))
        return ForeignFeatures("STAMP", feature_rows(values), tile_px=tile_px, encoder=name)
    except UnfitError as error:
        raise StoreError(str(error), where=str(path)) from error
    except DAMAGE:
        return None  # the reader of all tools' files tells what is wrong
