"""The files other stages and people read: tables, attention, heatmaps. Same content, same bytes.

Legend: N tiles of a bag, Q queries, C maps.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pathfm.compute import pick_device
from pathfm.mil.ensemble import Mean, Member
from pathfm.mil.explain import asked_again, deletion_insertion, tile_scores
from pathfm.mil.galleries import galleries, heat_of, tile_table, write_layer, write_pictures, write_qupath
from pathfm.mil.heatmap import Canvas, SlideHeat
from pathfm.mil.plan import Plan
from pathfm.mil.roster import said_labels, unit_name
from pathfm.mil.truth import read_mask
from pathfm.stats.localisation import Localised, ScoredSlide, localise
from pathfm.stats.seeds import derive_seed
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import commit_dir, commit_file, write_json
from pathfm.store.tile_store import TileStore

if TYPE_CHECKING:
    from pathfm.mil.results import Results

Cell = str | int | float
Floats = NDArray[np.float64]
NOT_JUDGED = "not judged: in no test part"
NOT_SEEN = "not judged: by mil.seen_in_pretraining, only patients whom the encoder has not seen are"
"""The reasons of someone who was learned from only."""
CURVE_STEPS = 10
"""Stretches of the deletion and insertion curves of the shown slides."""


class TileScores:
    """Tile scores of the slides whose truth is known, of one model.

    Of tasks with classes only slides of the positive class count: elsewhere there is nothing to be found.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.person_of = plan, plan.person_of
        self.slides: list[ScoredSlide] = []

    def wants(self, place: int) -> bool:
        """Whether a bag has slides with truth that count."""
        unit, task = self.plan.units[place], self.plan.tasks.main
        target = self.plan.target_BT[place][self.plan.tasks.slice_of(task).targets]
        counts = task.positive < 0 or float(target[0]) == task.positive
        return counts and any(slide_id in self.plan.gathered.truth for slide_id in unit.slide_ids)

    def add(self, place: int, score_N: Floats) -> None:
        """Keeps the scores of a bag's slides that have truth."""
        if not self.wants(place):
            return
        patient, truth = self.person_of[self.plan.units[place].patient_id], self.plan.gathered.truth
        for slide_id, part_N in self.plan.bags.split(place, score_N).items():
            if slide_id in truth:
                self.slides.append(ScoredSlide(slide_id, patient, part_N, truth[slide_id]))

    def localised(self) -> Localised | None:
        """How well the scores find the lesion."""
        settings = self.plan.settings
        return localise(self.slides, settings.numbers.bootstrap, derive_seed("localisation", settings.seed))


