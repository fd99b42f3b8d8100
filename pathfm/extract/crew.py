"""Several devices of one machine at once: a process for each; leases divide the slides among them, as among machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from pathfm.errors import PathfmError
from pathfm.log import get_log, status
from pathfm.store.record import Outcome, StageReport
from pathfm.study import Study
from pathfm.workers import map_isolated, usable_cores

RANK = {"done": 0, "kept": 1, "empty": 2, "failed": 3}
"""Which of several outcomes of one slide holds: who made it knows better than who found it made, or failed to."""

Result = TypeVar("Result")

log = get_log(__name__)


def on_devices(work: Callable[[Study], Result], study: Study, devices: Sequence[str]) -> list[Result]:
    """What each device's process returns; a process that dies leaves its slides to the others.

    Args:
        work: called with the study, changed to use one device and its share of the threads; can be pickled.
        study: all settings.
        devices: their names.

    Raises:
        PathfmError: no process came to its end; the first reason.
    """
    threads = max(1, (study.compute.threads or usable_cores()) // len(devices))
    results: list[Result] = []
    errors: list[PathfmError] = []
    for (number, device), result in map_isolated(
        partial(_on_device, work, study, threads), list(enumerate(devices)), len(devices)
    ):
        if isinstance(result, PathfmError):
            status(f"{device} ({number})", "failed", result.reason)
            log.error("%s: %s", device, getattr(result, "traceback", result))
            errors.append(result)
        else:
            results.append(result)
    if not results:
        raise errors[0]
    return results


def _on_device(work: Callable[[Study], Result], study: Study, threads: int, numbered: tuple[int, str]) -> Result:
    compute = study.compute.model_copy(update={"device": numbered[1], "devices": 1, "threads": threads})
    return work(study.model_copy(update={"compute": compute}))


def joined(reports: Sequence[StageReport]) -> StageReport:
    """One report of all devices: of each slide the outcome of the process that made it."""
    outcomes: dict[str, Outcome] = {}
    for report in reports:
        for outcome in report.outcomes:
            known = outcomes.get(outcome.slide_id)
            if known is None or RANK[outcome.status] < RANK[known.status]:
                outcomes[outcome.slide_id] = outcome
    notes = "; ".join(report.note for report in reports if report.note)
    return StageReport(reports[0].stage, tuple(outcomes.values()), notes, max(report.worked for report in reports))
