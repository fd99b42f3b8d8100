"""The parts that pages about slide classifiers are made of: plain values that the template draws one below the other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from pathfm.log import decimals
from pathfm.report.figures import Chart
from pathfm.report.results import Estimate


@dataclass(frozen=True)
class Scale:
    """The axis that all interval bars of a page share, from ``low`` to ``high``."""

    low: float
    high: float = 1.0

    def percent(self, value: float | None) -> str:
        """Where a value lies along the axis; empty when there is none."""
        if value is None:
            return ""
        return f"{100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))):.2f}%"

    @property
    def ticks(self) -> tuple[float, ...]:
        """Round numbers along the axis."""
        first, last = math.ceil(self.low * 10 - 1e-9), math.floor(self.high * 10 + 1e-9)
        every = next(step for step in (1, 2, 5) if step == 5 or last - first <= 6 * step)
        return tuple(tick / 10 for tick in range(last, first - 1, -every))[::-1]


def scale_of(estimates: Iterable[Estimate | None], lowest: Iterable[float]) -> Scale:
    """An axis up to 1 on which these values and every estimate with its interval can be seen; it ends at -1."""
    found = list(lowest)
    for estimate in estimates:
        found += [] if estimate is None else [estimate.value if estimate.low is None else estimate.low]
    bottom = min(found, default=0.0)
    return Scale(max(0.0 if bottom >= 0 else -1.0, math.floor(bottom * 10 - 0.5) / 10))


@dataclass(frozen=True)
class Bar:
    """An estimate drawn along a scale, with the value of chance dashed."""

    estimate: Estimate
    scale: Scale
    chance: float | None = None
    primary: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: its text, smaller words below it, and a bar instead of text."""

    text: str = ""
    why: str = ""
    number: bool = False
    bar: Bar | None = None
    tag: str = ""


@dataclass(frozen=True)
class TableRow:
    """The first cell names the row."""

    cells: tuple[Cell, ...]
    primary: bool = False


@dataclass(frozen=True)
class Table:
    """A table; ``axis``: the scale drawn in the head of columns of bars."""

    caption: str
    header: tuple[Cell, ...]
    rows: tuple[TableRow, ...]
    axis: Scale | None = None
    form: ClassVar[str] = "table"


@dataclass(frozen=True)
class Words:
    """A paragraph: plain, muted, or in a box (box, warn, alarm)."""

    text: str
    look: Literal["", "muted", "box", "warn", "alarm"] = ""
    code: str = ""
    form: ClassVar[str] = "words"


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str
    form: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Fold:
    """Parts that are folded away until somebody asks for them."""

    title: str
    items: tuple[Item, ...]
    form: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Pair:
    """Parts side by side where there is room."""

    items: tuple[Item, ...]
    form: ClassVar[str] = "pair"


Item = Chart | Table | Words | Heading | Fold | Pair


@dataclass(frozen=True)
class Card:
    """A headline number: its name, how to read it, what it is without knowledge, and whether it is drawn (from 0 to 1)."""

    title: str
    estimate: Estimate
    detail: str
    chance: float | None
    drawn: bool


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; ``short`` is its name in the list of sections."""

    key: str
    title: str
    short: str
    items: tuple[Item, ...]


def numeral(value: float | None, digits: int = 2) -> str:
    """A number as text, a dash when there is none."""
    return "–" if value is None else decimals(value, digits)


def limits(estimate: Estimate | None, digits: int = 2) -> str:
    """The interval as text, empty when unknown."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{decimals(estimate.low, digits)} to {decimals(estimate.high, digits)}"


def number_cell(estimate: Estimate | None, digits: int = 3) -> Cell:
    """An estimate with its interval below it."""
    return Cell(numeral(estimate.value if estimate else None, digits), limits(estimate, digits), number=True)


def header(first: str, *numbers: str) -> tuple[Cell, ...]:
    """A head: the first column names the rows, the others hold numbers."""
    return (Cell(first), *(Cell(name, number=True) for name in numbers))


def row(name: str, *cells: Cell | str | int, why: str = "", primary: bool = False) -> TableRow:
    """A row; plain texts and counts become cells of numbers."""
    made = [each if isinstance(each, Cell) else Cell(str(each), number=True) for each in cells]
    return TableRow((Cell(name, why), *made), primary)


def some(*items: Item | None) -> tuple[Item, ...]:
    """Those that there are."""
    return tuple(item for item in items if item is not None)


def pair(*items: Item | None) -> Pair | Item | None:
    """Two parts side by side, the one that there is, or nothing."""
    found = some(*items)
    return Pair(found) if len(found) > 1 else (found[0] if found else None)
