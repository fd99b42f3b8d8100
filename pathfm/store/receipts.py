"""Receipts: what each job of a study made, of what, and with which content digests; ``receipts/<stage>/<group>.json``.

They are what a workflow engine sees of a study. Engines delete declared outputs before a rerun and after a failure, so what
took days to make is never declared; a receipt can be made anew from what is there. Receipts hold no time, host or path
outside the study: the same study gives the same receipts, whatever ran it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pathfm.config import fingerprint
from pathfm.errors import StoreError
from pathfm.store.cohort import SlideRow, group_of
from pathfm.store.commit import read_json, write_json

FORMAT = 1
FOLDER = "receipts"
NEEDS = {
    "check": (),
    "tile": ("check",),
    "pretrain": ("tile",),
    "extract": ("tile", "pretrain"),
    "mil": ("extract",),
    "report": ("mil",),
}
"""The stages before each stage."""
STAGES = tuple(NEEDS)
"""In the order in which they run."""
BY_GROUP = ("tile", "extract")
"""Stages with a job per group of slides; the others have one. Extraction of a group needs the tiles of that group only."""
ALL = "all"
"""The group of stages with one job."""


@dataclass(frozen=True)
class SlideReceipt:
    """What became of one slide in one stage.

    Attributes:
        slide_id: the slide.
        status: done, empty (nothing to use) or failed.
        reason: why it is empty or failed.
        fingerprint: what its artifacts depend on; empty where there are none.
        artifacts: path under the output folder -> content digest.
    """

    slide_id: str
    status: Literal["done", "empty", "failed"]
    reason: str = ""
    fingerprint: str = ""
    artifacts: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """One digest over its artifacts."""
        return fingerprint(dict(self.artifacts))


@dataclass(frozen=True)
class Receipt:
    """What one job made.

    Attributes:
        stage: of ``STAGES``.
        group: of slides, as ``3-of-8``, or ``all``.
        fingerprint: what the job depends on, known before it runs; another one means stale.
        settings: the stage's settings, dotted name -> value, to tell which one has changed.
        inputs: what else goes into the fingerprint, by name (slides, the encoder ...).
        slides: by slide_id, sorted.
        artifacts: of the whole job: path under the output folder -> content digest.
        places: folders under the output folder that later jobs look into, by what they hold.
    """

    stage: str
    group: str
    fingerprint: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    slides: tuple[SlideReceipt, ...] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[SlideReceipt, ...]:
        """Slides that are tried again the next time."""
        return tuple(slide for slide in self.slides if slide.status == "failed")

    @property
    def all_artifacts(self) -> dict[str, str]:
        """Everything the job made: path under the output folder -> content digest."""
        return {**{path: digest for slide in self.slides for path, digest in slide.artifacts.items()}, **self.artifacts}

    @property
    def content(self) -> str:
        """One digest over all artifacts."""
        return fingerprint(self.all_artifacts)


def group_count(slides: int, per_group: int) -> int:
    """How many groups so many slides make: a power of two, so that a growing cohort seldom changes it."""
    return 1 << max(0, (slides - 1) // per_group).bit_length()


def groups_of(rows: Sequence[SlideRow], per_group: int) -> dict[str, tuple[SlideRow, ...]]:
    """Group -> its rows, groups in order, without empty ones."""
    count = group_count(len(rows), per_group)
    found: dict[str, list[SlideRow]] = {f"{place + 1}-of-{count}": [] for place in range(count)}
    for row in rows:
        found[group_of(row.slide_id, count)].append(row)
    return {group: tuple(members) for group, members in found.items() if members}


def receipt_path(out: Path, stage: str, group: str) -> Path:
    """Where a receipt lies."""
    return out / FOLDER / stage / f"{group}.json"


def write_receipt(out: Path, receipt: Receipt) -> None:
    """Writes a receipt, whole or not at all."""
    content = {"format": FORMAT, **asdict(receipt), "content": receipt.content}
    write_json(receipt_path(out, receipt.stage, receipt.group), content)


def read_receipt(path: Path) -> Receipt | None:
    """A receipt; None when there is none.

    Raises:
        StoreError: it is damaged, or of another format.
    """
    if not path.is_file():
        return None
    found = read_json(path)
    content = found.pop("content", None)
    try:
        if found.pop("format") != FORMAT:
            raise StoreError("a receipt of another version of pathfm", where=str(path), fix="remove it: it is made anew")
        slides = tuple(SlideReceipt(**slide) for slide in found.pop("slides"))
        receipt = Receipt(**found, slides=slides)
    except (KeyError, TypeError):
        raise StoreError("not a receipt", where=str(path), fix="remove it: it is made anew") from None
    if receipt.content != content:
        raise StoreError("this receipt was altered", where=str(path), fix="remove it: it is made anew")
    return receipt
