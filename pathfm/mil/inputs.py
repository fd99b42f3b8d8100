"""What the stage starts from: features, tile stores and tile truth of every slide that can take part, all checked up front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import StoreError
from pathfm.mil.bags import SlideFeatures, check_same_encoder, read_slide
from pathfm.mil.roster import Absence
from pathfm.mil.truth import TileLabels, read_mask, read_tile_labels, tile_truth
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.record import Outcome
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import Study


@dataclass(frozen=True)
class MilInputs:
    """Where everything lies.

    Attributes:
        features_dirs: folders of ``<slide_id>.h5`` by role: ``main``, and for the controls ``colour`` and ``untrained``.
        stores_dir: folder of ``<slide_id>.zarr``.
        mil_dir: the stage's own folder.
        upstream: what became of each slide in extraction.
        main_name: what reports call the main model.
        fingerprint: of the features.
        encoder_dir: folder of the study's own encoder with its card and manifest; None where another one is used.
    """

    features_dirs: Mapping[str, Path]
    stores_dir: Path
    mil_dir: Path
    upstream: Mapping[str, Outcome]
    main_name: str
    fingerprint: str
    encoder_dir: Path | None = None


@dataclass
class Gathered:
    """Slides that take part, by slide_id, and those that do not.

    Attributes:
        slides: checked main features.
        stores: tile stores, where there is one.
        truth: lesion truth [N] of the tiles, where something is known.
        absent: slides that take no part, and why.
        notes: what a reader should know.
    """

    slides: dict[str, SlideFeatures] = field(default_factory=dict)
    stores: dict[str, TileStore] = field(default_factory=dict)
    truth: dict[str, NDArray[np.int8]] = field(default_factory=dict)
    absent: dict[str, Absence] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def gather(study: Study, cohort: Cohort, inputs: MilInputs) -> Gathered:
    """Reads everything of every slide; a slide that cannot be used is noted with its reason.

    Raises:
        StoreError: the features are of different encoders.
        UsageError: the table of tile labels is unreadable or contradicts itself.
    """
    labels = read_tile_labels(study.cohort.tile_labels) if study.cohort.tile_labels else None
    gathered = Gathered()
    for row in sorted(cohort.rows, key=lambda row: row.slide_id):
        absence = _absence(row, study.mil.label, inputs)
        if absence is None:
            absence = _read(row, labels, inputs, gathered)
        if absence is not None:
            gathered.absent[row.slide_id] = absence
    check_same_encoder(gathered.slides.values(), str(inputs.features_dirs["main"]))
    return gathered


def read_control(folder: Path, main: Mapping[str, SlideFeatures], slide_ids: list[str]) -> dict[str, SlideFeatures]:
    """Features of a control for the same slides and tiles as the main ones.

    Raises:
        StoreError: one is absent or unusable, or its tiles are not those of the main features.
    """
    slides = {slide_id: read_slide(folder / f"{slide_id}.h5") for slide_id in slide_ids}
    check_same_encoder(slides.values(), str(folder))
    for slide_id, slide in slides.items():
        if not np.array_equal(slide.xy_level0, main[slide_id].xy_level0):
            raise StoreError(
                "the tiles differ from those of the main features",
                where=f"{folder / slide_id}.h5",
                fix="run `pathfm extract` again",
            )
    return slides


def _absence(row: SlideRow, label: str, inputs: MilInputs) -> Absence | None:
    outcome = inputs.upstream.get(row.slide_id)
    if outcome is not None and outcome.status in ("failed", "empty"):
        return Absence(outcome.status, outcome.reason or f"{outcome.status} before mil")
    if not (inputs.features_dirs["main"] / f"{row.slide_id}.h5").is_file():
        return Absence("no file", "there is no feature file")
    return None if row.labels.get(label) else Absence("no label", f"no value in the label column {label!r}")


def _read(row: SlideRow, labels: TileLabels | None, inputs: MilInputs, gathered: Gathered) -> Absence | None:
    """Adds a slide to ``gathered``, or tells why not."""
    store_path = inputs.stores_dir / f"{row.slide_id}.zarr"
    try:
        slide = read_slide(inputs.features_dirs["main"] / f"{row.slide_id}.h5")
        store = open_tiles(store_path) if store_path.is_dir() else None
        if store is not None and not np.array_equal(store.xy_level0, slide.xy_level0):
            return Absence("failed", "tiles and features do not belong together: run `pathfm extract` again")
    except StoreError as error:
        return Absence("failed", error.what)
    if not len(slide.feature_ND):
        return Absence("empty", "no tiles")
    gathered.slides[row.slide_id] = slide
    if store is not None:
        gathered.stores[row.slide_id] = store
        _add_truth(row, store, labels, gathered)
    return None


def _add_truth(row: SlideRow, store: TileStore, labels: TileLabels | None, gathered: Gathered) -> None:
    try:
        mask = read_mask(row.lesion_mask, store.size_level0) if row.lesion_mask else None
    except StoreError as error:
        gathered.notes.append(f"{row.slide_id}: {error.what}; its tiles have no truth")
        mask = None
    truth = tile_truth(store, mask, labels)
    if truth is not None:
        gathered.truth[row.slide_id] = truth
