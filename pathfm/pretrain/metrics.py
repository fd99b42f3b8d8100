"""The training curve on disk: ``metrics.csv`` (content, the same after a resume), ``timing.csv`` (how fast, no content) and,
where TensorBoard is installed, event files with the same numbers."""

from __future__ import annotations

import csv
import io
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pathfm.store.commit import commit_file

METRICS, TIMING, EVENTS = "metrics.csv", "timing.csv", "tensorboard"
FLUSH_EVERY = 10
"""Steps between reads of the device: a read waits for it, so values gather there first. TensorBoard gets as few of them."""
TIMES = ("step", "seconds", "images_per_second", "data_wait_seconds", "peak_memory_gb")
"""Columns of ``timing.csv``: each row is about the steps since the row before."""

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, float]
"""One step's numbers by name, ``step`` among them."""


class MetricsLog:
    """One row per step; steps after the checkpoint that a run resumes from are cut off and written again.

    Args:
        folder: where the files lie; None: nothing is written, as by all processes but the first.
        measured: names of the numbers that come from the device, in the order of ``add``'s tensor.
        scheduled: names of the numbers that are known beforehand.
        images_per_step: for the speed.
        start: first step to come; rows from it on are dropped.
    """

    def __init__(
        self, folder: Path | None, measured: Sequence[str], scheduled: Sequence[str], *, images_per_step: int, start: int = 0
    ) -> None:
        self._names, self._images = ("step", *measured, *scheduled), images_per_step
        self._streams: list[io.TextIOWrapper] = []
        self._events = None
        if folder is not None:
            self._streams = [reopen(folder / METRICS, self._names, start), reopen(folder / TIMING, TIMES, start)]
            self._events = _event_writer(folder / EVENTS, start)
        self._rows: list[tuple[int, Tensor, tuple[float, ...]]] = []
        self._since, self._waited_s = time.monotonic(), 0.0

    def add(self, step: int, measured: Tensor, scheduled: Sequence[float], waited_s: float = 0.0) -> list[Row]:
        """Takes one step's numbers and how long it waited for data; every ``FLUSH_EVERY`` steps returns what ``flush`` does."""
        self._rows.append((step, measured.detach(), tuple(scheduled)))
        self._waited_s += waited_s
        return self.flush() if len(self._rows) >= FLUSH_EVERY else []

    def flush(self) -> list[Row]:
        """Writes what has gathered and returns it, one row per step, oldest first. Numbers need not be finite."""
        if not self._rows:
            return []
        device = self._rows[0][1].device
        values = torch.stack([measured for _, measured, _ in self._rows]).tolist()
        rows = [
            dict(zip(self._names, (step, *measured, *scheduled), strict=True))
            for (step, _, scheduled), measured in zip(self._rows, values, strict=True)
        ]
        seconds = time.monotonic() - self._since
        if self._streams:
            metrics, timing = self._streams
            metrics.write("".join(line([int(row["step"]), *_cells(row)]) for row in rows))
            speed = self._images * len(rows) / max(seconds, 1e-9)
            figures = (f"{seconds:.3f}", f"{speed:.1f}", f"{self._waited_s:.3f}", f"{_peak_memory_gb(device):.3f}")
            timing.write(line([int(rows[-1]["step"]), *figures]))
            for stream in self._streams:
                stream.flush()
        for row in rows:
            if (row["step"] + 1) % FLUSH_EVERY == 0:
                self.show(int(row["step"]), row)
        self._rows, self._since, self._waited_s = [], time.monotonic(), 0.0
        return rows

    def show(self, step: int, numbers: Mapping[str, float], picture: npt.NDArray[np.uint8] | None = None) -> None:
        """Puts numbers and a picture [H, W, 3] into TensorBoard, if it is installed."""
        if self._events is None:
            return
        for name, value in numbers.items():
            if name != "step" and math.isfinite(value):
                self._events.add_scalar(name, value, step)
        if picture is not None:
            self._events.add_image("maps", picture, step, dataformats="HWC")

    def sync(self) -> list[Row]:
        """Flushes down to the disk: rows must not be younger than the checkpoint that counts on them."""
        rows = self.flush()
        for stream in self._streams:
            os.fsync(stream.fileno())
        if self._events is not None:
            self._events.flush()
        return rows

    def close(self) -> None:
        """Closes the files; what has not been flushed is dropped."""
        for stream in self._streams:
            stream.close()
        if self._events is not None:
            self._events.close()


def reopen(path: Path, header: Sequence[str], start: int) -> io.TextIOWrapper:
    """A table by step, open for appending: its header, and its whole rows of steps before ``start``."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if start and path.is_file() else []
    kept = [text for text in lines if text.endswith("\n") and int(text.partition(",")[0]) < start]
    with commit_file(path) as temporary:
        temporary.write_text(line(header) + "".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def line(cells: Sequence[object]) -> str:
    """Cells as one line of CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _cells(row: Row) -> list[str]:
    return [f"{value:.8g}" for name, value in row.items() if name != "step"]


def _event_writer(folder: Path, start: int) -> SummaryWriter | None:
    """TensorBoard's writer, None where it is not installed. Readers drop what an earlier run wrote from ``start`` on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that TensorBoard imports
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    if not start and folder.is_dir():
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
    return SummaryWriter(str(folder), purge_step=start or None)


def _peak_memory_gb(device: torch.device) -> float:
    """Most memory that was in use: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
