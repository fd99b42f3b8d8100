"""Rows of ``predictions.csv`` and ``patients.csv``: nobody of the cohort is without one. Columns: ``docs/bundle.md``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfm import __version__
from pathfm.errors import StoreError
from pathfm.mil.predict import Answers, Ensemble, Verdict
from pathfm.mil.roster import labelled_slides, said_labels
from pathfm.mil.seen import Seen
from pathfm.mil.tasks.cells import safe_name
from pathfm.mil.tasks.contract import Task
from pathfm.store.cohort import Cohort
from pathfm.store.record import Outcome
from pathfm.store.tile_store import TileStore, open_tiles

LEFT_OUT = "left out: seen in pretraining"
FATES = ("no file", "failed", "empty", "no label", "left out")
"""What may become of a slide on its way to the numbers."""
NOT_TISSUE = ("no tissue", "outside")
"""Fates of places of the grid that never were tiles of tissue."""
ASSUMED = "assumed"
"""Source of an mpp, in a tile store, that neither the slide nor its row of the table has."""
MOSTLY = 0.5
"""Share of the tissue's tiles whose loss to the filters is worth a flag."""


@dataclass(frozen=True)
class Known:
    """What is known of the new slides before their tiles are asked about.

    Attributes:
        patients: slide_id -> patient (the slide_id where none is given).
        identity: slide_id -> hash of the slide's content; empty where it cannot be read.
        trained: slide_id -> why the networks count as trained on its patient; only where they do.
        has_labels: there is something to be judged by.
    """

    patients: Mapping[str, str]
    identity: Mapping[str, str]
    trained: Mapping[str, str]
    has_labels: bool

    @property
    def trained_patients(self) -> frozenset[str]:
        """Patients whom the networks learned from."""
        return frozenset(self.patients[slide_id] for slide_id in self.trained)


@dataclass(frozen=True)
class Result:
    """Everything about the new slides that the tables tell.

    Attributes:
        cohort: all slides.
        stores_dir: folder of ``<slide_id>.zarr``.
        ensemble: that was asked.
        known: before.
        seen: what the encoder has seen of them.
        answers: of the ensemble.
        outcomes: slide_id -> what became of it in the stages before, or in asking.
    """

    cohort: Cohort
    stores_dir: Path
    ensemble: Ensemble
    known: Known
    seen: Seen
    answers: Answers
    outcomes: Mapping[str, Outcome]

    def outcome(self, slide_id: str) -> Outcome:
        """What became of a slide in the end."""
        verdict = self.answers.slides.get(slide_id)
        if verdict is not None:
            return Outcome(slide_id, "done", counts={"tiles": verdict.tiles})
        before = self.outcomes[slide_id]
        return Outcome(slide_id, "empty", LEFT_OUT) if before.status in {"done", "kept"} else before


def slide_rows(result: Result) -> Iterator[dict[str, str]]:
    """One row per slide, by slide_id, the failed, empty and left out ones with their reason."""
    for row in sorted(result.cohort.rows, key=lambda row: row.slide_id):
        verdict, store = result.answers.slides.get(row.slide_id), _store(result.stores_dir / f"{row.slide_id}.zarr")
        outcome = result.outcome(row.slide_id)
        patient = result.known.patients[row.slide_id]
        yield {
            "slide_id": row.slide_id,
            "patient_id": row.patient_id or "",
            "outcome": "predicted" if verdict else "left out" if outcome.reason == LEFT_OUT else outcome.status,
            "reason": "" if verdict else outcome.reason,
            "n_tiles": str(verdict.tiles) if verdict else "",
            **_label(result, [row.slide_id]),
            **prediction_cells(result.ensemble, verdict),
            "mpp": f"{store.mpp:.6g}" if store and store.mpp else "",
            "tiles_dropped": "" if store is None else number_cell(dropped_share(store)),
            "qc": "; ".join(_flags(result, store, verdict)),
            **_about(result, patient),
            "slide_identity": result.known.identity[row.slide_id],
            **_made_by(result),
        }


def patient_rows(result: Result) -> Iterator[dict[str, str]]:
    """One row per patient, by patient_id: all slides together, or the mean over units, as the bundle's level has it."""
    slides: dict[str, list[str]] = {}
    for row in sorted(result.cohort.rows, key=lambda row: row.slide_id):
        slides.setdefault(result.known.patients[row.slide_id], []).append(row.slide_id)
    said = result.answers.of_patients(result.ensemble)
    for patient, slide_ids in sorted(slides.items()):
        lost = [result.outcome(slide_id) for slide_id in slide_ids if slide_id not in result.answers.slides]
        verdict = said.get(patient)
        yield {
            "patient_id": patient,
            "outcome": "predicted" if verdict else "no slide",
            "reason": "; ".join(f"{outcome.slide_id}: {outcome.reason}" for outcome in lost),
            "n_slides": str(len(slide_ids)),
            "n_slides_used": str(len(slide_ids) - len(lost)),
            "n_tiles": str(verdict.tiles) if verdict else "",
            **_label(result, slide_ids),
            **prediction_cells(result.ensemble, verdict),
            **_about(result, patient),
            **_made_by(result),
        }


