"""The index of a folder of tile stores: one sortable page with every slide, its pictures and what became of its tiles."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from pathfm import __version__
from pathfm.errors import MissingExtraError
from pathfm.log import plural
from pathfm.report.fates import without_folders
from pathfm.store.commit import commit_file
from pathfm.store.record import Status

COLUMNS = ("kept", "grid", "no tissue", "dropped", "unreadable")
"""Columns with numbers of tiles. ``dropped`` is the sum of all counts that are none of the others: one per filter."""
STATUSES = ("failed", "empty", "flagged", "done")
"""What rows can be filtered by, in the order of the buttons."""

PORTION = 300
"""Rows shown at first; a button shows more."""


@dataclass(frozen=True)
class TilesRow:
    """One slide of the folder.

    Attributes:
        slide_id: the slide.
        status: as in the stage's outcome; stores made now and before are both shown as done.
        reason: why it is empty or failed.
        counts: tiles by fate: ``grid`` (or ``files``), ``kept``, ``no tissue``, ``unreadable``, and filters that dropped any;
            ``kept at ...`` counts tiles of further resolutions.
        mpp: micrometres per pixel of the tiles, None when unknown.
        slide_mpp: micrometres per pixel of the slide along x and y, None when unknown.
        mpp_source: where the slide's mpp comes from.
        notes: what a person should look at, as conflicting sources of mpp; a slide with notes counts as flagged.
        reader: how the slide was read.
        overlay: path of the overlay picture, relative to the folder, with ``/``; empty: none.
        contact: the same of the contact sheet.
    """

    slide_id: str
    status: Status
    reason: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    mpp: float | None = None
    slide_mpp: tuple[float, float] | None = None
    mpp_source: str = ""
    notes: tuple[str, ...] = ()
    reader: str = ""
    overlay: str = ""
    contact: str = ""


class _Card(NamedTuple):
    """A headline number."""

    label: str
    value: str
    detail: str
    kind: str = ""


@dataclass(frozen=True)
class _Line:
    """What the template shows of a row."""

    row: TilesRow

    @property
    def status(self) -> str:
        return "done" if self.row.status == "kept" else self.row.status

    @property
    def classes(self) -> str:
        return f"{self.status} flagged" if self.row.notes else self.status

    @property
    def order(self) -> tuple[int, str, float]:
        """What needs a look comes first, then by name."""
        rank = STATUSES.index("flagged" if self.classes == "done flagged" else self.status)
        return rank, self.row.slide_id, self.row.mpp or 0.0

    @property
    def reason(self) -> str:
        return without_folders(self.row.reason)

    @property
    def dropped(self) -> dict[str, int]:
        """Tiles that a filter dropped, by reason."""
        known = (*COLUMNS, "files", *self.also_kept)
        return {name: count for name, count in sorted(self.row.counts.items()) if count and name not in known}

    @property
    def also_kept(self) -> dict[str, int]:
        """Tiles kept at further resolutions."""
        return {name: count for name, count in self.row.counts.items() if name.startswith("kept at ")}

    @property
    def details(self) -> dict[str, str]:
        """What stands below the number of a column."""
        return {"kept": _listed(self.also_kept), "dropped": _listed(self.dropped)}

    @property
    def numbers(self) -> dict[str, int]:
        """Values of ``COLUMNS``; none when nothing was counted."""
        counts = self.row.counts
        if not counts:
            return {}
        known = {name: counts.get(name, 0) for name in COLUMNS}
        return {**known, "grid": counts.get("grid", counts.get("files", 0)), "dropped": sum(self.dropped.values())}

    @property
    def slide_mpp(self) -> str:
        x, y = (_mpp(value) for value in self.row.slide_mpp or (None, None))
        return x if x == y else f"{x} x {y}"


def write_tiles_page(folder: Path, title: str, rows: Sequence[TilesRow]) -> Path:
    """Writes ``folder/index.html``, whole or not at all; the same rows give the same bytes.

    Args:
        folder: the folder of tile stores; pictures are linked relative to it.
        title: heading of the page.
        rows: all slides, in any order.

    Returns:
        The path of the page.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    page = folder / "index.html"
    html = render_tiles_page(title, rows)
    with commit_file(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page


def render_tiles_page(title: str, rows: Sequence[TilesRow]) -> str:
    """The page as HTML. Every text is escaped, every path is quoted as a relative address.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError("the index of the tiles needs jinja2", extra="report") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update({"thousands": _thousands, "mpp": _mpp, "url": quote})
    parts = importlib.resources.files("pathfm.report")
    script = parts.joinpath("tiles.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    lines = sorted((_Line(row) for row in rows), key=lambda line: line.order)
    context = {
        "title": title,
        "lines": lines,
        "columns": COLUMNS,
        "portion": PORTION,
        "cards": _cards(lines),
        "filters": _filters(lines),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "version": __version__,
    }
    template = parts.joinpath("tiles.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(context) + "\n"


def _cards(lines: Sequence[_Line]) -> list[_Card]:
    """Totals of the folder. A slide tiled at several resolutions has several rows and is one slide."""
    slides = {status: len({line.row.slide_id for line in lines if status in line.classes.split()}) for status in STATUSES}
    tiles: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for line in lines:
        tiles.update(line.numbers)
        dropped.update(line.dropped)
    share = f"{tiles['kept'] / tiles['grid']:.0%} of " if tiles["grid"] else "of "
    return [
        _Card("Slides", _thousands(len({line.row.slide_id for line in lines})), f"{slides['done']:,} with tiles"),
        _Card("Kept tiles", _thousands(tiles["kept"]), f"{share}{plural(tiles['grid'], 'place')} on the grid"),
        _Card("Dropped by filters", _thousands(tiles["dropped"]), _listed(dropped) or "no filter dropped any"),
        _Card(
            "Unreadable tiles",
            _thousands(tiles["unreadable"]),
            "left out, never filled in",
            _kind(tiles["unreadable"], "alarm"),
        ),
        _Card("Failed slides", _thousands(slides["failed"]), "see the reasons below", _kind(slides["failed"], "alarm")),
        _Card("Empty slides", _thousands(slides["empty"]), "nothing was kept", _kind(slides["empty"], "warn")),
        _Card("Flagged slides", _thousands(slides["flagged"]), "their notes want a look", _kind(slides["flagged"], "warn")),
    ]


def _kind(count: int, kind: str) -> str:
    return kind if count else ""


def _filters(lines: Sequence[_Line]) -> list[tuple[str, str]]:
    """Names of the filter buttons (empty: all) and how many rows each shows; without those that would show none."""
    counts = Counter(name for line in lines for name in line.classes.split())
    return [("", _thousands(len(lines))), *((name, _thousands(counts[name])) for name in STATUSES if counts[name])]


def _thousands(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"


def _mpp(value: float | None) -> str:
    return f"{value:.4g}" if value else "–"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