class Looker:
    """Sees every judged bag once, with the networks that never met it, and writes what they looked at.

    Attributes:
        tiles: scores of the slides with truth.
        curves: deletion and insertion of the shown bags, by unit.
        kind: what the maps show.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.device = pick_device(plan.study.compute)
        self.tiles = TileScores(plan)
        self.curves: dict[str, dict[str, Any]] = {}
        self.kind = "attention"
        self._shown = shown_slides(plan, plan.study.report.heatmaps)
        self._heats: list[SlideHeat] = []
        self._open = ExitStack()
        self._folders: dict[str, Path] = {}
        self._rows = {row.slide_id: row for row in plan.cohort.rows}

    def __enter__(self) -> Self:
        names = ["attention", "heatmaps", "geojson", *["layers"] * self.plan.study.report.heat_layers]
        self._folders = {name: self._open.enter_context(commit_dir(self.folder / name)) for name in names}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            for name, content in galleries(self._heats, self.plan.study.report.top_tiles).items():
                write_json(self.folder / name, content)
        self._open.__exit__(kind, error, trace)

    def look(self, place: int, mean: Mean, members: Sequence[Member]) -> None:
        """Writes the tables, and of shown slides the pictures, of one bag."""
        bag = self.plan.bags.read(place)
        explained = tile_scores(mean, members, bag, self.plan.tasks, self.device)
        score_N = explained.value_NC[:, explained.main]
        self.kind = explained.kind
        self.tiles.add(place, score_N)
        values = self.plan.bags.split(place, explained.value_NC)
        logits = self.plan.bags.split(place, explained.logit_NC) if explained.logit_NC is not None else {}
        for slide_id, value_NC in values.items():
            part = replace(explained, value_NC=value_NC, logit_NC=logits.get(slide_id))
            heat = heat_of(self.plan.gathered.slides[slide_id], self.plan.gathered.stores.get(slide_id), part)
            self._write_table(heat)
            self._draw(heat)
        unit = self.plan.units[place]
        if set(unit.slide_ids) & set(self._shown):
            column = max(self.plan.tasks.main.positive, 0)
            again = asked_again(members, bag, self.plan.tasks, column, self.device)
            seed = derive_seed("deletion", self.plan.settings.seed, unit.unit_id)
            name = unit.unit_id if unit.unit_id == unit.patient_id else f"{unit.patient_id}/{unit.unit_id}"
            self.curves[name] = deletion_insertion(again, score_N, seed, CURVE_STEPS, repeats=2).record()

    def _write_table(self, heat: SlideHeat) -> None:
        store = self.plan.gathered.stores.get(heat.slide_id)
        truth = self.plan.gathered.truth.get(heat.slide_id)
        if truth is not None:
            full = np.full(len(heat.xy_level0), -1, dtype=np.int8)
            full[self.plan.gathered.slides[heat.slide_id].kept] = truth
            truth = full
        header, rows = tile_table(heat, store.source_names if store else None, truth)
        write_csv(self._folders["attention"] / f"{heat.slide_id}.csv", header, rows)

    def _draw(self, heat: SlideHeat) -> None:
        store, is_shown = self.plan.gathered.stores.get(heat.slide_id), heat.slide_id in self._shown
        has_places = self.plan.gathered.slides[heat.slide_id].xy_level0 is not None
        if store is not None:
            has_places = not store.coords_synthetic
        if is_shown:
            self._heats.append(heat)
        if is_shown and has_places:
            # Also without a tile store: there is no picture to draw on, but QuPath has the slide.
            write_qupath(self._folders["geojson"] / f"{heat.slide_id}.geojson", heat, store)
        if is_shown and store is not None:
            canvas = canvas_of(store, self._rows[heat.slide_id], heat.slide_id in self.plan.gathered.truth)
            write_pictures(self._folders["heatmaps"], heat, canvas)
        if "layers" in self._folders and store is not None and has_places:
            write_layer(self._folders["layers"] / f"{heat.slide_id}.ome.tif", heat, store)


def canvas_of(store: TileStore, row: SlideRow, has_truth: bool) -> Canvas:
    """What the scores of a slide are drawn on."""
    # The store's mpp is that of its tiles.
    mpp_level0 = store.mpp * store.tile_px / store.tile_side_level0 if store.mpp and store.tile_side_level0 else None
    lesion = read_mask(row.lesion_mask, store.size_level0) if row.lesion_mask and has_truth else None
    return Canvas(store.thumbnail, store.thumbnail_downsample, mpp_level0, lesion, store.coords_synthetic)


def shown_slides(plan: Plan, count: int) -> tuple[str, ...]:
    """Slides to show: classes in turn (the positive one first), by slide id within a class. Never by result."""
    labels = plan.label_B
    positive = plan.tasks.main.classes[plan.tasks.main.positive] if plan.tasks.main.positive >= 0 else ""
    by_label: dict[str, list[str]] = {}
    for place in plan.tested:
        by_label.setdefault(labels[place] if plan.tasks.main.classes else "", []).extend(plan.units[place].slide_ids)
    groups = [sorted(by_label[label]) for label in sorted(by_label, key=lambda label: (label != positive, label))]
    return tuple(slide_id for turn in zip_longest(*groups) for slide_id in turn if slide_id is not None)[:count]


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A CSV table, whole or not at all; numbers with 8 digits."""
    with commit_file(path) as temporary:
        write_csv(temporary, header, rows)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A CSV table at the place given; numbers with 8 digits."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{cell:.8g}" if isinstance(cell, float) else cell for cell in row] for row in rows)


