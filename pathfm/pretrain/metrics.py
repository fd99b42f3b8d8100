"""The training curve on disk: ``metrics.csv`` (content, the same after a resume) and ``timing.csv`` (how fast, no content)."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pathfm.errors import TrainingError
from pathfm.store.commit import commit_file

METRICS, TIMING = "metrics.csv", "timing.csv"
FLUSH_EVERY = 10
"""Steps between reads of the device: a read waits for it, so values gather there first."""


class MetricsLog:
    """One row per step; steps after the checkpoint that a run resumes from are cut off and written again.

    Args:
        folder: where the two files lie.
        measured: names of the numbers that come from the device; all must be finite.
        scheduled: names of the numbers that are known beforehand.
        images_per_step: for the speed.
        start: first step to come; rows from it on are dropped.
    """

    def __init__(
        self, folder: Path, measured: Sequence[str], scheduled: Sequence[str], *, images_per_step: int, start: int = 0
    ) -> None:
        self._measured, self._images = tuple(measured), images_per_step
        self._metrics = _reopen(folder / METRICS, ("step", *measured, *scheduled), start)
        self._timing = _reopen(folder / TIMING, ("step", "seconds", "images_per_second"), start)
        self._rows: list[tuple[int, Tensor, tuple[float, ...]]] = []
        self._since = time.monotonic()

    def add(self, step: int, measured: Tensor, scheduled: Sequence[float]) -> None:
        """Takes one step's numbers; every ``FLUSH_EVERY`` steps they are checked and written.

        Raises:
            TrainingError: one of them is not finite; the message names it and its step.
        """
        self._rows.append((step, measured, tuple(scheduled)))
        if len(self._rows) >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Checks and writes what has gathered.

        Raises:
            TrainingError: as in ``add``.
        """
        if not self._rows:
            return
        values = torch.stack([measured for _, measured, _ in self._rows]).tolist()
        for (step, _, scheduled), measured in zip(self._rows, values, strict=True):
            self._check(step, measured)
            self._metrics.write(_line([step, *(f"{value:.8g}" for value in (*measured, *scheduled))]))
        seconds, steps = time.monotonic() - self._since, len(self._rows)
        speed = self._images * steps / max(seconds, 1e-9)
        self._timing.write(_line([self._rows[-1][0], f"{seconds:.3f}", f"{speed:.1f}"]))
        for stream in (self._metrics, self._timing):
            stream.flush()
        self._rows, self._since = [], time.monotonic()

    def _check(self, step: int, measured: Sequence[float]) -> None:
        for name, value in zip(self._measured, measured, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {step}",
                    where="pretrain",
                    fix="lower pretrain.lr or pretrain.koleo_weight, warm up longer, or use precision fp32",
                )

    def sync(self) -> None:
        """Flushes down to the disk: rows must not be younger than the checkpoint that counts on them."""
        self.flush()
        for stream in (self._metrics, self._timing):
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Closes the files; what has not been flushed is dropped."""
        self._metrics.close()
        self._timing.close()


def _line(cells: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _reopen(path: Path, header: Sequence[str], start: int) -> io.TextIOWrapper:
    """The file, with a header and the whole rows of steps before ``start``, open for appending."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if start and path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) < start]
    with commit_file(path) as temporary:
        temporary.write_text(_line(header) + "".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")
