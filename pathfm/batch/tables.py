"""What a night batch shows of all its results together: the table and the page of drift, made anew after each round."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pathfm.batch.drift import Measured, measured, write_page
from pathfm.batch.results import PREDICTIONS, RESULT, Outbox, read_result, stamp_of_file

if TYPE_CHECKING:
    from pathfm.mil.drift import DriftReference

Stamp = tuple[int, ...]


class Shown(NamedTuple):
    """What is kept of a result: no more than the table and the page need, for there are many.

    Attributes:
        stamp: changes when one of its files is touched.
        columns: of its row; one object for all rows that have the same.
        cells: of its row.
        drift: for the page; None where the page does not show it.
    """

    stamp: Stamp
    columns: tuple[str, ...]
    cells: tuple[str, ...]
    drift: Measured | None

    @property
    def row(self) -> dict[str, str]:
        """Cells by column."""
        return dict(zip(self.columns, self.cells, strict=True))


@dataclass
class Tables:
    """Reads a result once, and again when its files were touched: a round must not cost more with every night before it.

    Attributes:
        box: where the results lie.
        drift: of the bundle; None where there is nothing to compare with.
        bundle: its digest.
    """

    box: Outbox
    drift: DriftReference | None
    bundle: str
    _known: dict[str, Shown] = field(default_factory=dict)
    _columns: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    def write(self, done: Collection[str]) -> tuple[str, ...]:
        """Writes both.

        Args:
            done: names of the results that should be there.

        Returns:
            names of those that cannot be read, or are gone.
        """
        names, place = self.box.names, f"{self.box.results}{os.sep}"
        self._known = {name: shown for name in names if (shown := self._shown(place, name))}
        self.box.write_index(self._known)
        write_page(self.box, self.drift, [shown.drift for shown in self._known.values() if shown.drift])
        # A folder that was moved away cannot be read either.
        return tuple(sorted({*names, *done} - self._known.keys()))

    def _shown(self, place: str, name: str) -> Shown | None:
        said, row = stamp_of_file(f"{place}{name}{os.sep}{RESULT}"), stamp_of_file(f"{place}{name}{os.sep}{PREDICTIONS}")
        if not (said and row):
            return None
        stamp = said + row
        known = self._known.get(name)
        if known and known.stamp == stamp:
            return known
        found = read_result(self.box.results / name / RESULT)
        if found is None:
            return None
        columns = tuple(found.row)
        has_page = self.drift is not None and found.said["bundle"] == self.bundle
        drift = measured(found.said) if has_page else None
        return Shown(stamp, self._columns.setdefault(columns, columns), tuple(found.row.values()), drift)
