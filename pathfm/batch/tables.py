"""What a night batch shows of all its results together: the table and the page of drift, made anew after each round."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.batch.drift import write_page
from pathfm.batch.results import PREDICTIONS, Outbox, Read, read_result

if TYPE_CHECKING:
    from pathfm.mil.drift import DriftReference

Stamp = tuple[tuple[int, int, int], ...]


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
    _known: dict[Path, tuple[Stamp, Read]] = field(default_factory=dict)

    def write(self, done: Collection[str]) -> tuple[str, ...]:
        """Writes both.

        Args:
            done: names of the results that should be there.

        Returns:
            names of those that cannot be read, or are gone.
        """
        found, damaged = self.box.read_results(self._read)
        self._known = {path: known for path, known in self._known.items() if path.parent.name in found}
        self.box.write_index(found)
        write_page(self.box, self.drift, self.bundle, found)
        # A folder that was moved away cannot be read either.
        return tuple(sorted({*damaged, *(name for name in done if name not in found)}))

    def _read(self, file: Path) -> Read | None:
        try:
            stats = [path.stat() for path in (file, file.with_name(PREDICTIONS))]
        except OSError:
            return None
        stamp = tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats)
        before, known = self._known.get(file, ((), None))
        if known and before == stamp:
            return known
        if found := read_result(file):
            self._known[file] = stamp, found
        return found
