"""What a model made of single tiles, for people and other programs: tables, tiles of highest and lowest score, QuPath, layers.

Legend: N tiles, C maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import StoreError
from pathfm.geometry import Mpp
from pathfm.mil.explain import Explained
from pathfm.mil.feature_cache import SlideFacts
from pathfm.mil.heatmap import (
    GREY,
    Canvas,
    SlideHeat,
    all_tiles,
    draw_class_maps,
    draw_heatmap,
    tile_colours,
    write_heatmap,
)
from pathfm.slides.heat_layer import heat_grid, paint_tiles, write_heat_layer
from pathfm.stats.localisation import UNKNOWN
from pathfm.store.commit import commit_file
from pathfm.store.interop.geojson import Feature, write_geojson
from pathfm.store.interop.heat_geojson import Colour, TileLooks, heat_geojson
from pathfm.store.tile_store import TileStore

Floats = NDArray[np.float64]
Cell = str | int | float

HIGH = 0.9
"""Tiles from this percentile on have the class of their map in QuPath."""
LOW, UNSEEN = "Tile", "Not looked at"
"""Names of the classes of all other tiles."""
PALETTE: tuple[Colour, ...] = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178))
"""Colours of classes, told apart with colour-blindness (Okabe and Ito 2008)."""


class Extremes(NamedTuple):
    """Numbers of the tiles of highest (highest first) and lowest score (lowest first); no tile is in both."""

    top: list[int]
    bottom: list[int]


def extreme_tiles(value_N: Floats, count: int) -> Extremes:
    """The ``count`` highest and lowest tiles of those looked at; of equal ones those of lower number first."""
    seen = np.flatnonzero(np.isfinite(value_N))
    top = seen[np.argsort(-value_N[seen], kind="stable")][:count]
    rest = np.setdiff1d(seen, top)
    return Extremes(top.tolist(), rest[np.argsort(value_N[rest], kind="stable")][:count].tolist())


def galleries(heats: Sequence[SlideHeat], count: int) -> dict[str, dict[str, Any]]:
    """Content of the gallery files by their names.

    ``top_tiles.json`` and ``bottom_tiles.json`` map slide_id -> tile numbers (of several maps: by the main one);
    ``class_tiles.json``, which is there when a slide has several maps, slide_id -> class -> ``top`` and ``bottom``.
    """
    ordered = sorted(heats, key=lambda heat: heat.slide_id)
    extremes = {heat.slide_id: extreme_tiles(heat.value_NC[:, heat.main], count) for heat in ordered}
    by_class = {
        heat.slide_id: {name: extreme_tiles(heat.value_NC[:, place], count)._asdict() for place, name in enumerate(heat.names)}
        for heat in ordered
        if len(heat.names) > 1
    }
    found: dict[str, dict[str, Any]] = {
        "top_tiles.json": {slide_id: found.top for slide_id, found in extremes.items()},
        "bottom_tiles.json": {slide_id: found.bottom for slide_id, found in extremes.items()},
    }
    return found | ({"class_tiles.json": by_class} if by_class else {})


def tile_table(
    heat: SlideHeat, source_names: Sequence[str] | None = None, truth_N: NDArray[np.int8] | None = None
) -> tuple[tuple[str, ...], Iterator[tuple[Cell, ...]]]:
    """Header and rows of a slide's table, one row per tile; what is not known is empty.

    ``attention`` is the weight (of several maps: in the main one), ``attention_logit`` the same before the softmax; maps of
    several classes, and gradient x input, have columns of their own. ``lesion`` is 1, 0 or empty.
    """
    count, attends = len(heat.xy_level0), heat.kind == "attention"
    single = len(heat.names) == 1
    blank: list[Cell] = [""] * count
    columns: dict[str, Sequence[Cell]] = {
        "tile": range(count),
        "x_level0": heat.xy_level0[:, 0].tolist(),
        "y_level0": heat.xy_level0[:, 1].tolist(),
        "attention": _cells(heat.value_NC[:, heat.main]) if attends else blank,
        "attention_logit": _cells(heat.logit_NC[:, heat.main]) if heat.logit_NC is not None else blank,
        "source_name": source_names or blank,
        "lesion": blank if truth_N is None else ["" if value == UNKNOWN else value for value in truth_N.tolist()],
    }
    for place, name in enumerate(heat.names if not (single and attends) else ()):
        columns["_".join(filter(None, (heat.kind.replace(" ", "_"), name)))] = _cells(heat.value_NC[:, place])
        if heat.logit_NC is not None:
            columns[f"attention_logit_{name}"] = _cells(heat.logit_NC[:, place])
    return tuple(columns), zip(*columns.values(), strict=True)


def tile_features(heat: SlideHeat, scores: Mapping[str, Floats] | None = None) -> Iterator[Feature]:
    """The tiles of a slide for QuPath: coloured as in the main heatmap, with all values as measurements.

    Args:
        heat: of a slide whose tiles have places on it.
        scores: further values [N] by the name of the measurement.
    """
    shown_NC, measured = heat.shown_NC, dict(scores or {})
    for place, name in enumerate(heat.names):
        measured[f"{heat.kind} {name}".rstrip()] = heat.value_NC[:, place]
        if heat.kind == "attention":
            measured[f"attention percentile {name}".rstrip()] = shown_NC[:, place]
    seen_N = [bool(np.isfinite(value_C).all()) for value_C in heat.value_NC]
    rank_NC = np.nan_to_num(replace(heat, kind="attention").shown_NC)
    best_N, high_N = rank_NC.argmax(axis=1).tolist(), (rank_NC.max(axis=1) >= HIGH).tolist()
    names = [name or f"High {heat.kind}" for name in heat.names]
    classes = [
        (names[best] if high else LOW) if seen else UNSEEN for best, high, seen in zip(best_N, high_N, seen_N, strict=True)
    ]
    colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(names)}
    looks = TileLooks(classes, {LOW: (70, 110, 200), UNSEEN: GREY, **colours}, tile_colours(heat, heat.main), measured)
    return heat_geojson(heat.slide_id, heat.xy_level0, heat.sides_level0, looks)


def heat_of(facts: SlideFacts, store: TileStore | None, explained: Explained) -> SlideHeat:
    """What was made of the tiles of one slide, as all tiles of its store; without a store, those whose features there are."""
    xy, value_NC, logit_NC = facts.xy_level0, explained.value_NC, explained.logit_NC
    places = np.zeros((len(facts), 2), dtype=np.int64) if xy is None else xy.astype(np.int64)
    sides = facts.tile_side_level0
    if store is not None:
        places, sides = store.xy_level0, store.tile_sides_level0
        value_NC = all_tiles(value_NC, facts.kept, len(store))
        logit_NC = None if logit_NC is None else all_tiles(logit_NC, facts.kept, len(store))
    about = (explained.names, explained.kind, logit_NC, explained.main)
    return SlideHeat(facts.slide_id, places, sides, value_NC, *about)


def write_pictures(folder: Path, heat: SlideHeat, canvas: Canvas) -> None:
    """Writes ``<slide_id>.png`` and, of several maps, ``<slide_id>.classes.png``."""
    write_heatmap(folder / f"{heat.slide_id}.png", draw_heatmap(canvas, heat))
    if len(heat.names) > 1:
        write_heatmap(folder / f"{heat.slide_id}.classes.png", draw_class_maps(canvas, heat))


def write_qupath(path: Path, heat: SlideHeat, store: TileStore | None, scores: Mapping[str, Floats] | None = None) -> None:
    """Writes the tiles of a slide as GeoJSON for QuPath (see ``tile_features``), whole or not at all.

    Raises:
        StoreError: the tiles have no coordinates on a slide.
    """
    if store is not None:
        _check_places(store)
    with commit_file(path) as temporary:
        write_geojson(temporary, tile_features(heat, scores))


def write_layer(path: Path, heat: SlideHeat, store: TileStore) -> None:
    """Writes the maps of a slide as OME-TIFF, whole or not at all: percentiles of attention, or signed values; 0: no tile.

    Raises:
        StoreError: the tiles have no coordinates on a slide.
    """
    _check_places(store)
    grid = heat_grid(heat.xy_level0, heat.sides_level0, store.size_level0)
    layer = [paint_tiles(heat.xy_level0, heat.sides_level0, value_N, grid) for value_N in heat.shown_NC.T]
    side_um = store.mpp * store.tile_px if store.mpp else None
    mpp_level0 = Mpp(side_um / heat.sides_level0[0], side_um / heat.sides_level0[1]) if side_um else None
    names = [name or heat.kind for name in heat.names]
    with commit_file(path) as temporary:
        write_heat_layer(temporary, np.stack(layer), grid, mpp_level0, names)


def _check_places(store: TileStore) -> None:
    if store.coords_synthetic:
        raise StoreError("the tiles have no coordinates on a slide", where=str(store.path))


def _cells(value_N: Floats) -> list[Cell]:
    return [value if np.isfinite(value) else "" for value in value_N.tolist()]
