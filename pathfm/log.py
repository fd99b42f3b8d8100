"""What a run says: results on standard output; progress, status lines and the log on standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

PLAIN_EVERY_S = 10.0
"""Seconds between progress lines where there is no terminal."""

SMALL, NOISE = 0.01, 1e-12
"""Smaller numbers lose their digits behind the point; still smaller ones are what rounding left of 0."""

_live: list[Progress] = []
_quiet: list[bool] = []


def get_log(name: str = "") -> logging.Logger:
    """The logger ``pathfm`` or ``pathfm.<name>``; a full module name is taken as it is."""
    if name == "pathfm" or name.startswith("pathfm."):
        return logging.getLogger(name)
    return logging.getLogger(f"pathfm.{name}" if name else "pathfm")


def show_log(verbose: bool = False) -> None:
    """Send the log to standard error: warnings and worse, or everything from INFO on. Calling it again changes the level."""
    log = get_log()
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if verbose else logging.WARNING)


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, results, status lines and progress only go to the log: the caller says them in fewer words. Warnings stay."""
    _quiet.append(True)
    try:
        yield
    finally:
        _quiet.pop()


def say(text: str) -> None:
    """One result for the user, on standard output."""
    if _quiet:
        get_log().info("%s", text)
    else:
        print(text, flush=True)


def plural(count: int, noun: str, many: str = "") -> str:
    """``1 slide``, ``2 slides``."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def decimals(value: float, digits: int) -> str:
    """A number with so many digits behind the point, ``0.042``; a smaller one with three that tell something, ``3.2e-07``."""
    is_small = NOISE < abs(value) < SMALL
    return f"{value:.{max(digits, 3)}g}" if is_small else f"{value:.{digits}f}"


def status(slide_id: str, outcome: str, detail: str = "") -> None:
    """One line per slide on standard error: its id, how it ended, and in a few words why or how much."""
    line = f"{outcome:<7} {slide_id}{'  ' + detail if detail else ''}"
    if _quiet:
        get_log().info("%s", line)
    else:
        _to_stderr(line)


def track(iterable: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Pass the items through and show how far they are and how long the rest will take.

    A bar on a terminal; elsewhere a plain line about every ten seconds, so that a log file stays readable.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if _quiet:
        return iter(iterable)
    if sys.stderr.isatty() and not _live:
        return _track_bar(iterable, label, total)
    return _track_plain(iterable, label, total)


def progress_line(label: str, done: int, total: int | None, elapsed_s: float) -> str:
    """``tile: 12/40 (30 %), 0:01:10 left``, or without a known total ``tile: 12 in 0:00:30``."""
    if total is None or not done:
        return f"{label}: {done}{'' if total is None else f'/{total}'} in {clock(elapsed_s)}"
    left_s = elapsed_s / done * max(0, total - done)
    return f"{label}: {done}/{total} ({100 * done // max(total, 1)} %), {clock(left_s)} left"


def clock(seconds: float) -> str:
    """A duration as hours:minutes:seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


class _StderrHandler(logging.Handler):
    """Writes to today's ``sys.stderr``, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        _to_stderr(self.format(record))


def _to_stderr(line: str) -> None:
    if _live:
        _live[-1].console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        print(line, file=sys.stderr, flush=True)


def _track_plain(iterable: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    start = said = time.monotonic()
    spoke = False
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - said >= PLAIN_EVERY_S:
            _to_stderr(progress_line(label, done, total, now - start))
            said, spoke = now, True
    if spoke:
        _to_stderr(f"{label}: {done} in {clock(time.monotonic() - start)}")


def _track_bar(iterable: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        _live.append(bar)
        try:
            yield from bar.track(iterable, total=total, description=label)
        finally:
            _live.remove(bar)
