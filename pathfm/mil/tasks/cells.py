"""Cells of label columns, read into numbers; and names that are safe in the header of a CSV file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from pathfm.config import did_you_mean
from pathfm.errors import UsageError
from pathfm.mil.tasks.contract import Floats, Rows

NOT_CLASSES = frozenset({"na", "n/a", "nan", "null"})
"""How other programs write a missing value; as the name of a class each would be learned."""
UNSAFE = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029,;\"']+")
SHOWN = 3


def texts(rows: Rows, column: str) -> list[str]:
    """The cells of a column; empty where it is missing."""
    return [row.get(column, "").strip() for row in rows]


def check_columns(rows: Rows, columns: Sequence[str], where: str) -> None:
    """Refuse columns that are absent or empty.

    Raises:
        UsageError: naming the column and what exists.
    """
    known = sorted({name for row in rows for name in row})
    for column in columns:
        if column not in known:
            hint = did_you_mean(column, known)
            raise UsageError(
                f"there is no label column {column!r}{hint}", where=where, fix=f"label columns: {', '.join(known) or 'none'}"
            )
        if not any(texts(rows, column)):
            raise UsageError(f"the label column {column!r} is empty", where=where, fix="fill it, or name another one")


def class_names(rows: Rows, column: str, where: str) -> tuple[str, ...]:
    """The classes in a column, sorted: of all rows, so that no fold has others.

    Raises:
        UsageError: fewer than two, a name that stands for a missing value, or two that cannot be told apart.
    """
    names = tuple(sorted(set(texts(rows, column)) - {""}))
    missing = [name for name in names if name.casefold() in NOT_CLASSES]
    if missing:
        raise UsageError(
            f"{missing[0]!r} is no class", where=f"{where}, column {column!r}", fix="leave the cell empty where it is unknown"
        )
    if len(names) < 2:
        present = names[0] if names else "none"
        raise UsageError(f"a classifier needs two classes, but there is {present}", where=f"{where}, column {column!r}")
    check_names(names, f"{where}, column {column!r}")
    return names


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse names that would share a column of predictions, or that differ in case only (most likely one class, typed twice).

    Raises:
        UsageError: naming both.
    """
    taken: dict[str, str] = {}
    for name in names:
        other = taken.setdefault(safe_name(name).casefold(), name)
        if other != name:
            raise UsageError(f"{other!r} and {name!r} are too alike to be two names", where=where, fix="rename one of them")


def class_numbers(rows: Rows, column: str, classes: Sequence[str], where: str) -> Floats:
    """Class numbers [B], NaN where the cell is empty.

    Raises:
        UsageError: a class that is none of these.
    """
    number = {name: float(index) for index, name in enumerate(classes)} | {"": math.nan}
    cells = texts(rows, column)
    for cell in cells:
        if cell not in number:
            raise UsageError(
                f"there is no class {cell!r}{did_you_mean(cell, classes)}",
                where=f"{where}, column {column!r}",
                fix=f"classes: {', '.join(classes)}",
            )
    return np.array([number[cell] for cell in cells])


def numbers(rows: Rows, column: str, where: str) -> Floats:
    """Finite numbers [B], NaN where the cell is empty.

    Raises:
        UsageError: other values, the first few by name.
    """
    return _read(rows, column, where, math.isfinite, "a number")


def times(rows: Rows, column: str, where: str) -> Floats:
    """Times [B], finite and not negative; NaN where the cell is empty.

    Raises:
        UsageError: other values, the first few by name.
    """
    return _read(rows, column, where, lambda value: math.isfinite(value) and value >= 0, "a time of 0 or more")


def flags(rows: Rows, column: str, where: str) -> Floats:
    """0 and 1 [B], NaN where the cell is empty.

    Raises:
        UsageError: other values, the first few by name.
    """
    return _read(rows, column, where, lambda value: value in (0.0, 1.0), "0 or 1")


def safe_name(text: str) -> str:
    """The text with what a CSV header could trip over (separators, quotes, line breaks) as ``_``."""
    return UNSAFE.sub("_", text)


def _read(rows: Rows, column: str, where: str, fits: Callable[[float], bool], what: str) -> Floats:
    cells = texts(rows, column)
    values = [_number(cell) for cell in cells]
    wrong = sorted({cell for cell, value in zip(cells, values, strict=True) if cell and (value is None or not fits(value))})
    if wrong:
        shown = ", ".join(map(repr, wrong[:SHOWN])) + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
        raise UsageError(
            f"not {what}: {shown}", where=f"{where}, column {column!r}", fix="leave the cell empty where it is unknown"
        )
    return np.array([math.nan if value is None else value for value in values])


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
