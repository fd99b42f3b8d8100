"""Tiles with what a model made of them, as GeoJSON for QuPath: one square per tile, with measurements, class and colour.

QuPath shows the colours at once, and its measurement maps and tables know the measurements.

Shapes: N tiles.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pathfm.store.interop.geojson import IDS, Feature

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class TileLooks:
    """How the tiles of a slide appear.

    Attributes:
        class_N: name of each tile's class.
        class_colours: RGB of every class; a class has one colour in all of a QuPath project.
        colour_N3: RGB of each tile itself, uint8.
        measured: values of the tiles by the name of the measurement; those that are not finite are left out.
    """

    class_N: Sequence[str]
    class_colours: Mapping[str, Colour]
    colour_N3: npt.NDArray[np.uint8]
    measured: Mapping[str, npt.NDArray[np.float64]]


def heat_geojson(
    slide_id: str, xy_level0: npt.NDArray[np.int64], sides_level0: tuple[float, float], looks: TileLooks
) -> Iterator[Feature]:
    """The tiles of a slide as QuPath tile objects, in level-0 px; ids depend on the slide and the place only.

    Args:
        slide_id: makes the ids those of this slide.
        xy_level0: upper left corners of the tiles [N, 2].
        sides_level0: width and height of a tile.
        looks: what each tile is like.
    """
    width, height = sides_level0
    for index, (x, y) in enumerate(xy_level0.tolist()):
        right, bottom = round(x + width, 2), round(y + height, 2)
        name = looks.class_N[index]
        values = {key: float(f"{value_N[index]:.6g}") for key, value_N in looks.measured.items()}
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(IDS, f"Heat/{slide_id}/{width:g}/{x}_{y}/{index}")),
            "geometry": {"type": "Polygon", "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]]},
            "properties": {
                "objectType": "tile",
                "color": looks.colour_N3[index].tolist(),
                "classification": {"name": name, "color": list(looks.class_colours[name])},
                "measurements": {key: value for key, value in values.items() if math.isfinite(value)},
            },
        }
