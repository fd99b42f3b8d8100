"""The list of slides that a study's own encoder is pretrained on: ``encoder/pinned.json``, frozen at the first pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pathfm.errors import StoreError
from pathfm.store.commit import read_json, write_json

FORMAT = 1
FOLDER, FILE = "encoder", "pinned.json"
LEARNED = ("*/teacher/card.json", "*/checkpoints/step-*")
"""What lies in the folder of encoders once anything has been learned from the slides of a list."""


@dataclass(frozen=True)
class PinnedSlide:
    """A slide of the list.

    Attributes:
        store: fingerprint of its tile store.
        facts: columns of the cohort table by which it was sampled.
    """

    store: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pinned:
    """The list.

    Attributes:
        tiling: digest of the tile settings that the fingerprints were made with.
        slides: by slide_id; none: the list is open, and the next pretraining makes it of the slides that there are.
        held_out: patients who were kept back to be judged, sorted; they stay so.
        without_tiles: slides that there were when the list was frozen, and that had no tiles then, sorted.
        binding: whether it holds although nothing was learned here yet, since it was taken over from another folder.
    """

    tiling: str
    slides: Mapping[str, PinnedSlide] = field(default_factory=dict)
    held_out: tuple[str, ...] = ()
    without_tiles: tuple[str, ...] = ()
    binding: bool = False


def pinned_file(out: Path) -> Path:
    """Where the list of a study lies."""
    return out / FOLDER / FILE


def read_pinned(out: Path) -> Pinned | None:
    """The list of a study; None when there is none, or when nothing was learned from it yet, so that nothing would be lost.

    Raises:
        StoreError: it is damaged, or of a newer version.
    """
    path = pinned_file(out)
    if not path.is_file():
        return None
    found = read_json(path)
    if not found.get("binding") and not any(next((out / FOLDER).glob(pattern), None) for pattern in LEARNED):
        return None
    fix = "delete it: the encoder is then pretrained on all slides of the cohort"
    if found.get("format") != FORMAT:
        raise StoreError("a list of pretraining slides of another version of pathfm", where=str(path), fix=fix)
    try:
        slides = {str(slide_id): PinnedSlide(**row) for slide_id, row in found["slides"].items()}
        held_out, without = (tuple(map(str, found[name])) for name in ("held_out", "without_tiles"))
        return Pinned(str(found["tiling"]), slides, held_out, without, found.get("binding") is True)
    except (AttributeError, KeyError, TypeError):
        raise StoreError("not a list of pretraining slides", where=str(path), fix=fix) from None


def write_pinned(out: Path, pinned: Pinned) -> None:
    """Writes the list, whole or not at all."""
    write_json(pinned_file(out), {"format": FORMAT, **asdict(pinned)})
