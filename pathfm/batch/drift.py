"""Drift in a night batch: each new slide against the training's, and a page of them all (``docs/drift.md``)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.batch.results import Outbox
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


class Measured(NamedTuple):
    """What the page shows of a result.

    Attributes:
        time: of the prediction.
        name: of the result.
        scanner: of the slide; empty: not stated.
        row: all of it, as JSON: of most slides nobody asks for more than the scanner.
    """

    time: str
    name: str
    scanner: str
    row: str


def measured(said: Mapping[str, Any]) -> Measured | None:
    """What the page shows of a ``result.json``; None where drift was not measured."""
    if not said["drift"]:
        return None
    row = {**{name: said[name] for name in ("slide_id", "time", "decision")}, **said["drift"]}
    return Measured(said["time"], said["name"], (row.get("facts") or {}).get("scanner") or "", json.dumps(row))


def write_page(box: Outbox, reference: DriftReference | None, found: Iterable[Measured]) -> None:
    """Makes the page of all results of a bundle anew."""
    if reference is None:
        return
    from pathfm.mil.drift_cohort import cohort_flags
    from pathfm.report.drift_page import DRAWN, write_drift_page

    slides = sorted(found)
    if not slides:
        return
    last = [json.loads(slide.row) for slide in slides[-DRAWN:]]
    by_scanner = {slide.scanner: {"facts": {"scanner": slide.scanner}} for slide in slides}
    rows = [*(by_scanner[slide.scanner] for slide in slides[:-DRAWN]), *last]
    try:
        write_drift_page(box.folder / PAGE, reference.record(), rows, cohort_flags(reference, last).record())
    except MissingExtraError as error:
        log.warning("no page of drift: %s", error)
