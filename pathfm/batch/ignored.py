"""Files in the inbox of a night batch that are no slides by their suffix: of each that may be one, people are told once."""

from __future__ import annotations

from collections.abc import Mapping

from pathfm.batch.health import Health
from pathfm.log import plural, status

REMEMBERED = 1000
"""Names that the health file keeps, for people and for the next run."""


class Ignored:
    """What was found in this run, and told of by this one and the one before.

    Args:
        health: of the run before; it is kept up to date.

    Attributes:
        count: files at the last look.
        told: names that this run has told of.
    """

    def __init__(self, health: Health) -> None:
        self.count, self.told = 0, list[str]()
        self._health, self._known = health, set(health.ignored)
        self._nameless = max(0, health.strange - len(health.ignored))

    def note(self, names: Mapping[str, bool]) -> None:
        """Notes what a look has found, and tells what is new of it.

        Args:
            names: of files, and whether each is one that often lies beside slides.
        """
        strange = [name for name, is_usual in names.items() if not is_usual]
        new = sorted({*strange} - self._known)
        if self._nameless:  # which of them the run before has told of cannot be known, but how many
            new = [plural(more, "more file")] if (more := len(new) - self._nameless) > 0 else []
            self._nameless = 0
        for name in new:
            status(name, "ignored", "of no kind that can be read: convert it, or take it out of the inbox")
        self.told += new
        self._known, self.count = {*names}, len(names)
        self._health.ignored = tuple(sorted(names, key=names.__getitem__))[:REMEMBERED]
        self._health.strange = len(strange)
