"""What is taken over from another tool's feature file: features and where their tiles lie, nothing of people or machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt

from pathfm.store.interop.foreign import MAX_TILES, ForeignTiles, UnfitError

Level = Literal["tile", "slide", "patient"]


@dataclass(frozen=True)
class ForeignFeatures:
    """Features that another tool has computed.

    Attributes:
        tool: who wrote the file; ``unknown`` when nothing tells.
        features: [N, D] float16 or float32 as stored, all finite; [1, D] for a slide or patient. D is 0 where a tool does not
            say it for a slide without tiles.
        coords: [N, 2] upper left corners in level-0 pixels, in the order of the file (orders differ between tools: join by
            coordinate); None where nothing says where the tiles lie.
        side_level0: side of the square that one tile covers [level-0 px], None when the files do not say.
        tile_px: side of the picture that the tool made of it [px], None when the files do not say.
        mpp: micrometres per pixel of that picture by the tool's own account, None when the files do not say.
        encoder: the tool's name for it, None when the files do not say.
        level: what a feature stands for.
    """

    tool: str
    features: npt.NDArray[Any]
    coords: npt.NDArray[np.float64] | None = None
    side_level0: float | None = None
    tile_px: int | None = None
    mpp: float | None = None
    encoder: str | None = None
    level: Level = "tile"

    def __post_init__(self) -> None:
        if self.coords is not None and len(self.coords) != len(self.features):
            raise UnfitError(f"{len(self.features)} features for {len(self.coords)} tiles")


def tile_features(values: npt.NDArray[Any], tiles: ForeignTiles, encoder: str | None = None) -> ForeignFeatures:
    """Features [N, D] of tiles, in their order."""
    return ForeignFeatures(
        tiles.tool, feature_rows(values), tiles.xy_level0, tiles.side_level0, tiles.tile_px, tiles.mpp, encoder
    )


def feature_rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Features as [N, D] float16 or float32; float64 becomes float32, and what an empty slide has, [0, 0].

    Raises:
        UnfitError: another shape or type, or a value that is not finite.
    """
    if values.shape == (0,):
        values = values.reshape(0, 0)
    if values.ndim != 2 or values.dtype.kind != "f" or len(values) > MAX_TILES:
        raise UnfitError(f"features of shape {values.shape}, {values.dtype}")
    with np.errstate(over="ignore"):
        rows = values if values.dtype in (np.float16, np.float32) else values.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(wrong):
        raise UnfitError(f"features that are not finite: {len(wrong)} of {len(rows)} rows, the first is {wrong[0]}")
    return rows


def read_values(dataset: object) -> npt.NDArray[Any]:
    """The numbers of a dataset of features; bfloat16 is read as float32, exactly.

    Raises:
        UnfitError: no dataset, no floating-point numbers, or not written to the end.
    """
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind != "f":
        raise UnfitError("features that are no floating-point numbers")
    # HDF5 gives zeros for what was never written, without a word.
    if dataset.chunks is None:
        written = dataset.id.get_storage_size() >= dataset.size * dataset.id.get_type().get_size()
    else:
        counts = [-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
        written = dataset.id.get_num_chunks() >= np.prod(counts, dtype=np.int64)
    if not written:
        raise UnfitError("features that were not written to the end")
    values: npt.NDArray[Any] = dataset[()]
    return values.astype(values.dtype.newbyteorder("="), copy=False)
