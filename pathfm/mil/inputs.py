"""What the stage starts from: features, tile stores and tile truth of every slide that can take part, all checked up front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import StoreError
from pathfm.mil.bags import check_same_encoder
from pathfm.mil.feature_cache import FeatureCache, SlideFacts
from pathfm.mil.foreign_inputs import ForeignFolder, foreign_notes, reader_of
from pathfm.mil.roster import Absence, labelled_slides, patient_ids
from pathfm.mil.truth import TileLabels, read_mask, read_tile_labels, tile_truth
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.record import Outcome
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import ExtractSettings, Study, TileSettings


@dataclass(frozen=True)
class Deploy:
    """What makes features of new slides like those that were learned from.

    Attributes:
        tile: settings of the tiles.
        extract: settings of the features, their precision resolved.
        encoder_folder: of an own or local encoder; None for public ones.
    """

    tile: TileSettings
    extract: ExtractSettings
    encoder_folder: Path | None


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
        foreign: the main features where they were made elsewhere, in any tool's layout.
        deploy: how features of new slides are made; None where they come from elsewhere, and then nothing can be locked.
    """

    features_dirs: Mapping[str, Path]
    stores_dir: Path
    mil_dir: Path
    upstream: Mapping[str, Outcome]
    main_name: str
    fingerprint: str
    encoder_dir: Path | None = None
    foreign: ForeignFolder | None = None
    deploy: Deploy | None = None

    def feature_file(self, role: str, slide_id: str) -> Path:
        """Where the features of a slide lie."""
        if self.foreign is not None and (found := self.foreign.find(slide_id)):
            return found
        return self.features_dirs[role] / f"{slide_id}.h5"


@dataclass
class Gathered:
    """Slides that take part, by slide_id, and those that do not.

    Attributes:
        slides: facts of the main features, which lie in the cache.
        stores: tile stores, where there is one.
        truth: lesion truth [N] of the tiles, where something is known.
        absent: slides that take no part, and why.
        notes: what a reader should know.
    """

    slides: dict[str, SlideFacts] = field(default_factory=dict)
    stores: dict[str, TileStore] = field(default_factory=dict)
    truth: dict[str, NDArray[np.int8]] = field(default_factory=dict)
    absent: dict[str, Absence] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def gather(study: Study, cohort: Cohort, inputs: MilInputs, cache: FeatureCache) -> Gathered:
    """Reads everything of every slide into the cache; a slide that cannot be used is noted with its reason.

    Raises:
        StoreError: the features are of different encoders.
        UsageError: no patients, or the table of tile labels is unreadable or contradicts itself.
    """
    labels = read_tile_labels(study.cohort.tile_labels) if study.cohort.tile_labels else None
    gathered, labelled = Gathered(), labelled_slides(cohort, patient_ids(cohort, study.cohort), study.mil)
    for row in sorted(cohort.rows, key=lambda row: row.slide_id):
        absence = _absence(row, inputs)
        if absence is None and row.slide_id not in labelled:
            absence = Absence("no label", f"no value for {study.mil.label!r}")
        if absence is None:
            absence = _read(row, labels, inputs, gathered, cache)
        if absence is not None:
            gathered.absent[row.slide_id] = absence
    check_same_encoder(gathered.slides.values(), str(inputs.features_dirs["main"]))
    if inputs.foreign is not None:
        gathered.notes += foreign_notes(inputs.foreign, cohort, gathered.slides)
    return gathered


def read_control(inputs: MilInputs, role: str, main: Mapping[str, SlideFacts], cache: FeatureCache) -> None:
    """Reads features of a control, of the same slides and tiles as the main ones, into its own cache.

    Raises:
        StoreError: one is absent or unusable, or its tiles are not those of the main features.
    """
    slides = {slide_id: cache.add(slide_id, inputs.feature_file(role, slide_id)) for slide_id in sorted(main)}
    check_same_encoder(slides.values(), str(inputs.features_dirs[role]))
    for slide_id, slide in slides.items():
        if not np.array_equal(_places(slide), _places(main[slide_id])):
            where = str(inputs.feature_file(role, slide_id))
            raise StoreError("the tiles differ from those of the main features", where=where, fix="run `pathfm extract` again")


def _absence(row: SlideRow, inputs: MilInputs) -> Absence | None:
    outcome = inputs.upstream.get(row.slide_id)
    if outcome is not None and outcome.status in ("failed", "empty"):
        return Absence(outcome.status, outcome.reason or f"{outcome.status} before mil")
    if not inputs.feature_file("main", row.slide_id).exists():
        return Absence("no file", "there is no feature file")
    return None


def _read(
    row: SlideRow, labels: TileLabels | None, inputs: MilInputs, gathered: Gathered, cache: FeatureCache
) -> Absence | None:
    """Adds a slide to ``gathered``, or tells why not."""
    store_path = inputs.stores_dir / f"{row.slide_id}.zarr"
    try:
        path = inputs.feature_file("main", row.slide_id)
        slide = cache.add(row.slide_id, path, reader_of(path, row.mpp) if inputs.foreign else None)
        store = open_tiles(store_path) if store_path.is_dir() else None
        if store is not None and not _belong(store, slide):
            return Absence("failed", "tiles and features do not belong together: run `pathfm extract` again")
    except StoreError as error:
        return Absence("failed", error.what)
    if not len(slide):
        return Absence("empty", "no tiles" if not slide.file_rows else "no tile could be read")
    gathered.slides[row.slide_id] = slide
    if unread := slide.file_rows - len(slide):
        gathered.notes.append(f"{row.slide_id}: {unread} of {slide.file_rows} tiles could not be read and are left out")
    if store is not None:
        gathered.stores[row.slide_id] = store
        _add_truth(row, store, labels, gathered)
    return None


def _places(slide: SlideFacts) -> NDArray[np.float64]:
    return np.zeros((len(slide), 0)) if slide.xy_level0 is None else slide.xy_level0


def _belong(store: TileStore, slide: SlideFacts) -> bool:
    return len(store) == slide.file_rows and np.array_equal(store.xy_level0[slide.kept], _places(slide))


def _add_truth(row: SlideRow, store: TileStore, labels: TileLabels | None, gathered: Gathered) -> None:
    try:
        mask = read_mask(row.lesion_mask, store.size_level0) if row.lesion_mask else None
    except StoreError as error:
        gathered.notes.append(f"{row.slide_id}: {error.what}; its tiles have no truth")
        mask = None
    truth = tile_truth(store, mask, labels)
    if truth is not None:
        gathered.truth[row.slide_id] = truth[gathered.slides[row.slide_id].kept]
