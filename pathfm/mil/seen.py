"""What the encoder has seen of those who are to be judged, and what follows from it (``mil.seen_in_pretraining``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pathfm.config import bullet_list
from pathfm.errors import StoreError, UsageError
from pathfm.mil.roster import patient_ids
from pathfm.store.cohort import Cohort
from pathfm.store.commit import read_json
from pathfm.store.manifest import CARD, ORIGIN_KNOWN, Evidence, find_seen, manifest_of, name_key
from pathfm.store.tile_store import open_tiles
from pathfm.study import Study

Rule = Literal["refuse", "mark", "exclude"]
SHOWN = 20
"""Slides that a refusal names."""
HEADER = ("slide_id", "patient_id", "evidence", "pretraining_slide", "bits")
OWN = "pretrained on it in this study"
"""Evidence where the study's own encoder came without a manifest."""


@dataclass(frozen=True)
class Seen:
    """What is known of the slides of a study.

    Attributes:
        rule: what is done about patients who were seen.
        known: whether the encoder says what it was pretrained on.
        patients: of every slide of the study: slide_id -> patient.
        evidence: slide_id -> why it counts as seen; only slides that do.
        names: manifest key -> slide_id, for the slides of this study.
        origin_known: whether the weights that the encoder started or learned from say what they have seen, too.
        initial: slides seen by the weights that the study's own encoder started from (``pretrain.init``), before this study:
            the control "untrained encoder" is the network with these weights.
    """

    rule: Rule
    known: bool
    patients: Mapping[str, str]
    evidence: Mapping[str, tuple[Evidence, ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    origin_known: bool = True
    initial: frozenset[str] = frozenset()

    @property
    def seen_patients(self) -> frozenset[str]:
        """Patients of whom any slide was seen."""
        return frozenset(self.patients[slide_id] for slide_id in self.evidence)

    @property
    def initial_patients(self) -> frozenset[str]:
        """Patients of whom the control "untrained encoder" has seen any slide."""
        return frozenset(self.patients[slide_id] for slide_id in self.initial)

    def share(self, judged: Iterable[str]) -> float:
        """Share of these patients who were seen."""
        return _share(judged, self.seen_patients)

    def initial_share(self, judged: Iterable[str]) -> float:
        """Share of these patients whom the control "untrained encoder" has seen."""
        return _share(judged, self.initial_patients)

    def left_out(self) -> frozenset[str]:
        """Patients whom the rule keeps from being judged."""
        return self.seen_patients if self.rule == "exclude" else frozenset()

    def rows(self) -> list[tuple[str, ...]]:
        """One row per seen slide and kind of evidence, under ``HEADER``."""
        return [
            (slide_id, self.patients[slide_id], each.reason, self._named(each), "" if each.bits < 0 else str(each.bits))
            for slide_id, found in sorted(self.evidence.items())
            for each in found
        ]

    def spoken(self, slide_id: str) -> str:
        """The strongest evidence for a slide in words."""
        first = self.evidence[slide_id][0]
        bits = f", {first.bits} of 256 bits differ" if first.bits >= 0 else ""
        other = "" if self._named(first) == slide_id else f" as pretraining slide {self._named(first)}"
        return f"{slide_id}: {first.reason}{other}{bits}"

    def record(self, judged: Iterable[str]) -> dict[str, Any]:
        """For ``metrics.json``: about the patients whom the numbers rest on."""
        patients = set(judged)
        count = len(patients & self.seen_patients)
        return {
            "rule": self.rule,
            "known": self.known,
            "transductive": count > 0,
            "patients": len(patients),
            "patients_seen": count if self.known else None,
            "share": self.share(patients) if self.known else None,
            "left_out": len(self.seen_patients) if self.rule == "exclude" else 0,
            "slides_by_evidence": dict(sorted(Counter(found[0].reason for found in self.evidence.values()).items())),
        }

    def notes(self, judged: Iterable[str]) -> list[str]:
        """What a reader of numbers on these patients has to know."""
        patients = set(judged)
        count = len(patients & self.seen_patients)
        if not self.known:
            return ["what the encoder was pretrained on is not recorded with it: it may have seen some of these slides"]
        notes = []
        if not self.origin_known:
            notes.append("what the encoder's first weights (or its teacher) were trained on is not recorded with them")
        if count:
            share = f"{count} of {len(patients)} patients ({self.share(patients):.0%})"
            notes.append(f"transductive: the encoder was pretrained, without labels, on slides of {share}")
        if before := len(patients & self.initial_patients):
            share = f"{before} of {len(patients)} patients ({self.initial_share(patients):.0%})"
            notes.append(f"the untrained encoder has the weights of pretrain.init, which were pretrained on slides of {share}")
        if self.rule == "exclude":
            notes.append(f"the numbers rest on {len(patients)} patients of whom the encoder has seen no slide")
        return notes

    def _named(self, evidence: Evidence) -> str:
        return self.names.get(evidence.match, evidence.match)


def _share(judged: Iterable[str], seen: frozenset[str]) -> float:
    patients = set(judged)
    return len(patients & seen) / len(patients) if patients else 0.0


def rule_of(study: Study) -> Rule:
    """The setting, or what it means when nothing is set."""
    own = study.has_own_encoder
    return study.mil.seen_in_pretraining or ("mark" if own else "refuse")


def encoder_folder(study: Study, own: Path | None) -> Path | None:
    """Folder of the encoder in use: the study's own (``teacher/``), or that of ``local-dir:PATH``; None for public ones."""
    scheme, _, place = study.extract.encoder.partition(":")
    if scheme == "local-dir" and study.mil.features is None:
        return Path(place)
    return own if study.has_own_encoder else None


def look_for_seen(study: Study, cohort: Cohort, stores_dir: Path, own: Path | None = None) -> Seen:
    """Compares the slides of a study that have tile stores with the manifest of its encoder.

    Args:
        study: all settings.
        cohort: the slides.
        stores_dir: folder of ``<slide_id>.zarr``.
        own: folder of the study's own encoder (``teacher/``, with ``untrained/`` beside it), where it uses that.

    Raises:
        StoreError: the manifest is not the encoder's, or damaged.
    """
    rule, folder = rule_of(study), encoder_folder(study, own)
    lenient = study.cohort.model_copy(update={"patient_is_slide": True})
    patients, names = patient_ids(cohort, lenient), {name_key("slide", row.slide_id): row.slide_id for row in cohort.rows}
    manifest = manifest_of(folder) if folder else None
    if manifest:
        stores = [path for row in cohort.rows if _is_store(path := stores_dir / f"{row.slide_id}.zarr")]
        known_patients = {row.slide_id: row.patient_id for row in cohort.rows}
        origin_known = bool(read_json(folder / CARD).get(ORIGIN_KNOWN, True)) if folder else True
        before = manifest_of(own.parent / "untrained") if own and folder == own else None
        initial = frozenset(find_seen(before, stores, known_patients)) if before else frozenset()
        return Seen(rule, True, patients, find_seen(manifest, stores, known_patients), names, origin_known, initial)
    if study.mil.features is None and study.extract.encoder.startswith("untrained:"):
        return Seen(rule, True, patients, names=names)  # random weights have seen nobody
    if study.has_own_encoder:
        # Without its manifest the study's own encoder may have seen every slide.
        return Seen(
            rule, True, patients, {slide_id: (Evidence(OWN, name_key("slide", slide_id)),) for slide_id in patients}, names
        )
    return Seen(rule, False, patients)


def check_refusal(seen: Seen, judged: Collection[str]) -> None:
    """Refuses to judge patients who were seen, if that is the rule.

    Raises:
        UsageError: every such slide (the first ``SHOWN``) with its match and the evidence.
    """
    slides = [slide_id for slide_id in seen.evidence if seen.patients[slide_id] in judged]
    if seen.rule != "refuse" or not slides:
        return
    count = len({seen.patients[slide_id] for slide_id in slides})
    lines = bullet_list([seen.spoken(slide_id) for slide_id in slides], SHOWN)
    raise UsageError(
        f"the encoder has seen {count} of {len(judged)} patients in pretraining, so numbers on them would be too good: {lines}",
        where="mil.seen_in_pretraining",
        fix="--set mil.seen_in_pretraining=exclude judges the others; =mark has the numbers called transductive",
    )


def _is_store(path: Path) -> bool:
    try:
        open_tiles(path)
    except StoreError:
        return False
    return True
