"""Slides of different patients that are one and the same: what would put the answer of a test into training.

Looked for in what is known of a slide: its file, its picture, its features, single tiles, and names of patients that differ
only in how they are written (columns of the cohort table: ``groupings``). Everything is joined by hashes; only pictures that
are nearly alike in their perceptual hash are compared. Ten thousand slides of a thousand tiles take seconds.

Legend: S slides, N tiles, R rows, W words of a perceptual hash.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pathfm.config import bullet_list
from pathfm.errors import UsageError
from pathfm.stats.folds import Fold, linked
from pathfm.stats.phash import WORDS, near_hashes, picture_hash, turned_hashes
from pathfm.store.interop.label_tables import without_padding

Hashes = NDArray[np.uint64]
Pixels = NDArray[np.uint8]

KINDS = ("same file", "same picture", "same features", "same tiles", "same patient name", "few same tiles")
"""Strongest first; slides that a stronger kind has found together are not named again. ``few same tiles`` is a note."""
LEAST_ROWS, LEAST_SHARE = 3, 0.1
"""Slides are of one piece when they share so many distinct tiles, and this share of those of the smaller one."""
COMMON = 8
"""Tiles that are equal in more slides than this are blank, or otherwise say nothing."""
BLOCK_ROWS = 1 << 21
"""Rows that are joined at a time."""
MOST_NOTES = 50
PICTURE_PX, LEAST_LIKENESS, SHIFT_PX = 32, 0.8, 1
"""Pictures with like hashes are compared at this side: a small piece of tissue on glass gives a hash that is nearly that of any
other piece at its place. Copies (saved again, smaller, 1 % cut off, brighter) correlate by 0.82 or more in their details,
other pieces, of different outline, by 0.71 or less."""


@dataclass(frozen=True)
class SlideTrace:
    """What a slide can be recognised by; whatever is unknown is left out.

    Attributes:
        slide_id: the slide.
        patient_id: whose it is.
        file_digest: identity of the slide file (``identity`` of its tile store).
        thumbnail: RGB picture of the slide; None for a folder of tiles, whose mosaic depends on their order.
        feature_digest: hash of all features in their order.
        row_hashes: hash of the features of each tile [N].
    """

    slide_id: str
    patient_id: str
    file_digest: str | None = None
    thumbnail: Pixels | None = None
    feature_digest: str = ""
    row_hashes: Hashes = field(default_factory=lambda: np.empty(0, dtype=np.uint64))


@dataclass(frozen=True)
class Leak:
    """Slides that are the same in some way. Only those of different patients can leak; others are worth a note.

    Attributes:
        kind: one of ``KINDS``, or ``same <column>``.
        slides: sorted.
        patients: theirs, sorted.
        detail: how far they agree.
    """

    kind: str
    slides: tuple[str, ...]
    patients: tuple[str, ...]
    detail: str = ""

    @property
    def crosses(self) -> bool:
        """Whether it concerns different patients."""
        return len(self.patients) > 1 and self.kind != "few same tiles"

    def spoken(self) -> str:
        """One line of text."""
        detail = f" ({self.detail})" if self.detail else ""
        patients = f"patient{'s' if len(self.patients) > 1 else ''} {_shown(self.patients)}"
        return f"{self.kind}: {_shown(self.slides)} of {patients}{detail}"

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        slides, patients = list(self.slides), list(self.patients)
        return {"kind": self.kind, "slides": slides, "patients": patients, "detail": self.detail, "crosses": self.crosses}


def find_leaks(slides: Iterable[SlideTrace]) -> list[Leak]:
    """All slides that are the same in some way, strongest evidence first; the order of the slides plays no role.

    Thumbnails are looked at one by one and may come from a generator.
    """
    seen = sorted((_Seen.of(slide) for slide in slides), key=lambda slide: slide.slide_id)
    found = [*_same_file(seen), *_same_picture(seen), *_same_features(seen), *_same_tiles(seen), *_same_name(seen)]
    together: dict[str, list[frozenset[str]]] = {}
    kept = []
    for leak in sorted(found, key=lambda leak: (KINDS.index(leak.kind), leak.slides)):
        group = frozenset(leak.slides)
        if not any(group <= stronger for stronger in together.get(leak.slides[0], ())):
            kept.append(leak)
            for slide_id in leak.slides:
                together.setdefault(slide_id, []).append(group)
    return kept


def together(leaks: Iterable[Leak]) -> list[frozenset[str]]:
    """Patients that have to stay on one side, joined over all leaks (``mil.split.leaks: merge``)."""
    return linked(leak.patients for leak in leaks if leak.crosses)


def check_leaks(leaks: Sequence[Leak], folds: Sequence[Fold], rule: Literal["refuse", "merge"]) -> list[str]:
    """Refuse folds that have the same thing on two sides.

    Returns:
        Notes about all other leaks: within a patient, or of patients who are on one side.

    Raises:
        UsageError: the list of who, and by what evidence.
    """
    sides = [{name: side for side, part in enumerate((f.train, f.validation, f.test)) for name in part} for f in folds]
    torn = [leak for leak in leaks if leak.crosses and any(_is_torn(leak, side_of) for side_of in sides)]
    if torn:
        fix = "give one patient one patient_id, and two people two; or keep them on one side with mil.split.leaks=merge"
        if rule == "merge":
            fix = "put them on one side of the split, or cut the cohort anew with mil.split.scheme=folds"
        listed = bullet_list([leak.spoken() for leak in torn], 20)
        what = f"different patients on two sides of a split share what only one can have: {listed}"
        raise UsageError(what, where="mil.split", fix=fix)
    notes = [f"{'kept on one side' if leak.crosses else 'noted'}: {leak.spoken()}" for leak in leaks]
    return notes[:MOST_NOTES] + (
        [f"... and {len(notes) - MOST_NOTES} more slides that are the same"] if notes[MOST_NOTES:] else []
    )


def _is_torn(leak: Leak, side_of: Mapping[str, int]) -> bool:
    return len({side_of[patient] for patient in leak.patients if patient in side_of}) > 1


@dataclass(frozen=True)
class _Seen:
    """A slide without its picture: what is kept while others are looked at."""

    slide_id: str
    patient_id: str
    file: str
    features: str
    row_R: Hashes
    hash_W: NDArray[np.uint64] | None
    small: Pixels | None

    @classmethod
    def of(cls, slide: SlideTrace) -> _Seen:
        hash_W = picture_hash(slide.thumbnail) if slide.thumbnail is not None else None
        small = None
        if hash_W is not None and slide.thumbnail is not None:
            grey = cv2.cvtColor(slide.thumbnail, cv2.COLOR_RGB2GRAY)
            small = np.asarray(cv2.resize(grey, (PICTURE_PX, PICTURE_PX), interpolation=cv2.INTER_AREA))
        rows, file = np.unique(slide.row_hashes), slide.file_digest or ""
        return cls(slide.slide_id, slide.patient_id, file, slide.feature_digest, rows, hash_W, small)


def _leak(kind: str, slides: Iterable[_Seen], detail: str = "") -> Leak:
    found = list(slides)
    patients = tuple(sorted({slide.patient_id for slide in found}))
    return Leak(kind, tuple(sorted(slide.slide_id for slide in found)), patients, detail)


def _same_file(seen: Sequence[_Seen]) -> Iterator[Leak]:
    for group in _equal((slide.file, slide) for slide in seen):
        yield _leak("same file", group)


def _same_features(seen: Sequence[_Seen]) -> Iterator[Leak]:
    for group in _equal((slide.features, slide) for slide in seen):
        # A bag of one or two distinct tiles that many slides have is blank.
        if len(group) <= COMMON or len(group[0].row_R) >= LEAST_ROWS:
            yield _leak("same features", group)


def _same_name(seen: Sequence[_Seen]) -> Iterator[Leak]:
    patients = {slide.patient_id: slide for slide in reversed(seen)}
    for group in _equal((_plain(name), slide) for name, slide in sorted(patients.items())):
        yield _leak("same patient name", group, "but for case, spaces, accents, or zeros that spreadsheets drop")


def _equal(pairs: Iterable[tuple[str, _Seen]]) -> list[list[_Seen]]:
    groups: dict[str, list[_Seen]] = {}
    for key, slide in pairs:
        groups.setdefault(key, []).append(slide)
    return [group for key, group in sorted(groups.items()) if key and len(group) > 1]


def _plain(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return without_padding("".join(mark for mark in decomposed if not unicodedata.combining(mark) and not mark.isspace()))


def _same_picture(seen: Sequence[_Seen]) -> Iterator[Leak]:
    """Groups with equal hashes first, then pairs of nearly equal ones, in all eight ways to turn a slide."""
    by_hash: dict[bytes, list[list[_Seen]]] = {}
    for slide in seen:
        if slide.hash_W is not None:
            groups = by_hash.setdefault(slide.hash_W.tobytes(), [])
            alike = next((group for group in groups if _likeness(group[0], slide) >= LEAST_LIKENESS), None)
            groups.append([slide]) if alike is None else alike.append(slide)
    copies = [group for groups in by_hash.values() for group in groups]
    yield from (_leak("same picture", group, "0 of 256 bits differ") for group in copies if len(group) > 1)
    shown = [group[0] for group in copies]
    if not shown:
        return
    hash_SW = np.stack([slide.hash_W for slide in shown if slide.hash_W is not None])
    pairs: dict[tuple[int, int], int] = {}
    for near in near_hashes(hash_SW, turned_hashes(hash_SW).reshape(-1, WORDS)):
        first, second = near.query, near.stored % len(shown)
        if first < second:
            pairs[first, second] = min(near.bits, pairs.get((first, second), near.bits))
    for (first, second), bits in sorted(pairs.items()):
        if _likeness(shown[first], shown[second]) >= LEAST_LIKENESS:
            yield _leak("same picture", (shown[first], shown[second]), f"{bits} of 256 bits differ")


def _likeness(one: _Seen, other: _Seen) -> float:
    """Highest correlation of the details of two small pictures, turned in all ways and shifted a little."""
    assert one.small is not None and other.small is not None
    inner = _details(one.small)[SHIFT_PX:-SHIFT_PX, SHIFT_PX:-SHIFT_PX]
    stored = _details(other.small)
    ways = [np.rot90(picture, turns) for picture in (stored, stored[:, ::-1]) for turns in range(4)]
    return max(float(cv2.matchTemplate(np.ascontiguousarray(way), inner, cv2.TM_CCOEFF_NORMED).max()) for way in ways)


def _details(small: Pixels) -> NDArray[np.float32]:
    plain = small.astype(np.float32)
    return np.asarray(plain - cv2.GaussianBlur(plain, (0, 0), 1.0))


def _same_tiles(seen: Sequence[_Seen]) -> Iterator[Leak]:
    for (first, second), shared in sorted(_shared_rows([slide.row_R for slide in seen]).items()):
        least = min(len(seen[first].row_R), len(seen[second].row_R))
        if shared >= LEAST_ROWS:
            kind = "same tiles" if shared >= LEAST_SHARE * least else "few same tiles"
            yield _leak(kind, (seen[first], seen[second]), f"{shared} of {least} distinct tiles")


def _shared_rows(row_SR: Sequence[Hashes]) -> Counter[tuple[int, int]]:
    """Pairs of slides, by place, and how many rows both have; rows of more than ``COMMON`` slides do not count.

    Args:
        row_SR: sorted distinct hashes of each slide. They are joined one range of values after the other, so that memory does
            not grow with the cohort.
    """
    shared: Counter[tuple[int, int]] = Counter()
    parts = 1 + sum(map(len, row_SR)) // BLOCK_ROWS
    edges = [part * 2**64 // parts for part in range(1, parts)]
    cut_SP = [[0, *np.searchsorted(rows, np.array(edges, dtype=np.uint64)).tolist(), len(rows)] for rows in row_SR]
    for part in range(parts):
        blocks = [rows[cuts[part] : cuts[part + 1]] for rows, cuts in zip(row_SR, cut_SP, strict=True)]
        slide_R = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
        row_R = np.concatenate(blocks) if blocks else np.empty(0, dtype=np.uint64)
        order_R = np.argsort(row_R, kind="stable")  # slides of equal rows stay in their order
        shared.update(_pairs(row_R[order_R], slide_R[order_R], len(blocks)))
    return shared


def _pairs(row_R: Hashes, slide_R: NDArray[np.int64], slides: int) -> dict[tuple[int, int], int]:
    """Pairs of slides with equal rows in sorted rows, each slide having a row once."""
    starts = np.flatnonzero(np.r_[True, row_R[1:] != row_R[:-1]]) if len(row_R) else np.empty(0, dtype=np.int64)
    lengths = np.diff(np.r_[starts, len(row_R)])
    counts: Counter[tuple[int, int]] = Counter()
    for length in range(2, COMMON + 1):
        run_RL = starts[lengths == length][:, None] + np.arange(length)
        member_RL = slide_R[run_RL]
        for first in range(length - 1):
            key = member_RL[:, first, None] * slides + member_RL[:, first + 1 :]
            found, times = np.unique(key, return_counts=True)
            counts.update({divmod(int(pair), slides): int(count) for pair, count in zip(found, times, strict=True)})
    return counts


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
