"""What ``pathfm search`` has found: a gallery and a table."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pathfm.report.gallery import picture_uri
from pathfm.report.picture_page import Picture, PicturePage, Section, write_picture_page
from pathfm.report.tile_looks import Look
from pathfm.stats.neighbours import Hit
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import commit_file

TILE_PX = 200
"""Side of a tile on the page [px]."""
NAMED_VALUES = 8


class Found(NamedTuple):
    """A tile: how near it is, its slide, its upper left corner in level-0 pixels, and what it looks like."""

    hit: Hit
    row: SlideRow
    xy_level0: tuple[int, int]
    look: Look


def caption(item: Found) -> str:
    """Slide and place of a tile in two lines, in ASCII, for a contact sheet."""
    x, y = item.xy_level0
    return f"{item.hit.slide_id}\n{item.look.problem or f'{x},{y}'}".encode("ascii", "replace").decode()


def write_table(path: Path, found: Sequence[Found], labels: Sequence[str]) -> None:
    """Writes the tiles as CSV: rank, slide, number, corner, cosine and what the cohort table says of the slide."""
    with commit_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["rank", "slide_id", "tile", "x_level0", "y_level0", "cosine", "patient_id", "site", *labels])
        for rank, (hit, row, (x, y), _) in enumerate(found, start=1):
            known = [row.patient_id or "", row.site or "", *(row.labels.get(name, "") for name in labels)]
            table.writerow([rank, hit.slide_id, hit.tile, x, y, f"{hit.cosine:.6f}", *known])


def write_search_page(
    path: Path, asked: Found, found: Sequence[Found], facts: Sequence[tuple[str, str]], labels: Sequence[str]
) -> None:
    """Writes the gallery.

    Args:
        path: the page.
        asked: the tile that was given.
        found: the tiles like it, nearest first.
        facts: what was searched.
        labels: label columns, whose values among the found tiles are counted.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    slides = Counter(item.hit.slide_id for item in found)
    own = slides[asked.hit.slide_id]
    told = [*facts, ("found", f"{len(found)} tiles of {len(slides)} slides, {own} of them of the tile's own slide")]
    for name in labels:
        counts = Counter(item.row.labels.get(name) or "(none)" for item in found).most_common()
        rest = f", {len(counts) - NAMED_VALUES} more values" if len(counts) > NAMED_VALUES else ""
        told.append((name, ", ".join(f"{value}: {count}" for value, count in counts[:NAMED_VALUES]) + rest))
    problems = Counter(item.look.problem for item in (asked, *found) if item.look.problem)
    notes = [f"{count} tiles are grey: {problem}." for problem, count in sorted(problems.items())]
    nearest = [_picture(item, f"{rank}. cosine {item.hit.cosine:.4f}") for rank, item in enumerate(found, start=1)]
    sections = [
        Section("The tile", "", [_picture(asked, "the query")], small=True),
        Section("Nearest tiles", "Highest cosine of the features first.", nearest, small=True),
    ]
    x, y = asked.xy_level0
    write_picture_page(path, PicturePage("search", f"Tiles like {asked.hit.slide_id}:{x},{y}", told, notes, sections))


def _picture(item: Found, first: str) -> Picture:
    hit, (x, y) = item.hit, item.xy_level0
    known = ", ".join(f"{name} {value}" for name, value in item.row.labels.items() if value)
    lines = [first, hit.slide_id, f"tile {hit.tile} at {x}, {y}", known, item.look.problem]
    return Picture(
        picture_uri(item.look.pixels, TILE_PX), f"Tile {hit.tile} of {hit.slide_id}", tuple(line for line in lines if line)
    )
