"""Measuring CPU and memory, rivals in turn, and tables of what came out."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import wait4, waitstatus_to_exitcode
from pathlib import Path
from typing import NamedTuple, TypeVar

from pathfm.store.record import library_versions
from pathfm.workers import usable_cores

RESULTS = Path(__file__).parent / "results"
SAMPLE_S = 0.02
"""Time between looks at the memory of a run [s]."""

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Options:
    """What a person asked for: folder of slides, folder of real slides, passes, and whether a fraction will do."""

    work: Path
    data: Path | None = None
    passes: int = 2
    quick: bool = False


@dataclass(frozen=True)
class Table:
    """Figures of one benchmark: a title, named columns, rows, and what a reader must know."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str | float, ...]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [self.columns, *(tuple(_shown(value) for value in row) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [
            row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in cells
        ]
        return "\n".join([self.title, *lines, *self.notes])


class Spent(NamedTuple):
    """What a piece of work took: CPU and wall seconds, and tiles done."""

    cpu_s: float
    wall_s: float
    tiles: int


class Run(NamedTuple):
    """A finished process and all it started: CPU and wall seconds; peak memory of the largest process, and of all of them [MB].

    The memory of all of them counts a shared page once (PSS).
    """

    cpu_s: float
    wall_s: float
    largest_mb: float
    together_mb: float


def spent(work: Callable[[Piece], int], piece: Piece) -> Spent:
    """CPU (of all threads) and wall time of one piece of work, which returns how many tiles it did."""
    wall, cpu = time.perf_counter(), time.process_time()
    tiles = work(piece)
    return Spent(time.process_time() - cpu, time.perf_counter() - wall, tiles)


def in_turn(rivals: Mapping[str, Callable[[Piece], int]], pieces: Sequence[Piece], passes: int) -> dict[str, list[Spent]]:
    """Every rival on every piece, one right after the other, every second time in reverse; sample i is of the same piece."""
    samples: dict[str, list[Spent]] = {name: [] for name in rivals}
    for rival in rivals.values():
        rival(pieces[0])
    for turn, piece in enumerate(piece for _ in range(passes) for piece in pieces):
        for name in list(rivals)[:: -1 if turn % 2 else 1]:
            samples[name].append(spent(rivals[name], piece))
    return samples


def cpu_ms(samples: Sequence[Spent]) -> float:
    """Median CPU milliseconds per tile."""
    return statistics.median(sample.cpu_s / sample.tiles for sample in samples) * 1000


def cpu_ratio(samples: Sequence[Spent], reference: Sequence[Spent]) -> float:
    """Median of the CPU of each piece over that of the reference on the same piece."""
    return statistics.median(a.cpu_s / b.cpu_s for a, b in zip(samples, reference, strict=True))


def wall_ratio(samples: Sequence[Spent], reference: Sequence[Spent]) -> float:
    """As ``cpu_ratio``, for wall time."""
    return statistics.median(a.wall_s / b.wall_s for a, b in zip(samples, reference, strict=True))


def run_pathfm(*arguments: str) -> Run:
    """Runs ``pathfm`` with arguments and measures it and its workers.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    return run_module("pathfm", *arguments)


def run_module(name: str, *arguments: str) -> Run:
    """As ``run_pathfm``, for any module that can be run."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", name, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        watch = _MemoryWatch(process.pid)
        assert process.stdout
        said = process.stdout.read()
        _, status, usage = wait4(process.pid, 0)
        process.returncode = waitstatus_to_exitcode(status)
    watch.stop()
    if status:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed:\n{said}")
    return Run(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, watch.largest_mb, watch.together_mb)


class _MemoryWatch(threading.Thread):
    """Looks at a process and its descendants until told to stop.

    A child's ru_maxrss will not do: it starts from the memory of the process that started it.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._done = pid, threading.Event()
        self.largest_mb = self.together_mb = 0.0
        self.start()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            family = _family(self._pid)
            self.largest_mb = max([self.largest_mb, *(memory_mb(pid, "status", "VmHWM") for pid in family)])
            self.together_mb = max(self.together_mb, sum(memory_mb(pid, "smaps_rollup", "Pss") for pid in family))

    def stop(self) -> None:
        self._done.set()
        self.join()


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    family = [pid]
    for member in family:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            family += [int(child) for child in _text(children).split()]
    return family


def memory_mb(pid: int | str, file: str, key: str) -> float:
    """A line of ``/proc/PID/FILE`` [MB]; 0 where there is none."""
    found = re.search(rf"^{key}:\s*(\d+) kB", _text(Path(f"/proc/{pid}/{file}")), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def cpu_name() -> str:
    """What the processor calls itself."""
    found = re.search(r"^model name\s*: (.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine() -> str:
    """What else a reader of speeds must know: cores, how busy they were with other things, and how waiting threads behave."""
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    return f"{cpu_name()}, {usable_cores()} cores, load average {load} (1, 5, 15 min), OMP_WAIT_POLICY {waiting}"


def save(name: str, tables: Sequence[Table]) -> Path:
    """Writes figures with the versions and the processor they belong to."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{re.sub(r'[^a-z0-9]+', '-', cpu_name().lower()).strip('-')}.json"
    facts = {"cpu": cpu_name(), "versions": library_versions()}
    shown = [
        {"title": table.title, "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows], "notes": table.notes}
        for table in tables
    ]
    path.write_text(json.dumps({"benchmark": name, **facts, "tables": shown}, indent=1, ensure_ascii=False) + "\n")
    return path


def _shown(value: str | float) -> str:
    return (
        value
        if isinstance(value, str)
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.3g}"
        if abs(value) < 100
        else f"{value:,.0f}"
    )
