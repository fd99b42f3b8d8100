"""GeoJSON for QuPath: tissue outlines and tiles, in level-0 pixels (RFC 7946 rings, QuPath's properties).

Rings are closed; with x and y taken as numbers, outer rings run counterclockwise and holes clockwise. Ids depend on the slide
and the place only, so that a file written again is the same file.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.store.tile_store import TileStore

IDS = uuid.UUID("6f1d8c1e-6b0a-5f6e-9a34-9a2f6f0f7c11")
"""Namespace of the ids."""
COLOURS = {"Tissue": [60, 160, 60], "Tile": [70, 110, 200]}
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""Directions along the edges of pixels, each a left turn of the one before."""

Feature = dict[str, Any]
Ring = list[tuple[int, int]]


def tissue_geojson(mask: npt.NDArray[np.bool_], downsample: float, slide_id: str = "") -> Iterator[Feature]:
    """Outlines of a tissue mask, one polygon with its holes per piece, along the very edges of the mask's pixels.

    Args:
        mask: [h, w], true where tissue is; pieces that touch at a corner only are two.
        downsample: level-0 px per pixel of the mask.
        slide_id: makes the ids those of this slide.
    """
    pieces: dict[int, list[Ring]] = {}
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    for walk in _walks(mask):
        x, y = walk[0]
        pieces.setdefault(int(labels[y, x]), []).extend(_simple(walk))
    for rings in pieces.values():
        scaled = [[[round(x * downsample, 2), round(y * downsample, 2)] for x, y in ring] for ring in rings]
        place = f"{rings[0][0][0]}_{rings[0][0][1]}"
        yield _feature("annotation", "Tissue", f"{slide_id}/{place}", scaled, {})


def tiles_geojson(store: TileStore) -> Iterator[Feature]:
    """The tiles of a store as squares, their quality columns as measurements.

    Raises:
        StoreError: the tiles have no coordinates on a slide.
    """
    if store.coords_synthetic:
        raise StoreError("the tiles have no coordinates on a slide", where=str(store.path))
    side, height = store.tile_sides_level0
    for index, (x, y) in enumerate(store.xy_level0.tolist()):
        right, bottom = round(x + side, 2), round(y + height, 2)
        ring = [[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]
        name = f"{store.slide_id}/{side:g}/{x}_{y}/{index}"
        yield _feature("tile", "Tile", name, [ring], measurements(store, index))


def measurements(store: TileStore, index: int) -> dict[str, float]:
    """Quality columns of a tile by name, to six digits; without those that are not finite, which JSON cannot say."""
    values = zip(store.quality_names, store.quality[index].tolist(), strict=True)
    return {name: float(f"{value:.6g}") for name, value in values if math.isfinite(value)}


def write_geojson(path: Path, features: Iterable[Feature]) -> None:
    """Writes a FeatureCollection at the place given, one feature a line."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            stream.write(",\n" if number else "\n")
            stream.write(json.dumps(feature, allow_nan=False))
        stream.write("\n]}\n")


def _feature(kind: str, name: str, identity: str, rings: list[Any], measured: dict[str, float]) -> Feature:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(IDS, f"{name}/{identity}")),
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {
            "objectType": kind,
            "classification": {"name": name, "color": COLOURS[name]},
            "measurements": measured,
        },
    }


def _walks(mask: npt.NDArray[np.bool_]) -> Iterator[Ring]:
    """Closed walks along a mask's outlines, corners only, mask at the left hand; the one around a piece before its holes."""
    edges = _edges(mask)
    starts = edges[0].copy()
    for y, x in np.argwhere(starts).tolist():
        if starts[y, x]:
            yield _walk(edges, starts, x, y)


def _edges(mask: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
    """Per direction, the corners [h + 1, w + 1] where an edge between mask and background starts."""
    inside = np.pad(mask.astype(bool), 1)
    here = inside[1:, 1:]  # the pixel whose upper left corner this is
    above, before, across = inside[:-1, 1:], inside[1:, :-1], inside[:-1, :-1]
    return [here & ~above, before & ~here, across & ~before, above & ~across]


def _walk(edges: list[npt.NDArray[np.bool_]], starts: npt.NDArray[np.bool_], x: int, y: int) -> Ring:
    """The walk whose first edge runs to the right from (x, y); takes its edges to the right out of ``starts``."""
    walk, direction = [(x, y)], 0
    while True:
        starts[y, x] &= direction != 0
        x, y = x + STEPS[direction][0], y + STEPS[direction][1]
        # Left first: where two pixels touch at a corner, the walk stays with the one it came along.
        following = next(turn % 4 for turn in (direction + 1, direction, direction + 3) if edges[turn % 4][y, x])
        if following != direction:
            walk.append((x, y))
        direction = following
        if (x, y) == walk[0] and direction == 0:
            return walk


def _simple(walk: Ring) -> list[Ring]:
    """A walk cut into rings where it touches itself, which a valid ring may not; the ring through its start comes first."""
    rings: list[Ring] = []
    path: Ring = []
    places: dict[tuple[int, int], int] = {}
    for corner in walk:
        if corner not in places:
            places[corner] = len(path)
            path.append(corner)
            continue
        start = places[corner]
        rings.append([*path[start:], corner])
        for gone in path[start + 1 :]:
            del places[gone]
        del path[start + 1 :]
    return rings[::-1]
