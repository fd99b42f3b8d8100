"""Segmentation and parametric maps: one pixel per step of the tile grid, at its place on the glass.

Where a map starts is where its first pixel's corner lies, as with the levels of a slide, which start at one place though their
pixels differ: so viewers lay maps over slides.

Shapes: C maps, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from highdicom import PixelMeasuresSequence, PlanePositionSequence, VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.codedict import codes

from pathfm.store.interop.dicom_codes import algorithm, equipment, named, private, scheme, settle, text, uid
from pathfm.store.interop.dicom_results import DicomResult
from pathfm.store.interop.dicom_source import THICKNESS_MM

SEGMENTATION_SERIES, MAP_SERIES = 2, 3
COLUMN_MULTIPLE = 8
"""Frames of bits are padded to whole bytes per row, since not every viewer reads a frame that starts within a byte."""
KINDS = {"attention": ("ATTENTION", "Attention"), "gradient x input": ("GRADIENT_X_INPUT", "Gradient x input")}
"""Content label, which is the code's value too, and meaning of each kind of score."""
SHORT_STRING, UM_PER_MM = 16, 1000


def tile_segmentation(result: DicomResult, image: Dataset) -> Segmentation:
    """Two binary segments that may overlap: the tiles that were looked at, and those of them to point at."""
    tiles = result.tiles
    pixels = np.stack([tiles.analysed_hw, tiles.marked_hw & tiles.analysed_hw], axis=-1)[None].astype(np.uint8)
    about = (
        ("Analysed tissue", codes.SCT.Tissue, private("ANALYSED-TILES", "Tiles of tissue that were analysed")),
        (tiles.marked_as, codes.SCT.SpatialAndRelationalConcept, private("MARKED-TILES", "Tiles with high scores")),
    )
    segments = [
        SegmentDescription(number, text(label), category, kind, "AUTOMATIC", algorithm(result))
        for number, (label, category, kind) in enumerate(about, 1)
    ]
    columns = -(-pixels.shape[2] // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    found = Segmentation(
        [image],
        pixels,
        "BINARY",
        segments,
        content_label="TILES",
        content_description="Tiles that a classifier analysed",
        omit_empty_frames=False,
        tile_size=(pixels.shape[1], columns),
        **_common(result, image, "segmentation", SEGMENTATION_SERIES),
    )
    settle(found, result, "tiles")
    return found


def score_maps(result: DicomResult, image: Dataset) -> Iterator[ParametricMap]:
    """One map per class, float32; where no tile was looked at it is 0, since nothing there had a share in the prediction."""
    label, meaning = KINDS[result.tiles.kind]
    for index, (name, value_hw) in enumerate(zip(result.tiles.names, result.tiles.value_Chw, strict=True), 1):
        pixels = np.where(result.tiles.analysed_hw, value_hw, 0).astype(np.float32)
        low, high = _range(pixels, is_signed=result.tiles.kind != "attention")
        quantity = named("MAP", f"{label}/{name}", f"{meaning}: {name}") if name else private(label, meaning)
        mapping = RealWorldValueMapping(
            text(name or label)[:SHORT_STRING].strip(),
            text(f"{meaning} {name}"),
            codes.UCUM.NoUnits,
            (float(pixels.min()), float(pixels.max())),
            quantity_definition=quantity,
        )
        found = ParametricMap(
            [image],
            pixels,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[VOILUTTransformation((low + high) / 2, high - low, voi_lut_function="LINEAR_EXACT")],
            contains_recognizable_visual_features=False,
            content_label=label,
            content_description=text(f"{meaning} {name}"),
            tile_size=pixels.shape,
            **_common(result, image, f"map {index}", MAP_SERIES, index),
        )
        settle(found, result, result.tiles.kind)
        yield found


def _range(pixels: NDArray[np.float32], *, is_signed: bool) -> tuple[float, float]:
    """What a viewer shows at first: from 0 to the highest, or as far below 0 as above."""
    most = float(np.abs(pixels).max()) or 1.0
    return (-most if is_signed else 0.0), most


def _common(result: DicomResult, image: Dataset, what: str, series: int, instance: int = 1) -> dict[str, Any]:
    """Arguments of both kinds of images: who made them, and where they lie."""
    spacing = _spacing_level0(result, image)
    step_x, step_y = result.tiles.step_level0
    return {
        "series_instance_uid": uid(result.identity, result.digest, "series", str(series)),
        "series_number": series,
        "sop_instance_uid": uid(result.identity, result.digest, what),
        "instance_number": instance,
        **equipment(result),
        "pixel_measures": PixelMeasuresSequence([spacing[0] * step_y, spacing[1] * step_x], THICKNESS_MM),
        "plane_positions": [PlanePositionSequence("SLIDE", _corner(result, image, spacing), (1, 1))],
        "tile_pixel_array": True,
        "dimension_organization_type": "TILED_SPARSE",
        "coding_schemes": [scheme()],
    }


def _spacing_level0(result: DicomResult, image: Dataset) -> list[float]:
    """Distance of rows and of columns of the slide [mm]: as a DICOM slide says, else by its mpp."""
    if result.sources or result.mpp is None:
        return [float(value) for value in image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing]
    return [result.mpp.y / UM_PER_MM, result.mpp.x / UM_PER_MM]


def _corner(result: DicomResult, image: Dataset, spacing: list[float]) -> list[float]:
    """Place of a map's first pixel on the glass [mm]."""
    place = image.TotalPixelMatrixOriginSequence[0]
    origin = [float(place.get(f"{axis}OffsetInSlideCoordinateSystem") or 0) for axis in "XYZ"]
    direction = np.array(image.ImageOrientationSlide, dtype=np.float64).reshape(2, 3)
    x, y = result.tiles.origin_level0
    moved: list[float] = (origin + direction[0] * x * spacing[1] + direction[1] * y * spacing[0]).tolist()
    return moved
