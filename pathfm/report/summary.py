"""The study's key numbers: ``summary.json`` (its keys are listed in ``docs/report.md``) and the lines printed after a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pathfm.mil_settings import MilSettings
from pathfm.report import mil_words
from pathfm.report.fates import Fate, flow
from pathfm.report.results import SHUFFLED, Estimate, MilResult, ModelScore, seen_words

FORMAT = "pathfm-summary"
VERSION = 1
CHANCE_PLACE = 0.5
"""Localisation AUROC of tiles at random."""
HEALTHY = frozenset({"normal", "negative", "neg", "benign", "healthy", "control", "controls", "no", "none", "absent"})
HEALTHY |= {"0", "false", "wt", "wildtype"}
"""Words in names of classes that are seldom what is looked for."""
SIGNIFICANT = 0.05
"""A p value from here on is not told apart from chance."""


def summarise(
    name: str, fingerprint: str, fates: Sequence[Fate], result: MilResult | None, settings: MilSettings | None = None
) -> dict[str, Any]:
    """Content of ``summary.json``; numbers that do not exist are null.

    Args:
        name: the study's name.
        fingerprint: what the study's result depends on.
        fates: one row per slide of the cohort.
        result: what mil found, None when it has not run.
        settings: it was trained with; None where nobody knows.
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
        "kind": result.task.kind if result else None,
        "positive": (result.positive or None) if result else None,
        "level": result.level if result else None,
        "n_slides": result.n_slides if result else len(used),
        "n_patients": result.n_patients if result else len({fate.patient_id or fate.slide_id for fate in used}),
        "failed": sum(fate.status == "failed" for fate in fates),
        "empty": sum(fate.status == "empty" for fate in fates),
        "no_label": sum(fate.status == "no label" for fate in fates),
        "left_out": sum(fate.status == "left out" for fate in fates),
        "failures": [
            {"slide_id": fate.slide_id, "status": fate.status, "stage": fate.stage, "reason": fate.reason}
            for fate in fates
            if fate.status != "used"
        ],
        "flow": dict(flow(fates)),
        "primary_metric": result.task.metric if result else None,
        **_numbers("primary_value", result.task.headline if result else None, "primary"),
        **_numbers("auroc", main.auroc if main else None),
        **_numbers("balanced_accuracy", main.balanced_accuracy if main else None),
        **_numbers("localisation_auroc", main.localisation if main else None),
        "localisation_slides": main.localisation_slides if main else None,
        **_seen(result),
        "controls": {score.name: _control(score, result.task.metric) for score in result.controls} if result else {},
        "bundle": (result.bundle or None) if result else None,
        "warnings": list(warnings(result, settings)) if result else [],
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


def _numbers(name: str, estimate: Estimate | None, limits: str = "") -> dict[str, float | None]:
    low, high = f"{limits or name}_low", f"{limits or name}_high"
    if estimate is None:
        return {name: None, low: None, high: None}
    return {name: estimate.value, low: estimate.low, high: estimate.high}


def _control(score: ModelScore, metric: str) -> dict[str, float | None]:
    return {
        "transductive": score.transductive,
        "patients_seen_share": score.seen_share,
        **_numbers("primary_value", score.numbers.get(metric), "primary"),
        **_numbers("auroc", score.auroc),
        **_numbers("balanced_accuracy", score.balanced_accuracy),
        "localisation_auroc": score.localisation.value if score.localisation else None,
    }


def warnings(result: MilResult, settings: MilSettings | None = None) -> tuple[str, ...]:
    """What a careful reader has to know before trusting the numbers; ``settings``: of the training, where they are known."""
    found = [
        *_swapped(result, settings),
        *_above_chance(result),
        *_shuffled(result),
        *_against_controls(result),
        *_localised(result),
    ]
    if result.seen and result.seen.transductive:
        found.append(
            f"Numbers marked transductive rest on an encoder that was pretrained, without labels, on slides of "
            f"{result.seen.share or 0:.0%} of these patients: for new patients expect less."
        )
    if (trained := (result.content.get("trained_on") or {}).get("patients")) and result.content["trained_on"]["rule"] == "mark":
        found.append(f"The networks learned from {trained} of these patients, who are in the numbers: expect less of new ones.")
    coverage = ((result.task.content.get("trust") or {}).get("conformal") or {}).get("coverage") or {}
    if coverage.get("inside") is False:
        found.append("Conformal sets do not hold what they promise here: see the section about trust.")
    if any(leak["crosses"] for leak in result.content.get("leaks") or []):
        found.append("Slides of different patients share data: see the section about the cohort.")
    return tuple(found)


def _swapped(result: MilResult, settings: MilSettings | None) -> Iterator[str]:
    """Whether what is healthy counts as positive because nobody said what does."""
    positive = result.task.positive_of_two
    if settings is None or settings.positive is not None or not positive or not _sounds_healthy(positive):
        return
    other = next(name for name in result.classes if name != positive)
    yield (
        f"Nobody chose the positive class, so it is “{positive}”, the last in sorted order: sensitivity, specificity, "
        f"operating points and decision curve are about it. If “{other}” is what is looked for, set mil.positive={other}."
    )


def _sounds_healthy(name: str) -> bool:
    joined = re.sub(r"wild[^a-z]type", "wildtype", name.casefold())
    return not HEALTHY.isdisjoint(re.findall(r"[a-z0-9]+", joined))


