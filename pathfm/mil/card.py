"""The model card of a bundle: what CLAIM and TRIPOD+AI ask to be reported, from what the training has measured.

Plain text from ``bundle.json`` and ``metrics.json`` alone, so that the same bundle has the same card. What nobody can measure
(intended use, ethics) is left blank to be filled in elsewhere: the card itself is locked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pathfm.errors import StoreError
from pathfm.log import decimals
from pathfm.models.cards import find_card
from pathfm.store.commit import read_json

BLANK = "(to be stated by whoever deploys it, outside this locked file)"
COVERAGE = (
    "Coverage of the ensemble is approximate: sets were calibrated on scores of those networks that had not met the"
    " patient, and are applied to the mean of all. They are not valid on another scanner, stain or site: judge them there."
)
SHOWN_SUBGROUPS = 200


def model_card(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        about: content of ``bundle.json`` without the hashes of files.
        metrics: content of ``metrics.json``; what is absent from it is said to be absent.
    """
    parts = (_head, _data, _inputs, _performance, _trust, _subgroups, _limits)
    return "\n".join(line for part in parts for line in part(about, metrics)) + "\n"


def encoder_licence(name: str, folder: Path | None) -> str:
    """The licence that an encoder's folder, or else its card, states; empty where neither does.

    Args:
        name: as in ``extract.encoder``.
        folder: of an own or local encoder.
    """
    if folder is None:
        card = find_card(name)
        return card.licence if card else ""
    said = _json_of(folder / "card.json")
    config = _json_of(folder / "config.json").get("pretrained_cfg") or {}
    found = said.get("licence") or (said.get("recipe") or {}).get("licence") or config.get("license")
    return str(found or "")


