"""What a bundle says of a slide, handed to the writer of DICOM objects. Specified in ``docs/dicom.md``.

Shapes: N tiles, C maps.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathfm import __version__
from pathfm.batch.inbox import series_files
from pathfm.errors import SlideError
from pathfm.geometry import Mpp, Size
from pathfm.store.interop.dicom_results import DicomResult, ScoreKind, TaskResult, TileMap, write_dicom
from pathfm.store.tile_store import TileStore, open_tiles

if TYPE_CHECKING:
    from pathfm.mil.predict import Ensemble, Verdict
    from pathfm.mil.prediction_table import Result

GRADIENT, ATTENTION, LOGIT = "gradient_x_input", "attention", "attention_logit"
"""Columns of a table of tiles; those of several maps go on with ``_`` and the name of the map."""


@dataclass(frozen=True)
class About:
    """What the objects call the slide, and what is known besides the prediction.

    Attributes:
        slide_id: real or pseudonym.
        time: of the prediction, with its time zone.
        patient_id: real or pseudonym; "" to leave it out.
        qc: flags, in words.
    """

    slide_id: str
    time: datetime.datetime
    patient_id: str = ""
    qc: tuple[str, ...] = ()


@dataclass(frozen=True)
class TileScores:
    """What a table of tiles holds.

    Attributes:
        xy_level0: upper left corners [N, 2].
        value_NC: scores; NaN: the tile was not looked at.
        names: of the maps; a single map may have "".
        kind: what the scores are.
    """

    xy_level0: NDArray[np.int64]
    value_NC: NDArray[np.float64]
    names: tuple[str, ...]
    kind: ScoreKind


def write_dicom_of(folder: Path, scores: Path, result: Result, slide_id: str, about: About) -> list[Path]:
    """Writes the DICOM objects of one predicted slide.

    Args:
        folder: of these objects alone; replaced.
        scores: the slide's ``attention/<slide_id>.csv``.
        result: of its prediction.
        slide_id: which slide of it.
        about: what the objects say besides.

    Raises:
        MissingExtraError: highdicom is not installed.
        SlideError: there is no prediction; its tiles have no place on a slide; or as ``write_dicom``.
        StoreError: the tile store is damaged, or the drive fails.
    """
    verdict = result.answers.slides.get(slide_id)
    if verdict is None:
        raise SlideError("there is no prediction, so there is nothing to say of it in DICOM")
    store = open_tiles(result.stores_dir / f"{slide_id}.zarr")
    if store.coords_synthetic:
        raise SlideError("its tiles have no place on a slide, so DICOM cannot say where they lie")
    path = next(row.path for row in result.cohort.rows if row.slide_id == slide_id)
    sources = dicom_sources(path)
    bundle = result.ensemble.bundle
    said = DicomResult(
        about.slide_id,
        result.known.identity[slide_id],
        store.size_level0,
        _mpp_level0(store),
        verdict.tiles,
        tile_map(read_scores(scores), store.tile_sides_level0, store.size_level0),
        tuple(_tasks(result.ensemble, verdict)),
        bundle.digest,
        f"{bundle.settings.aggregator} on {bundle.facts['encoder']['name']}",
        __version__,
        about.time,
        about.patient_id,
        about.qc,
        sources,
        None if sources else store.thumbnail,
    )
    return write_dicom(folder, said)


def dicom_sources(path: Path) -> tuple[Path, ...]:
    """The files of the DICOM series that a slide is, by name; () where it is none. A folder holds one series."""
    from pathfm.slides.reader import dicom_files

    if path.is_dir():
        return tuple(dicom_files(path))
    return tuple(series_files(path)) if path.suffix.lower() == ".dcm" else ()


def read_scores(table: Path) -> TileScores:
    """The scores in a table of tiles, as ``pathfm mil predict`` writes it."""
    with table.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    kind = GRADIENT if any(name.startswith(GRADIENT) for name in header) else ATTENTION
    maps = [name for name in header if name.startswith(f"{kind}_") and not name.startswith(LOGIT)] or [kind]
    cells = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    xy_level0 = np.array([cells["x_level0"], cells["y_level0"]], dtype=np.int64).T
    value_NC = np.array([[float(cell or "nan") for cell in cells[name]] for name in maps], dtype=np.float64).T
    names = tuple(name.removeprefix(kind).removeprefix("_") for name in maps)
    return TileScores(xy_level0, value_NC, names, "gradient x input" if kind == GRADIENT else "attention")


def tile_map(scores: TileScores, sides_level0: tuple[float, float], size_level0: Size) -> TileMap:
    """The scores as pictures of one pixel per step of the tile grid; the tiles to point at are the highest tenth of a map.

    Where tiles overlap, a pixel has the mean of those over its centre. Tiles on no grid get pixels of a tile's side.

    Args:
        scores: of the tiles.
        sides_level0: width and height of a tile.
        size_level0: of the slide.
    """
    from pathfm.mil.galleries import HIGH
    from pathfm.mil.heatmap import attention_percentile
    from pathfm.slides.heat_layer import heat_grid, paint_tiles

    grid = heat_grid(scores.xy_level0, sides_level0, size_level0)

    def painted(value_N: NDArray[np.float64]) -> NDArray[np.float64]:
        return paint_tiles(scores.xy_level0, sides_level0, value_N, grid)

    rank_NC = np.stack([attention_percentile(value_N) for value_N in scores.value_NC.T], axis=1)
    high_NC = (rank_NC >= HIGH) & (scores.value_NC > 0)
    high_N = np.where(np.isfinite(scores.value_NC).all(axis=1), high_NC.any(axis=1).astype(np.float64), np.nan)
    return TileMap(
        grid.origin_level0,
        grid.step_level0,
        np.stack([painted(value_N) for value_N in scores.value_NC.T]),
        scores.names,
        scores.kind,
        painted(high_N) >= 1 / 2,
        f"Highest tenth of {scores.kind}",
    )


def _mpp_level0(store: TileStore) -> Mpp | None:
    if not store.mpp:
        return None
    width, height = store.tile_sides_level0
    return Mpp(store.mpp * store.tile_px / width, store.mpp * store.tile_px / height)


def _tasks(ensemble: Ensemble, verdict: Verdict) -> Iterator[TaskResult]:
    for task in ensemble.tasks.tasks:
        values = verdict.prediction_P[ensemble.tasks.slice_of(task).columns].tolist()
        has_classes = len(task.classes) == len(values)
        predicted = dict(zip(task.classes if has_classes else task.columns, values, strict=True))
        decision = verdict.decisions.get(task.name)
        if decision is None:
            yield TaskResult(task.name, predicted, has_classes)
            continue
        calibrated = dict(zip(task.classes if decision.calibrated_C else (), decision.calibrated_C, strict=True))
        yield TaskResult(task.name, predicted, has_classes, calibrated, decision.decision, decision.set, decision.reasons)