def flow(result: Result, left_out: Collection[str]) -> dict[str, dict[str, int]]:
    """Slides and patients by fate, from the table to the numbers; the fates add up to the cohort.

    A patient is used with any slide, else lost by the first reason, in the order of ``FATES``, of the slides.
    """
    labelled = labelled_slides(result.cohort, result.known.patients, result.ensemble.bundle.settings)
    fate_of = {row.slide_id: _fate(result, row.slide_id, left_out, labelled) for row in result.cohort.rows}
    of_patient: dict[str, set[str]] = {}
    for slide_id, fate in fate_of.items():
        of_patient.setdefault(result.known.patients[slide_id], set()).add(fate)
    patients = [next(fate for fate in ("used", *FATES) if fate in found) for found in of_patient.values()]
    return {"slides": _counted(list(fate_of.values())), "patients": _counted(patients)}


def _fate(result: Result, slide_id: str, left_out: Collection[str], labelled: Collection[str]) -> str:
    outcome = result.outcome(slide_id)
    if outcome.status != "done":
        return "left out" if outcome.reason == LEFT_OUT else outcome.status
    is_out = result.known.patients[slide_id] in left_out
    return "left out" if is_out else "used" if slide_id in labelled else "no label"


def _counted(fates: Sequence[str]) -> dict[str, int]:
    return {"cohort": len(fates), **{fate: fates.count(fate) for fate in (*FATES, "used")}}


def prediction_cells(ensemble: Ensemble, verdict: Verdict | None) -> dict[str, str]:
    """Probabilities (or values), their range over the members, and what the locked thresholds make of them."""
    columns, place = ensemble.tasks.columns, ensemble.decided_by
    prediction_P = verdict.prediction_P.tolist() if verdict else [None] * len(columns)
    spread_M = verdict.said_MP[:, place].tolist() if verdict else [None]
    cell_of = [_cell_of(task) for task in ensemble.tasks.tasks for _ in task.columns]
    cells = {name: cell(value) for name, cell, value in zip(columns, cell_of, prediction_P, strict=True)}
    cells |= {"lowest": cell_of[place](min(spread_M)), "highest": cell_of[place](max(spread_M))}
    for name in ensemble.trust:
        cells |= _decision_cells(ensemble, name, verdict)
    return cells


def _decision_cells(ensemble: Ensemble, name: str, verdict: Verdict | None) -> dict[str, str]:
    """What the locked thresholds of one task make of a bag; columns of further tasks start with their name."""
    task = ensemble.task(name)
    decision = verdict.decisions[name] if verdict else None
    is_calibrated = ensemble.trust[name].calibrator is not None
    labels = task.classes if is_calibrated else ()
    calibrated_C = decision.calibrated_C if decision else [None] * len(labels)
    cells = {f"calibrated_{label}": number_cell(value) for label, value in zip(labels, calibrated_C, strict=True)}
    cells["decision"] = decision.decision if decision else ""
    cells["conformal_set"] = "|".join(decision.set) if decision else ""
    cells["distance"] = number_cell(verdict.distance[name]) if verdict else ""
    cells["doubts"] = "; ".join(decision.reasons) if decision else ""
    is_main = name == ensemble.tasks.main.name
    return {safe_name(column if is_main else f"{name}_{column}"): cell for column, cell in cells.items()}


def _cell_of(task: Task) -> Callable[[float | None], str]:
    return value_cell if task.kind == "regression" else number_cell


def value_cell(value: float | None) -> str:
    """Eight digits that tell something, since a label may be in any unit; empty where there is no number."""
    return "" if value is None or value != value else f"{value:.8g}"


def number_cell(value: float | None) -> str:
    """Six digits behind the point; empty where there is no number."""
    return "" if value is None or value != value else f"{value:.6f}"


def dropped_share(store: TileStore) -> float | None:
    """Share of the tiles of tissue that the filters dropped; None where nothing was looked for."""
    counts = store.attrs.get("counts") or {}
    found = counts.get("grid", 0) - sum(counts.get(name, 0) for name in NOT_TISSUE)
    return 1 - counts.get("kept", 0) / found if found else None


def _flags(result: Result, store: TileStore | None, verdict: Verdict | None) -> list[str]:
    """What a reader should look at before believing the row."""
    flags = []
    if verdict and verdict.tiles < result.ensemble.bundle.facts["trained_with"]["fewest_tiles"]:
        flags.append("fewer tiles than any training slide")
    if store is not None and (dropped_share(store) or 0) > MOSTLY:
        flags.append("most tiles dropped by the filters")
    if store is not None and store.mpp is None:
        flags.append("mpp unknown")
    if store is not None and store.attrs.get("mpp_source") == ASSUMED:
        flags.append("mpp assumed")
    return flags


def _label(result: Result, slide_ids: Collection[str]) -> dict[str, str]:
    """What the main task should have said, where the table has labels."""
    if not result.known.has_labels:
        return {}
    rows = [row for row in result.cohort.rows if row.slide_id in slide_ids]
    return {"label": said_labels(result.ensemble.bundle.settings.tasks[0], rows)}


def _about(result: Result, patient: str) -> dict[str, str]:
    seen, trained = result.seen, result.known.trained
    reasons = {why for slide_id, why in trained.items() if result.known.patients[slide_id] == patient}
    return {
        "seen_in_pretraining": str(int(patient in seen.seen_patients)) if seen.known else "",
        "trained_on": min(reasons, default=""),
    }


def _made_by(result: Result) -> dict[str, str]:
    return {"bundle": result.ensemble.bundle.digest, "code": __version__}


def _store(path: Path) -> TileStore | None:
    try:
        return open_tiles(path)
    except StoreError:
        return None
