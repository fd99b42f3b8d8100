"""Regions that people drew on a slide, as QuPath writes them (GeoJSON), and masks of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.errors import SlideError

Mask = npt.NDArray[np.bool_]
Ring = npt.NDArray[np.float64]
"""Corners [N, 2] of a closed line, x and y in level-0 px from the outer corner of the first pixel."""

SHIFT = 6
"""Binary digits after the point of corners that are drawn."""
FARTHEST_PX = 2.0**20
"""Corners are drawn at most this many mask pixels outside the slide, which the drawing's integers can hold."""
EXPORT = "export it again from QuPath (File > Export objects as GeoJSON)"


@dataclass(frozen=True)
class Region:
    """A polygon of a class ("" without one): its outer ring and its holes."""

    name: str
    rings: tuple[Ring, ...]


@dataclass(frozen=True)
class Annotations:
    """The regions of a slide.

    Attributes:
        regions: polygons in level-0 px; a multi-polygon is several.
        ignored: how many objects have no area: points, lines, and polygons of fewer than three corners.
    """

    regions: tuple[Region, ...] = ()
    ignored: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that occur, sorted."""
        return tuple(sorted({region.name for region in self.regions if region.name}))


def load_annotations(path: Path) -> Annotations:
    """Read a GeoJSON file: a FeatureCollection, a list of Features, or one Feature, in level-0 px.

    A file without any region is none that is wrong: somebody looked and found nothing.

    Raises:
        SlideError: the file cannot be read, is no GeoJSON, or has corners that are not numbers.
    """
    try:
        features = _features(json.loads(path.read_text(encoding="utf-8-sig")))
        found = [(_class_name(feature), feature.get("geometry")) for feature in features]
        parts = [(name, polygon) for name, geometry in found for polygon in _polygons(geometry)]
        regions = [Region(name, tuple(_ring(ring) for ring in polygon)) for name, polygon in parts]
    except OSError as error:
        raise SlideError(f"the annotations cannot be read: {error.strerror}", where=str(path), fix="check the file") from error
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        what = f"the annotations are not GeoJSON: {error}" if str(error) else "the annotations are not GeoJSON"
        raise SlideError(what, where=str(path), fix=EXPORT) from error
    drawn = tuple(region for region in regions if region.rings and len(np.unique(region.rings[0], axis=0)) >= 3)
    return Annotations(drawn, len(regions) - len(drawn))


def draw_regions(regions: Iterable[Region], downsample: tuple[float, float], shape: tuple[int, ...]) -> Mask:
    """The union of regions as a mask [h, w]; holes by the even-odd rule.

    Args:
        regions: polygons in level-0 px.
        downsample: level-0 px per mask pixel, along x and y.
        shape: height and width of the mask.
    """
    canvas = np.zeros(shape, np.uint8)
    for region in regions:
        # OpenCV counts from the centre of the first pixel, slides from its outer corner.
        rings = [np.clip(ring / downsample - 0.5, -FARTHEST_PX, FARTHEST_PX) for ring in region.rings if len(ring) >= 3]
        cv2.fillPoly(canvas, [np.rint(ring * 2**SHIFT).astype(np.int32) for ring in rings], 1, shift=SHIFT)
    return canvas.astype(bool)


def _features(document: object) -> list[dict[str, Any]]:
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document["features"]
    features: list[dict[str, Any]] = []
    for feature in document if isinstance(document, list) else [document]:
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            raise ValueError("something in it is not a Feature")
        features.append(feature)
    return features


def _class_name(feature: dict[str, Any]) -> str:
    """The class of an object. QuPath wrote ``{"name": ...}`` and writes ``{"names": [...]}`` for classes with sub-classes."""
    properties = feature.get("properties") or {}
    found = properties.get("classification") or {}
    if isinstance(found, str):
        return found
    name = found.get("name") or ": ".join(found.get("names") or [])
    if not isinstance(name, str):
        raise TypeError(f"a class is named {name!r}")
    return name


def _polygons(geometry: object) -> Iterator[list[Any]]:
    """The rings of each polygon; none, once, for a shape without area, so that it is counted."""
    match geometry:
        case {"type": "Polygon", "coordinates": rings}:
            yield rings
        case {"type": "MultiPolygon", "coordinates": polygons}:
            yield from polygons
        case {"type": "GeometryCollection", "geometries": parts}:
            for part in parts:
                yield from _polygons(part)
        case {"type": "Polygon" | "MultiPolygon" | "GeometryCollection"}:
            raise ValueError("a geometry has no coordinates")
        case _:
            yield []


def _ring(corners: list[list[float]]) -> Ring:
    ring = np.array([corner[:2] for corner in corners], dtype=np.float64)
    if ring.ndim != 2 or ring.shape[1] != 2:
        raise ValueError("a ring is not a list of corners")
    if not np.isfinite(ring).all():
        raise ValueError("a corner is not a finite number")
    return ring
