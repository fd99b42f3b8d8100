"""What decisions rest on: calibration, operating points, conformal sets, abstentions and odd slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pathfm.report.mil_blocks import Cell, Heading, Item, Table, TableRow, Words, header, number_cell, numeral, row, some
from pathfm.report.mil_tables import part_name
from pathfm.report.mil_words import of_class
from pathfm.report.results import TaskResult, estimate

Content = Mapping[str, Any]
ABSTAIN = "abstain:"
UNDECIDED: Mapping[str, str] = {
    "uncertain": "uncertain between the classes",
    "out of distribution": "unlike the training slides",
}
"""Reasons of abstentions in words, where their names say too little."""


def trust_items(task: TaskResult, names: Sequence[str] = ()) -> tuple[Item, ...]:
    """All that is known about decisions of a task, nothing where it makes none; ``names``: of the folds."""
    trust = task.content.get("trust") or {}
    if not trust:
        return ()
    found = some(
        *_calibration(trust),
        *_points(trust, task.positive),
        *_decisions(trust, task.positive),
        *_conformal(trust, names),
        *_novelty(trust),
    )
    notes = tuple(Words(note, "muted") for note in trust.get("notes", []))
    if not found and not notes:
        return ()
    if "brier" not in trust.get("calibration", {}):
        return (*notes, *found)
    return (Words(f"Thresholds and calibration were {trust['nested']}.", "muted"), *found, *notes)


def _calibration(trust: Content) -> tuple[Item | None, ...]:
    found = trust.get("calibration") or {}
    brier, error = found.get("brier") or {}, found.get("ece") or {}
    if not brier:
        return ()
    states = [name for name in ("before", "after") if name in brier]
    rows = (
        row("Brier score", *(numeral(brier[name], 3) for name in states), why="mean squared error: lower is better"),
        row(
            "Calibration error", *(numeral(error[name], 3) for name in states), why="distance of probability and observed share"
        ),
    )
    caption = f"Calibration ({found['kind']}) of {found['n']} {trust['unit']}s"
    heads = [f"{name} calibration" for name in states] if len(states) > 1 else ["not calibrated"]
    worse = len(states) > 1 and brier["after"] > brier["before"]
    return (
        Heading("Calibration"),
        Words("Calibration did not help here: the Brier score is higher after it.", "warn") if worse else None,
        Table(caption, header("", *heads), rows),
        Words(_sentence(found["note"]), "muted") if found.get("note") else None,
    )


def share_cell(share: Content | None) -> Cell:
    """A share with its limits and the counts behind it."""
    found = estimate(share)
    if share is None or found is None:
        return Cell("–", number=True)
    cell = number_cell(found)
    return Cell(f"{cell.text} ({share['hits']} of {share['count']})", cell.why, number=True)


def _points(trust: Content, positive: str) -> tuple[Item | None, ...]:
    points = trust.get("operating_points") or []
    if not points:
        return ()
    rows = []
    for point in points:
        low, high = point.get("threshold_low"), point.get("threshold_high")
        spread = f"folds {numeral(low)} to {numeral(high)}" if low is not None and high is not None and low != high else ""
        threshold = Cell(numeral(point["threshold"]), spread, number=True)
        calibrated = numeral(point.get("threshold_calibrated"))
        shares = (share_cell(point["sensitivity"]), share_cell(point["specificity"]))
        rows.append(row(point["name"], threshold, calibrated, *shares, why=point.get("note") or ""))
    caption = (
        f"Operating points, per {trust['unit']}, with exact 95 % intervals: thresholds of the probability of “{positive}”; "
        "decisions follow the first"
    )
    head = header("Rule", "threshold", "calibrated", *(of_class(name, positive) for name in ("sensitivity", "specificity")))
    return (Heading("Operating points"), Table(caption, head, tuple(rows)))


def _decisions(trust: Content, positive: str) -> tuple[Item | None, ...]:
    found = trust.get("decisions") or {}
    if "abstained" not in found:
        return ()
    rows = [row("abstained", share_cell(found["abstained"]), why="no decision is made")]
    rows.append(row("errors", share_cell(found["errors"]), why="of those that were decided"))
    rows += [
        row(of_class(name, positive), share_cell(found[name]), why="of those that were decided")
        for name in ("sensitivity", "specificity")
        if name in found
    ]
    said = [(name.removeprefix(ABSTAIN), name.startswith(ABSTAIN), count) for name, count in found["counts"].items()]
    decided = ", ".join(f"{count} {name}" for name, abstains, count in said if not abstains)
    undecided = ", ".join(f"{count} {UNDECIDED.get(name, name)}" for name, abstains, count in said if abstains)
    caption = f"Decisions, per {trust['unit']}, with exact 95 % intervals"
    return (
        Heading("Decisions and abstentions"),
        Table(caption, header("", "share"), tuple(rows)),
        Words(f"Decided: {decided or 'none'}. Not decided: {undecided or 'none'}.", "muted"),
    )


def _conformal(trust: Content, names: Sequence[str]) -> tuple[Item | None, ...]:
    found = trust.get("conformal") or {}
    if "refused" in found:
        return (
            (Heading("Conformal sets"), Words(f"There are none: {found['refused']}."))
            if "brier" in trust.get("calibration", {})
            else ()
        )
    if not found or (found.get("coverage") or {}).get("value") is None:
        return (Heading("Conformal sets"), Words(f"{_sentence(found['note'])}")) if found.get("note") else ()
    rows = [_covered("all", found["coverage"], primary=True)]
    rows += [_covered(part["class"], part) for part in found["classes"]]
    # One set of networks that judged everybody: parts are fifths of the patients, and have no names.
    names = names if len(found["folds"]) <= len(names) else ()
    rows += [_covered(part_name(part["fold"], names), part) for part in found["folds"] if len(found["folds"]) > 1]
    kind = "in every class" if found["class_wise"] else "over all patients together"
    sizes = ", ".join(
        f"{count} with {size} {'label' if size == '1' else 'labels'}" for size, count in found["set_sizes"].items()
    )
    outside = found["coverage"].get("inside") is False
    return (
        Heading("Conformal sets"),
        Words(f"Promised: the true label is in the set for {found['promised']:.0%}, {kind}. Sets: {sizes}."),
        Words("The coverage lies outside what chance alone explains: the promise does not hold here.", "warn")
        if outside
        else None,
        Table("How often the set held the true label, with 95 % limits", header("", "covered"), tuple(rows)),
        *(Words(_sentence(note), "muted") for note in found.get("notes", [])),
    )


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."


def _covered(name: str, coverage: Content, primary: bool = False) -> TableRow:
    """A coverage, what its limits are, and whether it lies outside of them."""
    chance = "limits: where chance alone leaves it if the promise holds"
    first = Cell(
        name,
        chance if "inside" in coverage else "limits: of the share itself",
        tag="outside the limits" if coverage.get("inside") is False else "",
    )
    return TableRow((first, share_cell(coverage)), primary)


def _novelty(trust: Content) -> tuple[Item | None, ...]:
    found = trust.get("novelty") or {}
    if not found.get("flagged"):
        reason = found.get("refused")
        return (Heading("Odd slides"), Words(f"Slides unlike the training slides are not marked: {reason}.")) if reason else ()
    flagged = found["flagged"]
    return (
        Heading("Odd slides"),
        Words(
            f"{flagged['hits']} of {flagged['count']} {trust['unit']}s ({flagged['value']:.1%}, 95 % {flagged['low']:.1%} to "
            f"{flagged['high']:.1%}) are farther from the training slides than {found['max_distance']:.0%} of those are from "
            f"each other, and get no decision; {found['expected']:.1%} are expected by chance."
        ),
    )
