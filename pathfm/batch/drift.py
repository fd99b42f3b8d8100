"""Drift in a night batch: each new slide against the training's, and a page of them all (``docs/drift.md``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathfm.batch.results import Outbox, Read
from pathfm.errors import MissingExtraError, StoreError
from pathfm.log import get_log
from pathfm.store.feature_file import open_features
from pathfm.store.tile_store import open_tiles

if TYPE_CHECKING:
    from pathfm.mil.drift import DriftReference

PAGE = "drift.html"

log = get_log(__name__)


def drift_of(reference: DriftReference | None, store: Path, features: Path | None) -> dict[str, Any] | None:
    """What is known and what is unusual of a slide; None where nothing was measured, or there is nothing to compare with."""
    if reference is None:
        return None
    from pathfm.mil.drift import slide_facts

    try:
        facts = slide_facts(open_tiles(store), _valid_features(features), reference)
    except StoreError as error:
        log.warning("%s: drift was not measured: %s", store.stem, error)
        return None
    return {"facts": facts.record(), "flags": [flag.record() for flag in reference.flags(facts)]}


def _valid_features(path: Path | None) -> NDArray[Any]:
    if path is None:
        return np.zeros((0, 1))
    found = open_features(path)
    return np.asarray(found.features[found.valid])


def write_page(box: Outbox, reference: DriftReference | None, bundle: str, found: Mapping[str, Read]) -> None:
    """Makes the page of all results of a bundle anew."""
    if reference is None:
        return
    from pathfm.mil.drift_cohort import cohort_flags
    from pathfm.report.drift_page import write_drift_page

    mine = [read.said for read in found.values() if read.said["bundle"] == bundle and read.said["drift"]]
    rows = [_row(said) for said in sorted(mine, key=lambda said: (said["time"], said["name"]))]
    if not rows:
        return
    try:
        write_drift_page(box.folder / PAGE, reference.record(), rows, cohort_flags(reference, rows).record())
    except MissingExtraError as error:
        log.warning("no page of drift: %s", error)


def _row(said: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: said[name] for name in ("slide_id", "time", "decision")}, **said["drift"]}
