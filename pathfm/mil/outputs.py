"""The files other stages and people read: tables, attention, heatmaps. Same content, same bytes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathfm.mil.bags import split_by_slide
from pathfm.mil.ensemble import OutOfFold, tested_places
from pathfm.mil.heatmap import Canvas, draw_heatmap, write_heatmap
from pathfm.mil.inputs import Gathered
from pathfm.mil.plan import Plan
from pathfm.mil.roster import Roster
from pathfm.mil.truth import read_mask
from pathfm.stats.localisation import UNKNOWN
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import commit_dir, commit_file, write_json
from pathfm.store.tile_store import TileStore

Cell = str | int | float
NOT_JUDGED = "not judged: by mil.seen_in_pretraining, only patients whom the encoder has not seen are"
"""The reason of someone who was learned from only."""


@dataclass(frozen=True)
class SlideAttention:
    """Out-of-fold attention [N] of one slide: weights (summing to 1 over the whole bag) and logits."""

    weight_N: NDArray[np.float64]
    logit_N: NDArray[np.float64]


def attention_by_slide(plan: Plan, answers: OutOfFold) -> dict[str, SlideAttention]:
    """The attention of every judged bag, handed back to its slides."""
    found: dict[str, SlideAttention] = {}
    for place, unit in enumerate(plan.judged.units):
        weights = split_by_slide(unit, plan.gathered.slides, answers.attention[place])
        logits = split_by_slide(unit, plan.gathered.slides, answers.attention_logit[place])
        found.update({slide_id: SlideAttention(weights[slide_id], logits[slide_id]) for slide_id in unit.slide_ids})
    return found


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A CSV table, whole or not at all; numbers with 8 digits."""
    with commit_file(path) as temporary:
        _write_csv(temporary, header, rows)


def write_predictions(path: Path, plan: Plan, answers: OutOfFold) -> None:
    """One row per patient (or slide) of the cohort: first those with a prediction, then those of whom nothing was left.

    ``reason`` says why someone has no prediction, or which slides of someone who has one took no part;
    ``seen_in_pretraining`` is 1 or 0, or empty where it is not known.
    """
    classes = plan.roster.classes
    header = (
        "patient_id",
        "slide_id",
        "n_tiles",
        "fold",
        "label",
        *(f"probability_{name}" for name in classes),
        "predicted",
        "used",
        "seen_in_pretraining",
        "reason",
    )
    fold_of = {place: number for number, fold in enumerate(plan.places) for place in fold.test}
    lost, tiles_B = _lost_slides(plan), plan.tiles_B
    said = dict(zip(tested_places(plan.places), answers.probability_BC, strict=True))
    rows: list[list[Cell]] = []
    for place, unit in enumerate(plan.roster.units):
        about: list[Cell] = [unit.patient_id, ";".join(unit.slide_ids), tiles_B[place], fold_of.get(place, ""), unit.label]
        reason = _reasons(lost.pop(unit.unit_id, []), plan)
        answer: list[Cell] = [*[""] * len(classes), ""]
        if place in said:
            answer = [*said[place].tolist(), classes[int(said[place].argmax())]]
        else:
            reason = "; ".join(filter(None, (NOT_JUDGED, reason)))
        rows.append([*about, *answer, 1, _seen(unit.patient_id, plan), reason])
    for _, absent in sorted(lost.items()):
        patient, label = plan.patients[absent[0].slide_id], absent[0].labels.get(plan.settings.label, "")
        about = [patient, ";".join(row.slide_id for row in absent), 0, "", label]
        rows.append([*about, *[""] * len(classes), "", 0, _seen(patient, plan), _reasons(absent, plan)])
    write_table(path, header, rows)


def _seen(patient: str, plan: Plan) -> Cell:
    return int(patient in plan.seen.seen_patients) if plan.seen.known else ""


