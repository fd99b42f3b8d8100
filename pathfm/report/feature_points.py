"""The tiles and slides of a cohort as points: features of unit length, read once, and the columns they can be coloured by.

Legend: N tiles of a sample, S slides, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import StoreError, UsageError
from pathfm.log import track
from pathfm.stats.feature_health import usable_rows
from pathfm.stats.projection import Components, principal_components, unit_rows
from pathfm.stats.row_sample import RowSample, row_blocks
from pathfm.store.cohort import Cohort
from pathfm.store.feature_file import open_features
from pathfm.store.interop.features import read_features

SAMPLE_TILES = 10_000
"""Tiles that are drawn and that components are fitted on."""
MAX_VALUES = 12
"""A label column with more different values is not drawn unless it is asked for: nobody tells so many colours apart."""
SLIDE, PATIENT, SITE = "slide", "patient", "site"
UNKNOWN = "(none)"


@dataclass(frozen=True)
class FeaturePoints:
    """Features of a cohort, scaled to unit length.

    Attributes:
        slide_ids: slides with usable features, sorted.
        tiles_S: their usable tiles.
        mean_SD: the means of these, of unit length again.
        sample_ND: tiles of the sample, which are all tiles when there are no more than ``SAMPLE_TILES``.
        slide_N: of which slide each is, as index into ``slide_ids``.
        row_N: its number within the slide.
        left_out: slide id -> why it has no features here.
    """

    slide_ids: tuple[str, ...]
    tiles_S: NDArray[np.int64]
    mean_SD: NDArray[np.float32]
    sample_ND: NDArray[np.float32]
    slide_N: NDArray[np.int64]
    row_N: NDArray[np.int64]
    left_out: Mapping[str, str]

    @cached_property
    def components(self) -> Components:
        """The three principal components of the sample."""
        return principal_components(self.sample_ND, 3)

    @property
    def sample_words(self) -> str:
        """What the sample is, in words."""
        total, slides = int(self.tiles_S.sum()), len(self.slide_ids)
        drawn = f"{len(self.sample_ND):,} of {total:,}" if len(self.sample_ND) < total else f"all {total:,}"
        return f"{drawn} tiles of {slides:,} slide{'s' * (slides != 1)}"


def read_points(features_dir: Path, slide_ids: Sequence[str], limit: int = SAMPLE_TILES) -> FeaturePoints:
    """Reads the feature files of the slides; one slide is in memory at a time.

    Slides whose file is absent, damaged, or of another length than the first one's are left out, with the reason.

    Raises:
        StoreError: no slide has usable features.
    """
    sample, left_out = RowSample(limit), {}
    means: dict[str, NDArray[np.float64]] = {}
    tiles: dict[str, int] = {}
    for slide_id in track(sorted(slide_ids), "features", len(slide_ids)):
        try:
            features_ND, valid_N = _read(features_dir / f"{slide_id}.h5")
        except StoreError as error:
            left_out[slide_id] = error.what
            continue
        usable = np.flatnonzero(usable_rows(features_ND, valid_N))
        rows_ND = features_ND[usable]
        dim = len(next(iter(means.values()))) if means else rows_ND.shape[1]
        if not len(rows_ND) or rows_ND.shape[1] != dim:
            left_out[slide_id] = f"{rows_ND.shape[1]} dimensions instead of {dim}" if len(rows_ND) else "no usable tiles"
            continue
        sums = [unit_rows(block).sum(axis=0, dtype=np.float64) for block in row_blocks(rows_ND)]
        means[slide_id], tiles[slide_id] = np.sum(sums, axis=0) / len(rows_ND), len(rows_ND)
        sample.add(slide_id, rows_ND, usable)
    if not means:
        raise StoreError("no slide has usable features", where=str(features_dir), fix="run `pathfm extract` first")
    rows = sample.finish()
    return FeaturePoints(
        slide_ids=rows.names,
        tiles_S=np.array([tiles[slide_id] for slide_id in rows.names]),
        mean_SD=unit_rows(np.stack([means[slide_id] for slide_id in rows.names])),
        sample_ND=unit_rows(rows.values_ND),
        slide_N=rows.name_N,
        row_N=rows.row_N,
        left_out=left_out,
    )


def _read(path: Path) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Features [N, D] and which rows could be read, of a file of pathfm or, then without the latter, of another tool."""
    try:
        file = open_features(path)
    except StoreError:
        return read_features(path).features, None
    return file.features, file.valid


def columns(
    cohort: Cohort, slide_ids: Sequence[str], first_label: str = "", wanted: Sequence[str] = ()
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """What points can be coloured by: column -> slide id -> value, and notes on columns that are left out.

    The slide always comes first, then labels (``first_label`` before the others), site and patient, where they tell slides
    apart and have few enough values. With ``wanted`` it is those columns, in that order, whatever they hold.

    Raises:
        UsageError: a wanted column is not there.
    """
    rows = {row.slide_id: row for row in cohort.rows if row.slide_id in set(slide_ids)}
    found = {SLIDE: {slide_id: slide_id for slide_id in rows}}
    for name in sorted(cohort.label_names, key=lambda name: (name != first_label, cohort.label_names.index(name))):
        found[name] = {slide_id: row.labels.get(name) or UNKNOWN for slide_id, row in rows.items()}
    found[SITE] = {slide_id: row.site or UNKNOWN for slide_id, row in rows.items()}
    found[PATIENT] = {slide_id: row.patient_id or UNKNOWN for slide_id, row in rows.items()}
    absent = [name for name in wanted if name not in found]
    if absent:
        raise UsageError(f"the cohort has no column {absent[0]!r}", where="--by", fix=f"columns: {', '.join(found)}")
    if wanted:
        return {name: found[name] for name in wanted}, []
    counts = {name: len(set(values.values())) for name, values in found.items()}
    telling = [name for name in found if name == SLIDE or 1 < counts[name] < (len(rows) if name == PATIENT else MAX_VALUES + 1)]
    many = [name for name in found if name not in telling and counts[name] > MAX_VALUES and name != PATIENT]
    notes = [f"Column {name!r} has {counts[name]} values and is not drawn; ask for it by name." for name in many]
    return {name: found[name] for name in telling}, notes