def _json_of(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except StoreError:
        return {}


SENTENCES = frozenset({"note", "refused"})
"""Keys of metrics whose text may name slides or patients, beside ``notes``."""


def without_names(metrics: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Metrics that may leave the house: leaks as counts, and no note that names a slide or a patient.

    Args:
        metrics: content of ``metrics.json``.
        names: ids of slides and patients.
    """
    leaks = [
        {"kind": leak.get("kind"), **{key: len(leak.get(key) or ()) for key in ("slides", "patients")}}
        for leak in metrics.get("leaks") or []
    ]
    looks = {key: value for key, value in (metrics.get("looks") or {}).items() if key != "deletion_insertion"}
    rest = {key: value for key, value in metrics.items() if key not in {"leaks", "looks"}}
    cleaned: dict[str, Any] = _without(rest, names)
    dropped = len(metrics.get("notes") or []) - len(cleaned.get("notes") or [])
    if dropped:
        cleaned["notes"] = [*cleaned["notes"], f"{dropped} notes about single slides or patients are not in the bundle"]
    return {**cleaned, "leaks": leaks, "looks": looks}


def _without(content: Any, names: Collection[str]) -> Any:  # noqa: ANN401
    """JSON content, at any depth, less the sentences (``notes``, ``note``, ``refused``) that name somebody."""
    if isinstance(content, list | tuple):
        return [_without(item, names) for item in content]
    if not isinstance(content, Mapping):
        return content
    cleaned: dict[str, Any] = {}
    for key, value in content.items():
        if key == "notes":
            cleaned[key] = [note for note in value if not _names_somebody(str(note), names)]
        elif key in SENTENCES and isinstance(value, str):
            cleaned[key] = "not in the bundle: it names somebody" if _names_somebody(value, names) else value
        else:
            cleaned[key] = _without(value, names)
    return cleaned


def _names_somebody(text: str, names: Collection[str]) -> bool:
    found = (name for name in names if name and name in text)
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in found)


def number(said: object) -> str:
    """A value with its interval, as ``0.912 (0.853 to 0.957, 95 %, delong)``."""
    if not isinstance(said, Mapping) or said.get("value") is None:
        return "not known"
    text = decimals(said["value"], 3)
    if said.get("low") is None or said.get("high") is None:
        return text
    method = f", {said['method']}" if said.get("method") else ""
    return f"{text} ({decimals(said['low'], 3)} to {decimals(said['high'], 3)}, 95 %{method})"


def _head(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    yield f"# Model card: {metrics.get('label', 'slide classifier')}"
    yield ""
    yield f"- Made by pathfm {about['code']}; bundle format {about['version']}."
    yield f"- Predicts: {metrics.get('kind', '?')} task `{metrics.get('label', '?')}` at the level of the {about['level']}."
    if metrics.get("classes"):
        positive = f"; positive: {metrics['positive']}" if metrics.get("positive") else ""
        yield f"- Classes: {', '.join(metrics['classes'])}{positive}."
    others = ", ".join(sorted(metrics.get("also") or {}))
    yield from [f"- Further tasks: {others}."] if others else []
    yield f"- Intended use, users and setting: {BLANK}"
    yield f"- Ethics approval and de-identification: {BLANK}"
    yield ""


def _data(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    known, splits = about["trained_on"], metrics.get("splits") or {}
    yield "## Data"
    yield ""
    judged = f"{metrics.get('n_patients', '?')} patients with {metrics.get('n_slides', '?')} slides"
    yield f"- Learned from {len(known['patients'])} patients; numbers rest on {judged}."
    yield f"- Source, sites, scanners, dates and inclusion: {BLANK}"
    scheme, digest = (splits.get(name, "not recorded") for name in ("scheme", "hash"))
    yield f"- Partition: {scheme}, patients never on two sides; hash {digest}."
    seen = metrics.get("seen_in_pretraining") or {}
    share = seen.get("share")
    yield f"- Patients the encoder was pretrained on: {'not recorded' if share is None else f'{share:.0%}'}."
    yield f"- Leaks found: {len(metrics.get('leaks') or [])}."
    yield from _flow(metrics.get("flow") or {})
    yield ""


def _flow(flow: Mapping[str, Any]) -> Iterator[str]:
    kinds = [kind for kind, counts in flow.items() if isinstance(counts, Mapping)]
    if not kinds:
        return
    columns = list(flow[kinds[0]])
    yield ""
    yield "Missing data, from the cohort to those used:"
    yield ""
    yield from _table(["", *columns], [[kind, *(flow[kind].get(name, "") for name in columns)] for kind in kinds])


def _inputs(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    tile, encoder, mpp = about["tile"], about["encoder"], about["trained_with"]["mpp"]
    side = tile["tile_px"]
    yield "## Input"
    yield ""
    yield (
        f"- Tiles of {side} px at {tile['mpp']} um per px"
        + (f" (in training {mpp[0]:.4g} to {mpp[1]:.4g})" if mpp else "")
        + "."
    )
    yield f"- Tissue by {tile['tissue']['method']}, at least {tile['tissue']['min_fraction']:.0%} of a tile."
    kept = "inside this bundle" if encoder["inside"] else "not inside: named by its hash"
    weights = encoder["identity"].get("recipe_weights_sha256", "not known")
    yield f"- Encoder {encoder['name']} ({encoder['dim']} features, {about['extract']['precision']}), {kept}."
    yield f"- Hash of the encoder's weights: {weights}."
    yield f"- Licence of the encoder: {encoder['licence'] or 'not stated by its card; see its source'}."
    yield "- Licence of this classifier: " + BLANK
    yield ""


def _performance(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    yield "## Performance (out of fold: every patient judged by networks that learned nothing from that patient)"
    yield ""
    models = metrics.get("models") or {}
    names = list(dict.fromkeys(name for said in models.values() for name, value in said.items() if _is_number(value)))
    rows = [[metric, *(number(said.get(metric)) for said in models.values())] for metric in names]
    yield from _table(["", *models], rows) if rows else ["No numbers are recorded."]
    yield ""
    for found in metrics.get("comparisons") or []:
        yield f"- {found.get('model')} and {found.get('other')}, {found.get('metric')}: {found.get('verdict')}."
    if len(metrics.get("comparisons") or []) > 1:
        yield "- p values of these comparisons are corrected for their number (Holm)."
    yield "- Folds share training patients: intervals of pooled predictions do not show how much training again would change."
    yield ""


def _trust(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    trust = metrics.get("trust") or {}
    yield "## Calibration, thresholds, doubt"
    yield ""
    calibration = trust.get("calibration") or {}
    told = [f"{name} {_told(value)}" for name, value in calibration.items() if not isinstance(value, list)]
    yield f"- Calibration: {'; '.join(told) or 'none'}."
    for point in trust.get("operating_points") or []:
        rates = ", ".join(f"{name} {number(point[name])}" for name in ("sensitivity", "specificity") if name in point)
        yield f"- Operating point {point.get('name')}: threshold {_told(point.get('threshold'))}, {rates}."
    conformal = trust.get("conformal") or {}
    told = [f"{name} {_told(value)}" for name, value in conformal.items() if not isinstance(value, list)]
    yield f"- Conformal sets: {'; '.join(told) or 'none'}."
    yield f"- {COVERAGE}"
    yield ""


def _subgroups(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    groups = metrics.get("subgroups") or []
    yield "## Subgroups"
    yield ""
    if not groups:
        yield "None were asked for (mil.numbers.subgroups): nothing is known about differences between groups."
    else:
        plain = ("column", "value", "n_patients", "n_positive")
        shown = [name for name, value in groups[0].items() if name not in plain and (value is None or _is_number(value))]
        rows = [[*(row.get(name, "") for name in plain), *(number(row.get(name)) for name in shown)] for row in groups]
        yield from _table([*plain, *shown], rows[:SHOWN_SUBGROUPS])
    yield ""


def _limits(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limitations"
    yield ""
    yield "- Not judged on any cohort but its own: judge it on yours first (`pathfm mil predict` on a table with labels)."
    yield "- Attention shows where the networks looked, not what they concluded."
    yield "- Slides far from the training bags are marked, but not every shift of scanner or stain is noticed by that."
    yield from (f"- {note}" for note in metrics.get("notes") or [])
    yield ""
    yield "## Hashes"
    yield ""
    yield "SHA-256 of every file is in bundle.json; the hash of bundle.json names this classifier in all its predictions."
    yield f"Training: {metrics.get('fingerprint', 'not recorded')}."


def _is_number(value: object) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _told(value: object) -> str:
    if _is_number(value):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items() if not isinstance(inner, list))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(_cell(cell) for cell in header) + " |"
    yield "|" + "---|" * len(header)
    yield from ("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