def _lost_slides(plan: Plan) -> dict[str, list[SlideRow]]:
    """Slides that take no part, by the unit they would have been in."""
    lost: dict[str, list[SlideRow]] = {}
    for row in sorted(plan.cohort.rows, key=lambda row: row.slide_id):
        if row.slide_id in plan.gathered.absent:
            unit_id = plan.patients[row.slide_id] if plan.settings.level == "patient" else row.slide_id
            lost.setdefault(unit_id, []).append(row)
    return lost


def _reasons(absent: Sequence[SlideRow], plan: Plan) -> str:
    absences = [(row.slide_id, plan.gathered.absent[row.slide_id]) for row in absent]
    return "; ".join(f"{slide_id}: {absence.kind}, {absence.reason}" for slide_id, absence in absences)


def shown_slides(roster: Roster, count: int) -> list[str]:
    """Slides to show: classes in turn (the positive one first), by slide id within a class. Never by result."""
    order = sorted(roster.classes, key=lambda label: (label != roster.positive, label))
    groups = [sorted(s for unit in roster.units if unit.label == label for s in unit.slide_ids) for label in order]
    return [slide_id for turn in zip_longest(*groups) for slide_id in turn if slide_id is not None][:count]


def write_attention(folder: Path, gathered: Gathered, attention: Mapping[str, SlideAttention]) -> None:
    """``<slide_id>.csv`` with a row per tile; ``lesion`` is 1, 0 or empty (unknown)."""
    header = ("tile", "x_level0", "y_level0", "attention", "attention_logit", "source_name", "lesion")
    with commit_dir(folder) as temporary:
        for slide_id, values in sorted(attention.items()):
            count = len(values.weight_N)
            store = gathered.stores.get(slide_id)
            names = (store.source_names if store else None) or ("",) * count
            truth = gathered.truth.get(slide_id, np.full(count, UNKNOWN, dtype=np.int8)).tolist()
            xy = gathered.slides[slide_id].xy_level0
            columns = (
                range(count),
                xy[:, 0].tolist(),
                xy[:, 1].tolist(),
                values.weight_N.tolist(),
                values.logit_N.tolist(),
                names,
            )
            lesion = ["" if value == UNKNOWN else value for value in truth]
            _write_csv(temporary / f"{slide_id}.csv", header, zip(*columns, lesion, strict=True))


def write_heatmaps(folder: Path, shown: Sequence[str], plan: Plan, attention: Mapping[str, SlideAttention]) -> None:
    """``<slide_id>.png`` of the shown slides that have a tile store."""
    rows = {row.slide_id: row for row in plan.cohort.rows}
    with commit_dir(folder) as temporary:
        for slide_id in shown:
            store = plan.gathered.stores.get(slide_id)
            if store is not None:
                canvas = _canvas(store, rows[slide_id], has_truth=slide_id in plan.gathered.truth)
                picture = draw_heatmap(canvas, store.xy_level0, store.tile_side_level0, attention[slide_id].weight_N)
                write_heatmap(temporary / f"{slide_id}.png", picture)


def write_top_tiles(path: Path, shown: Sequence[str], attention: Mapping[str, SlideAttention], count: int) -> None:
    """slide_id -> numbers of the tiles of highest attention, highest first (ties: lower number first)."""
    write_json(
        path, {slide_id: np.argsort(-attention[slide_id].weight_N, kind="stable")[:count].tolist() for slide_id in shown}
    )


def _canvas(store: TileStore, row: SlideRow, has_truth: bool) -> Canvas:
    # The store's mpp is that of its tiles.
    mpp_level0 = store.mpp * store.tile_px / store.tile_side_level0 if store.mpp and store.tile_side_level0 else None
    lesion = read_mask(row.lesion_mask, store.size_level0) if row.lesion_mask and has_truth else None
    return Canvas(store.thumbnail, store.thumbnail_downsample, mpp_level0, lesion, store.coords_synthetic)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{cell:.8g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