def _above_chance(result: MilResult) -> Iterator[str]:
    """Whether the model is better than chance, and shuffled labels are not."""
    metric, title = result.task.metric, mil_words.title(result.task.metric)
    chance, main = mil_words.chance_of(metric, len(result.classes)), result.task.headline
    if chance is None:
        return
    if main and _has_interval(main) and main.covers(chance):
        yield f"The interval of the {title} holds {chance:g}, which is chance: no effect is shown."
    elif main and main.value == chance:
        yield f"The {title} is {chance:g}, which is chance: no effect is shown."
    elif main and main.value < chance:
        yield f"The {title} is below {chance:g}, which is chance: the model is worse than guessing here."
    permutations = result.content.get("permutations") or {}
    if permutations and permutations["p"] > SIGNIFICANT:
        yield f"Trainings on shuffled labels reach as much by chance (p {permutations['p']:.2f})."


def _shuffled(result: MilResult) -> Iterator[str]:
    """Whether shuffled labels score off chance: by all trainings on them where there were many, else by the only one."""
    metric, title = result.task.metric, mil_words.title(result.task.metric)
    chance = mil_words.chance_of(metric, len(result.classes))
    if chance is None:
        return
    many = result.content.get("permutations") or {}
    one = next((score.numbers.get(metric) for score in result.controls if score.name == SHUFFLED), None)
    found = Estimate((many["low"] + many["high"]) / 2, many["low"], many["high"]) if many else one
    # The mean of the others predicts better than nothing learned: R² of shuffled labels is below 0 as a rule.
    if found is None or not _has_interval(found) or found.covers(chance) or (metric == "r2" and found.value < chance):
        return
    if many:
        yield (
            f"Of {len(many['values'])} trainings on shuffled labels the middle 95 % reach {title} {found.low:.2f} to "
            f"{found.high:.2f}, which does not hold {chance:g}: information leaks."
        )
    else:
        yield (
            f"With shuffled labels the interval does not hold {chance:g}. That was one shuffle; by chance its interval misses "
            f"{chance:g} more often than one in twenty. Whether information leaks, the permutation control "
            "(mil.numbers.permutations=20) tells."
        )


def _has_interval(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.high is not None


def _localised(result: MilResult) -> Iterator[str]:
    """Whether the model looks away from what is marked."""
    found = result.main.localisation
    if found and found.high is not None and found.high < CHANCE_PLACE:
        yield (
            f"The interval of the localisation AUROC lies below {CHANCE_PLACE:g}: the tiles that the model looks at are marked "
            "less often than by chance."
        )


def _against_controls(result: MilResult) -> Iterator[str]:
    """Which of the simple controls the model does not beat: all of them are named."""
    main, metric = result.task.headline, result.task.metric
    if main is None:
        return
    compared = {each["other"]: each for each in result.task.content.get("comparisons") or []}
    as_good, alike, near = list[str](), list[str](), list[str]()
    for score in result.controls:
        other, difference = score.numbers.get(metric), compared.get(score.name)
        if other is None or score.name == SHUFFLED:
            continue
        if other.value >= main.value:
            as_good.append(f"“{score.name}”")
        elif difference and not _is_significant(difference):
            p = "" if (chance := mil_words.corrected_p(difference)) is None else f" (p {chance:.2g})"
            alike.append(f"“{score.name}”{p}")
        elif difference is None and main.overlaps(other):
            near.append(f"“{score.name}”")
    if as_good:
        verb = "is" if len(as_good) == 1 else "are"
        yield f"T{_controls(as_good)[1:]} {verb} at least as good as the model, which adds nothing to that here."
    if alike:
        yield f"The model and {_controls(alike)} are not significantly different."
    if near:
        yield f"The intervals of the model and of {_controls(near)} overlap: the gain may be chance."


def _is_significant(difference: Mapping[str, Any]) -> bool:
    """As the verdict has it: by p, or by the limits where there is no p."""
    if (p := mil_words.corrected_p(difference)) is not None:
        return p < SIGNIFICANT
    return difference["low"] is not None and not difference["low"] <= 0 <= difference["high"]


def _controls(names: Sequence[str]) -> str:
    return f"the control{'s' * (len(names) > 1)} {' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"


def key_numbers(summary: Mapping[str, Any]) -> list[str]:
    """Lines to print at the end of a run, from the content of ``summary.json``."""
    lines = [f"{counted(summary['n_slides'], 'slide')} of {counted(summary['n_patients'], 'patient')} used"]
    lines[0] += "".join(
        f", {summary[key]} {key.replace('_', ' ')}" for key in ("failed", "empty", "no_label", "left_out") if summary[key]
    )
    if summary["primary_metric"] is None or summary["primary_value"] is None:
        return [*lines, "no classifier result"]
    seen, title = _seen_words(summary), mil_words.title(summary["primary_metric"])
    lines.append(f"{title} {_spoken(summary, 'primary_value', 'primary')}, {summary['primary']}{seen}")
    if summary["balanced_accuracy"] is not None:
        lines.append(f"balanced accuracy {_spoken(summary, 'balanced_accuracy')}{seen}")
    if summary["localisation_auroc"] is not None:
        where = f" on {counted(summary['localisation_slides'], 'slide')}" if summary["localisation_slides"] else ""
        lines.append(f"localisation AUROC {_spoken(summary, 'localisation_auroc')}{where}{seen}")
    for name, control in summary["controls"].items():
        if control["primary_value"] is not None:
            lines.append(f"control {name}: {title} {_spoken(control, 'primary_value', 'primary')}{_seen_words(control)}")
    return [*lines, *summary["warnings"]]


def _seen_words(numbers: Mapping[str, Any]) -> str:
    words = seen_words(numbers["patients_seen_share"] or 0)
    return f", {words}" if words else ""


def counted(count: int, noun: str) -> str:
    """``1 slide``, ``2 slides``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _spoken(numbers: Mapping[str, Any], key: str, limits: str = "") -> str:
    low, high = numbers[f"{limits or key}_low"], numbers[f"{limits or key}_high"]
    interval = f" (95 % interval {low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    return f"{numbers[key]:.2f}{interval}"
