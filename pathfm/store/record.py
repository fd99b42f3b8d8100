"""What happened: one outcome row per slide, and the record (versions, times, host) that lies beside an artifact."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pathfm.errors import ExitCode
from pathfm.settings import Settings
from pathfm.store.commit import read_json, write_json

Status = Literal["done", "kept", "empty", "failed"]
LIBRARIES = (
    "pathfm",
    "numpy",
    "torch",
    "timm",
    "lightning",
    "zarr",
    "h5py",
    "openslide-python",
    "openslide-bin",
    "scikit-learn",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one slide in one stage.

    Attributes:
        slide_id: the slide.
        status: done (made now), kept (was up to date), empty (nothing to use, with the reason), failed (with the reason).
        reason: why it is empty or failed, and what to do.
        counts: numbers worth a column, as kept and dropped tiles.
    """

    slide_id: str
    status: Status
    reason: str = ""
    counts: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageReport:
    """What a stage did: its outcome rows, in slide order, and on how many slides it worked (0 also when it does not say)."""

    stage: str
    outcomes: tuple[Outcome, ...] = ()
    note: str = ""
    worked: int = 0

    @property
    def statuses(self) -> Counter[str]:
        """How many slides ended in each status."""
        return Counter(outcome.status for outcome in self.outcomes)

    @property
    def exit_code(self) -> ExitCode:
        """3 when a slide failed, else 0."""
        return ExitCode.SOME_FAILED if self.statuses["failed"] else ExitCode.DONE

    @property
    def did_nothing(self) -> bool:
        """Whether everything was up to date."""
        return not self.worked and not self.statuses["done"] and not self.statuses["failed"]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a result."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def record_file(folder: Path, shard: str = "") -> Path:
    """Where the record of a folder is, or that of a shard (``i/n``) or group (``i-of-n``)."""
    kind = "-group-" if "-of-" in shard else "-" if shard else ""
    return folder / f"record{kind}{shard.replace('/', '-of-')}.json"


def write_record(
    folder: Path, report: StageReport, settings: Settings, started: datetime.datetime | None = None, shard: str = ""
) -> None:
    """Writes ``folder/record.json``: outcomes, settings, versions, host and times. Each shard has its own file."""
    now = datetime.datetime.now(datetime.UTC)
    write_json(
        record_file(folder, shard),
        {
            "stage": report.stage,
            "note": report.note,
            "settings": settings.model_dump(mode="json"),
            "versions": library_versions(),
            "host": platform.node(),
            "platform": platform.platform(),
            "started": (started or now).isoformat(timespec="seconds"),
            "ended": now.isoformat(timespec="seconds"),
            "outcomes": [asdict(outcome) for outcome in report.outcomes],
        },
    )


def read_record(folder: Path) -> StageReport | None:
    """The report kept in ``folder/record.json`` and in the records of shards (newest last), or None when there is none."""
    paths = sorted(folder.glob("record*.json"), key=lambda path: (path.stat().st_mtime, path.name))
    contents = [read_json(path) for path in paths]
    outcomes = {row["slide_id"]: Outcome(**row) for content in contents for row in content["outcomes"]}
    return StageReport(contents[-1]["stage"], tuple(outcomes.values()), contents[-1].get("note", "")) if contents else None
