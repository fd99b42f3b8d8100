"""Reads features of other tools: tells whose file it is, takes its features and where their tiles lie."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.geometry import Mpp
from pathfm.store.feature_file import FORMAT, open_features
from pathfm.store.interop.coords_file import read_coords_file
from pathfm.store.interop.foreign import UnfitError, positive, whole
from pathfm.store.interop.foreign_features import ForeignFeatures, Level, feature_rows, read_values, tile_features
from pathfm.store.interop.lazyslide import read_lazyslide_features
from pathfm.store.interop.reading import DAMAGE, TOOLS, read_coords
from pathfm.store.interop.slide2vec import ENDING, is_slide2vec, read_slide2vec_features, slide2vec_features

FEATURE_ENDINGS = (".h5", ".npz")


def read_features(path: Path, mpp_level0: Mpp | float | None = None, encoder: str | None = None) -> ForeignFeatures:
    """Reads features of another tool, or of pathfm. Names of users, dates and paths in the file are not taken over.

    Args:
        path: an HDF5 file of CLAM, TRIDENT, STAMP, AtlasPatch or pathfm, an npz file of slide2vec, or a LazySlide store.
            (``.pt`` files: ``pathfm.models.pt_files``.)
        mpp_level0: the slide's micrometres per pixel; needed for STAMP, whose coordinates are micrometres.
        encoder: whose features, where a file of AtlasPatch or LazySlide has those of several.

    Raises:
        MissingExtraError: a LazySlide store, and pyarrow is not installed.
        StoreError: absent, damaged, without features, or of none of these tools.
    """
    if not path.exists():
        raise StoreError("no feature file", where=str(path))
    try:
        if path.is_dir():
            return read_lazyslide_features(path, encoder)
        if path.name.endswith(ENDING):
            raise UnfitError("coordinates without features")
        if path.suffix == ".npz":
            return read_slide2vec_features(path)
        if path.suffix not in FEATURE_ENDINGS:
            raise UnfitError("no file of features")
        return _read_h5(path, mpp_level0, encoder)
    except UnfitError as error:
        raise StoreError(str(error), where=str(path)) from error
    except DAMAGE as error:
        raise StoreError("damaged, or no file of features", where=str(path), fix=f"wanted: a file of {TOOLS}") from error


def place_features(path: Path, values: npt.NDArray[Any]) -> ForeignFeatures:
    """Features from a file that holds nothing else (``.pt``), with what the files that its tool has put beside it say.

    Args:
        path: ``pt_files/<slide_id>.pt`` of CLAM, ``<slide_id>.pt`` of TRIDENT or slide2vec, or any other.
        values: what is in it: [N, D], or [D] for a slide.

    Raises:
        StoreError: not features, or what lies beside does not fit them.
    """
    try:
        if is_slide2vec(path):
            return slide2vec_features(path, values)
        if values.ndim == 1 and len(values):
            return ForeignFeatures("unknown", feature_rows(values[None]), level="slide")
        folder = path.parent.with_name("h5_files") if path.parent.name == "pt_files" else path.parent
        if (beside := folder / f"{path.stem}.h5").is_file():
            known = read_features(beside)
            if known.features.shape != values.shape and values.shape != (0,):
                raise UnfitError(f"features {values.shape}, where {beside.name} has {known.features.shape}")
            return replace(known, features=feature_rows(values))
        if (beside := path.parents[1] / "patches" / f"{path.stem}_patches.h5").is_file():
            return tile_features(values, read_coords(beside))
        return ForeignFeatures("unknown", feature_rows(values))
    except UnfitError as error:
        raise StoreError(str(error), where=str(path)) from error


def _read_h5(path: Path, mpp_level0: Mpp | float | None, encoder: str | None) -> ForeignFeatures:
    with h5py.File(path, "r") as file:
        attrs, names = dict(file.attrs), set(file)
        if attrs.get("format") in {FORMAT, FORMAT.encode()}:
            return _own(path)
        if "feats" in names:
            return _stamp(path, read_values(file["feats"]), attrs, mpp_level0)
        if "features" not in names:
            raise UnfitError("coordinates without features" if "coords" in names else "no file of features")
        if isinstance(file["features"], h5py.Group):
            name = _chosen(sorted(file["features"]), encoder)
            return tile_features(read_values(file["features"][name]), read_coords(path), name)
        values, said = read_values(file["features"]), file["features"].attrs.get("encoder")
        coords_attrs = dict(file["coords"].attrs) if "coords" in names else {}
    if values.ndim == 1 and len(values):
        return ForeignFeatures("TRIDENT", feature_rows(values[None]), encoder=_text(said), level="slide")
    return tile_features(values, read_coords(path), _text(said)) if coords_attrs else _clam(path, values)


def _chosen(names: list[str], wanted: str | None) -> str:
    """The encoder whose features are read."""
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return str(wanted)
    what = "several encoders" if wanted is None else f"no encoder {wanted!r}"
    raise UnfitError(f"features of {what}: choose one of {', '.join(names) or 'none'}")


def _own(path: Path) -> ForeignFeatures:
    """Of pathfm's own features those of tiles that could be read."""
    file = open_features(path)
    coords = None if file.attrs.get("coords_synthetic") else file.coords[file.valid].astype(np.float64)
    side, tile_px = positive(file.attrs, "tile_side_level0"), whole(positive(file.attrs, "tile_px"))
    mpp, encoder = positive(file.attrs, "mpp"), _text(file.attrs.get("encoder"))
    return ForeignFeatures("pathfm", file.features[file.valid], coords, side, tile_px, mpp, encoder)


def _stamp(path: Path, values: npt.NDArray[Any], attrs: Mapping[str, Any], mpp_level0: Mpp | float | None) -> ForeignFeatures:
    kind = _text(attrs.get("feat_type", "tile"))
    if kind in {"slide", "patient"}:
        level: Level = "slide" if kind == "slide" else "patient"
        encoder = _text(attrs.get("encoder", attrs.get("extractor")))
        return ForeignFeatures("STAMP", feature_rows(values.reshape(1, -1)), encoder=encoder, level=level)
    return tile_features(values, read_coords(path, mpp_level0), _text(attrs.get("extractor")))


def _clam(path: Path, values: npt.NDArray[Any]) -> ForeignFeatures:
    """CLAM's features do not say what a tile covers; its coordinate file does, where it is found and has the same rows."""
    xy = read_coords_file(path).coords[:, :2]
    for folder in path.parents[1:3]:
        with suppress(StoreError):
            tiles = read_coords(folder / "patches" / path.name)
            if np.array_equal(tiles.xy_level0, xy):
                return tile_features(values, tiles)
    return ForeignFeatures("CLAM", feature_rows(values), xy)


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode()
    return None if value is None else str(value)
