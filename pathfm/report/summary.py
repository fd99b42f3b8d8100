"""The study's key numbers: ``summary.json`` (its keys are listed in ``docs/report.md``) and the lines printed after a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pathfm.report.fates import Fate, flow
from pathfm.report.results import Estimate, MilResult, ModelScore, seen_words

FORMAT = "pathfm-summary"
VERSION = 1


def summarise(name: str, fingerprint: str, fates: Sequence[Fate], result: MilResult | None) -> dict[str, Any]:
    """Content of ``summary.json``; numbers that do not exist are null.

    Args:
        name: the study's name.
        fingerprint: what the study's result depends on.
        fates: one row per slide of the cohort.
        result: what mil found, None when it has not run.
    """
    used = [fate for fate in fates if fate.status == "used"]
    main = result.main if result else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "study": name,
        "fingerprint": fingerprint,
        "primary": result.primary if result else None,
        "label": result.label if result else None,
        "positive": result.positive if result else None,
        "level": result.level if result else None,
        "n_slides": result.n_slides if result else len(used),
        "n_patients": result.n_patients if result else len({fate.patient_id or fate.slide_id for fate in used}),
        "failed": sum(fate.status == "failed" for fate in fates),
        "empty": sum(fate.status == "empty" for fate in fates),
        "left_out": sum(fate.status == "left out" for fate in fates),
        "failures": [
            {"slide_id": fate.slide_id, "status": fate.status, "stage": fate.stage, "reason": fate.reason}
            for fate in fates
            if fate.status != "used"
        ],
        "flow": dict(flow(fates)),
        **_numbers("auroc", main.auroc if main else None),
        **_numbers("balanced_accuracy", main.balanced_accuracy if main else None),
        **_numbers("localisation_auroc", main.localisation if main else None),
        "localisation_slides": main.localisation_slides if main else None,
        **_seen(result),
        "controls": {score.name: _control(score) for score in (result.controls if result else ())},
        "warnings": list(warnings(result)) if result else [],
        "notes": list(result.notes) if result else [],
    }


def _seen(result: MilResult | None) -> dict[str, Any]:
    seen = result.seen if result else None
    known = seen is not None and seen.patients is not None
    return {
        "seen_in_pretraining": seen.rule if seen else None,
        "transductive": seen.transductive if seen and known else None,
        "patients_seen": seen.patients if seen else None,
        "patients_seen_share": seen.share if seen else None,
        "patients_left_out": seen.left_out if seen else None,
    }


def _numbers(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _control(score: ModelScore) -> dict[str, float | None]:
    return {
        "transductive": score.transductive,
        "patients_seen_share": score.seen_share,
        **_numbers("auroc", score.auroc),
        **_numbers("balanced_accuracy", score.balanced_accuracy),
        "localisation_auroc": score.localisation.value if score.localisation else None,
    }


def best_control(result: MilResult) -> ModelScore | None:
    """The real control (not the shuffled labels) with the highest AUROC."""
    rivals = [(score.auroc.value, score) for score in result.controls if score.auroc and score.name != "shuffled labels"]
    return max(rivals, key=lambda rival: rival[0])[1] if rivals else None


def warnings(result: MilResult) -> tuple[str, ...]:
    """What a careful reader has to know before trusting the numbers."""
    found: list[str] = []
    main, rival = result.main.auroc, best_control(result)
    if main and rival and rival.auroc and rival.auroc.value >= main.value:
        found.append(f"The control “{rival.name}” is at least as good as the model: the model adds nothing to it here.")
    elif main and rival and rival.auroc and main.overlaps(rival.auroc):
        found.append(f"The intervals of the model and of the control “{rival.name}” overlap: the gain may be chance.")
    if result.seen and result.seen.transductive:
        found.append(
            f"Numbers marked transductive rest on an encoder that was pretrained, without labels, on slides of "
            f"{result.seen.share or 0:.0%} of these patients: for new patients expect less."
        )
    shuffled = next((score.auroc for score in result.controls if score.name == "shuffled labels"), None)
    if shuffled and not shuffled.covers(0.5):
        found.append(
            "With shuffled labels the interval does not hold 0.5. "
            "By chance that happens in one study of twenty; otherwise information leaks."
        )
    return tuple(found)


def key_numbers(summary: Mapping[str, Any]) -> list[str]:
    """Lines to print at the end of a run, from the content of ``summary.json``."""
    lines = [f"{counted(summary['n_slides'], 'slide')} of {counted(summary['n_patients'], 'patient')} used"]
    lines[0] += "".join(f", {summary[key]} {key.replace('_', ' ')}" for key in ("failed", "empty", "left_out") if summary[key])
    if summary["auroc"] is None:
        return [*lines, "no classifier result"]
    seen = _seen_words(summary)
    lines.append(f"AUROC {_spoken(summary, 'auroc')}, {summary['primary']}{seen}")
    if summary["balanced_accuracy"] is not None:
        lines.append(f"balanced accuracy {_spoken(summary, 'balanced_accuracy')}{seen}")
    if summary["localisation_auroc"] is not None:
        where = f" on {counted(summary['localisation_slides'], 'slide')}" if summary["localisation_slides"] else ""
        lines.append(f"localisation AUROC {_spoken(summary, 'localisation_auroc')}{where}{seen}")
    for name, control in summary["controls"].items():
        if control["auroc"] is not None:
            lines.append(f"control {name}: AUROC {_spoken(control, 'auroc')}{_seen_words(control)}")
    return [*lines, *summary["warnings"]]


def _seen_words(numbers: Mapping[str, Any]) -> str:
    words = seen_words(numbers["patients_seen_share"] or 0)
    return f", {words}" if words else ""


def counted(count: int, noun: str) -> str:
    """``1 slide``, ``2 slides``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _spoken(numbers: Mapping[str, Any], key: str) -> str:
    low, high = numbers[f"{key}_low"], numbers[f"{key}_high"]
    interval = f" (95 % interval {low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    return f"{numbers[key]:.2f}{interval}"
