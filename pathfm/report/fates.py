"""What became of every slide of the cohort: one row each, and counts that add up because they are counted from those rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.record import Outcome, StageReport

STAGES = ("tile", "extract", "mil")
"""Stages that handle slides one by one, in the order a slide meets them."""

UNLABELLED = ("no value for", "no label")
"""How the reason of the mil stage begins where a slide has no label."""

Status = Literal["used", "left out", "no label", "empty", "failed"]

_FOLDERS = re.compile(r"(?<![\w.<])(?:[A-Za-z]:)?[\\/](?:[^\s\\/:'\"<>]+[\\/])+(?=[^\s\\/])")


@dataclass(frozen=True)
class Fate:
    """How far one slide came.

    Attributes:
        status: used (went through every stage that ran), left out (a stage did not take it), no label (nothing to be
            judged by), empty or failed.
        stage: where it ended.
        reason: why, without machine paths; empty for used slides.
    """

    slide_id: str
    patient_id: str
    label: str
    status: Status
    stage: str
    reason: str


def without_folders(text: str, known: Path | None = None) -> str:
    """The text with absolute paths cut to their last name: the page must not tell on which machine it was made.

    Args:
        text: a reason or a setting.
        known: a path that may occur in it, also with spaces, which cannot be told from text otherwise.
    """
    if known is not None and known.name:
        text = text.replace(str(known), known.name)
    return _FOLDERS.sub("", text)


def slide_fates(cohort: Cohort, records: Mapping[str, StageReport], *labels: str) -> tuple[Fate, ...]:
    """One row per slide of the cohort, in the order of the slide ids.

    Args:
        cohort: all slides of the study.
        records: outcome rows by stage.
        labels: the label column that is shown; several (of survival, of several labels) each with its name.
    """
    tables = [(stage, {row.slide_id: row for row in records[stage].outcomes}) for stage in STAGES if stage in records]
    return tuple(
        Fate(row.slide_id, row.patient_id or "", _label(row, labels), *_end(row, tables))
        for row in sorted(cohort.rows, key=lambda row: row.slide_id)
    )


def _label(row: SlideRow, names: Sequence[str]) -> str:
    if len(names) == 1:
        return row.labels.get(names[0], "")
    return " ".join(f"{name}={row.labels[name]}" for name in names if row.labels.get(name))


def _end(row: SlideRow, tables: Sequence[tuple[str, Mapping[str, Outcome]]]) -> tuple[Status, str, str]:
    """Status, stage and reason of the first stage that a slide did not get through, else of the last."""
    for stage, outcomes in tables:
        outcome = outcomes.get(row.slide_id)
        if outcome is None:
            return "left out", stage, f"not part of the {stage} stage"
        if outcome.status in ("empty", "failed"):
            status: Status = "failed" if outcome.status == "failed" else "empty"
            if stage == "mil" and outcome.reason.startswith(UNLABELLED):
                status = "no label"
            return status, stage, without_folders(outcome.reason, row.path) or "no reason was recorded"
    return ("used", tables[-1][0], "") if tables else ("left out", "", "no stage has run")


def flow(fates: Sequence[Fate]) -> tuple[tuple[str, int], ...]:
    """Counts of slides from the cohort to the last stage: the first equals the sum of the others."""
    lost = Counter((fate.stage, fate.status) for fate in fates if fate.status != "used")
    order = {stage: index for index, stage in enumerate(("", *STAGES))}
    losses = sorted(lost.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    named = [(f"{status} in {stage}" if stage and status != "no label" else status, count) for (stage, status), count in losses]
    return ("in the cohort", len(fates)), *named, ("used", sum(fate.status == "used" for fate in fates))
