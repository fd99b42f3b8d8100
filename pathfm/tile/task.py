"""What a worker needs to tile one slide, and what it tells afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pathfm.errors import UnreadableSlideError
from pathfm.store.cohort import SlideRow
from pathfm.store.lease import Lease
from pathfm.study import TileSettings

ASSUMED, UNKNOWN = "assumed", "unknown"
"""Sources of an mpp that the slide does not have: what is assumed of it decides whether its store is current."""


@dataclass(frozen=True)
class TileTask:
    """One slide to tile.

    Attributes:
        row: the slide's row of the cohort table.
        settings: the stage's settings.
        store: where the store goes.
        identity: hash of the slide file.
        fingerprints: what the store depends on: when the slide's own mpp is used, and when the assumed one is, or none.
        pictures: where the overlay and the contact sheet go; None: nowhere.
        threads: threads that decode inside the slide.
        lease: the right to make it, among several machines.
        local: a local copy to read instead of the slide's own path.
    """

    row: SlideRow
    settings: TileSettings
    store: Path
    identity: str
    fingerprints: tuple[str, str]
    pictures: tuple[Path, Path] | None = None
    threads: int = 1
    lease: Lease | None = None
    local: Path | None = None

    @property
    def path(self) -> Path:
        """The file to read."""
        return self.local or self.row.path

    def fingerprint(self, mpp_source: str) -> str:
        """The fingerprint that holds for this source of the mpp."""
        return self.fingerprints[mpp_source in {ASSUMED, UNKNOWN}]


class Made(NamedTuple):
    """What came of a slide: counts by reason, and why nothing was kept (else empty)."""

    counts: dict[str, int]
    empty_reason: str


def check_unreadable(unreadable: int, wanted: int, settings: TileSettings) -> None:
    """Refuses a slide of which too much cannot be decoded.

    Raises:
        UnreadableSlideError: more than ``settings.max_unreadable`` of the wanted tiles.
    """
    if unreadable > settings.max_unreadable * wanted:
        raise UnreadableSlideError(
            f"{unreadable} of {wanted} tiles cannot be decoded", fix="get a new copy of the slide or rescan it"
        )