def write_predictions(path: Path, plan: Plan, results: Results) -> None:
    """One row per bag of the cohort: first those that took part, then those of whom nothing was left.

    ``reason`` says why someone has no prediction, or which slides of someone who has one took no part;
    ``seen_in_pretraining`` is 1 or 0, or empty where it is not known. Calibrated probabilities and decisions are nested: what
    made them was fitted on the other folds.
    """
    header = (
        "patient_id",
        "slide_id",
        "n_tiles",
        "fold",
        "label",
        *plan.tasks.columns,
        "predicted",
        "used",
        "seen_in_pretraining",
        *results.decision_columns,
        "reason",
    )
    fold_of: dict[int, list[int]] = {}
    for number, fold in enumerate(plan.places):
        for place in fold.test:
            fold_of.setdefault(place, []).append(number)
    lost, said, labels = _lost_slides(plan), results.row_of, plan.label_B
    rows: list[list[Cell]] = []
    for place, unit in enumerate(plan.units):
        folds = ";".join(map(str, fold_of.get(place, [])))
        about: list[Cell] = [unit.patient_id, ";".join(unit.slide_ids), plan.bags.lengths[place], folds, labels[place]]
        reason = _reasons(lost.pop((unit.unit_id, unit.patient_id), []), plan)
        if place not in said:
            why = NOT_SEEN if unit.patient_id in plan.seen.left_out() else NOT_JUDGED
            reason = "; ".join(filter(None, (why, reason)))
        answer, decided = results.cells(place)
        rows.append([*about, *answer, 1, _seen(unit.patient_id, plan), *decided, reason])
    for _, absent in sorted(lost.items()):
        patient = plan.patients[absent[0].slide_id]
        about = [patient, ";".join(row.slide_id for row in absent), 0, "", _label(absent, plan)]
        empty = [""] * (len(plan.tasks.columns) + 1)
        decided = [""] * len(results.decision_columns)
        rows.append([*about, *empty, 0, _seen(patient, plan), *decided, _reasons(absent, plan)])
    write_table(path, header, rows)


def write_patients(path: Path, plan: Plan, results: Results) -> None:
    """One row per patient of the cohort, whatever a bag is: the mean of the patient's bags, and how many of them there are."""
    columns = (*plan.tasks.columns, "used", *results.patient_columns, "reason")
    header = ("patient_id", "label", "bags", "slides", "slides_used", *columns)
    bags: dict[str, list[int]] = {}
    for place in plan.tested:
        bags.setdefault(plan.units[place].patient_id, []).append(place)
    slides: dict[str, list[SlideRow]] = {}
    for row in sorted(plan.cohort.rows, key=lambda row: row.slide_id):
        slides.setdefault(plan.patients[row.slide_id], []).append(row)
    rows: list[list[Cell]] = []
    for patient, mine in sorted(slides.items()):
        places, absent = bags.get(patient, []), [row for row in mine if row.slide_id in plan.gathered.absent]
        answer: list[Cell] = [""] * len(plan.tasks.columns)
        if places:
            answer = np.mean([results.row_of[place] for place in places], axis=0).tolist()
        why = "" if places or len(absent) == len(mine) else NOT_JUDGED
        reason = "; ".join(filter(None, (why, _reasons(absent, plan))))
        about: list[Cell] = [patient, _label(mine, plan), len(places), len(mine), len(mine) - len(absent)]
        rows.append([*about, *answer, int(bool(places)), *results.patient_cells(places), reason])
    write_table(path, header, rows)


def _label(rows: Sequence[SlideRow], plan: Plan) -> str:
    """What the main task was to say of slides, whatever became of them."""
    return said_labels(plan.settings.tasks[0], rows)


def _seen(patient: str, plan: Plan) -> Cell:
    return int(patient in plan.seen.seen_patients) if plan.seen.known else ""


def _lost_slides(plan: Plan) -> dict[tuple[str, str], list[SlideRow]]:
    """Slides that take no part, by the unit and patient they would have been of."""
    lost: dict[tuple[str, str], list[SlideRow]] = {}
    for row in sorted(plan.cohort.rows, key=lambda row: row.slide_id):
        if row.slide_id in plan.gathered.absent:
            patient = plan.patients[row.slide_id]
            lost.setdefault((unit_name(row, patient, plan.settings.level), patient), []).append(row)
    return lost


def _reasons(absent: Sequence[SlideRow], plan: Plan) -> str:
    absences = [(row.slide_id, plan.gathered.absent[row.slide_id]) for row in absent]
    return "; ".join(f"{slide_id}: {absence.kind}, {absence.reason}" for slide_id, absence in absences)


def numbers_of_tiles(localised: Localised | None) -> Mapping[str, Any]:
    """What ``metrics.json`` says of tile scores; ``localisation_auroc`` is there, if only as null."""
    return localised.record() if localised else {"localisation_auroc": None}
