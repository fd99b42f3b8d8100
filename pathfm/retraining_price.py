"""What ``--retrain-encoder`` costs, said before it is paid: an encoder, all features that it made, every classifier on them."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import Any

from pathfm.errors import StoreError, UsageError
from pathfm.mil.held_out import held_out_slides
from pathfm.pretraining import encoder_folder
from pathfm.store.commit import read_json
from pathfm.store.pinned import read_pinned
from pathfm.store.tile_store import open_tiles
from pathfm.workflow import Run

GB = 1e9


def retrain_price(run: Run) -> tuple[str, ...]:
    """Lines that say what retraining the encoder changes, what has to be made again, and how long that took before.

    Raises:
        UsageError: the study has no encoder of its own.
    """
    if not run.study.has_own_encoder:
        fix = "leave --retrain-encoder out, or set extract.encoder: pretrained"
        raise UsageError(f"the study uses the encoder {run.study.extract.encoder}", where="extract.encoder", fix=fix)
    (tiles, untiled), features, steps = _tiles(run), _features(run), run.study.pretrain.steps
    more = f", and {untiled} slides that have no tiles yet" if untiled else ""
    places = ", ".join(folder.relative_to(run.layout.out).as_posix() for folder in features)
    stale = f"{_bytes(features) / GB:.3g} GB of features become stale, and are not deleted: {places}"
    return (
        _said_of_list(run),
        f"the encoder is pretrained anew: {steps} steps{_took(_pretraining_s(run))}",
        f"all features are made again: {len(tiles)} slides, {sum(tiles.values())} tiles{more}"
        + _took(_extraction_s(features, sum(tiles.values()))),
        stale if features else "there are no features yet that could become stale",
        f"every classifier and its bundle are trained again{_took(_seconds(_records(run.layout.mil)))}",
    )


def _said_of_list(run: Run) -> str:
    pinned, out = read_pinned(run.layout.out), held_out_slides(run.study, run.cohort)
    wanted = {row.slide_id for row in run.cohort.rows} - out
    if pinned is None or not pinned.slides:
        return f"{len(wanted)} slides: there is no frozen list yet"
    listed = set(pinned.slides)
    return f"{len(wanted)} slides instead of {len(listed)}: {len(wanted - listed)} new, {len(listed - wanted)} removed"


def _tiles(run: Run) -> tuple[dict[str, int], int]:
    """Tiles of every slide of the cohort that has any, and how many slides have no store. Slides are not opened for this."""
    tiles: dict[str, int] = {}
    untiled = 0
    for row in run.cohort.rows:
        try:
            tiles[row.slide_id] = len(open_tiles(run.layout.store(row.slide_id)))
        except StoreError:
            untiled += 1
    return {slide_id: count for slide_id, count in tiles.items() if count}, untiled


def _features(run: Run) -> list[Path]:
    """Folders of the features that the encoder in use has made: the newest of each kind."""
    newest: dict[str, Path] = {}
    folders = [path for path in (run.layout.out / "features" / run.layout.spec).glob("pretrained*") if path.is_dir()]
    for folder in sorted(folders, key=lambda path: (path.stat().st_mtime_ns, path.name)):
        newest[folder.name.rpartition("-")[0]] = folder
    return list(newest.values())


def _bytes(folders: list[Path]) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def _pretraining_s(run: Run) -> float:
    """Seconds that the steps of the encoder in use have taken; 0: not known."""
    from pathfm.pretrain.metrics import TIMING

    try:
        rows = list(csv.DictReader((encoder_folder(run) / TIMING).read_text(encoding="utf-8").splitlines()))
        return sum(float(row["seconds"]) for row in rows)
    except (OSError, StoreError, KeyError, TypeError, ValueError):  # no encoder yet, or a table that was cut off
        return 0.0


def _extraction_s(folders: list[Path], tiles: int) -> float:
    """Seconds for so many tiles at the pace of the last runs that made any; 0: not known."""
    for folder in folders:
        records = _records(folder)
        rows = [row for record in records for row in record["outcomes"] if row["status"] == "done"]
        if done := sum(int(row["counts"].get("tiles", 0)) for row in rows):
            return _seconds(records) * tiles / done
    return 0.0


def _records(folder: Path) -> list[dict[str, Any]]:
    """What the last runs have left: one record, or one of each job."""
    return [read_json(path) for path in sorted(folder.glob("record*.json"))]


def _seconds(records: list[dict[str, Any]]) -> float:
    """Seconds of work that records tell of."""
    spans = [[datetime.datetime.fromisoformat(record[name]) for name in ("started", "ended")] for record in records]
    return sum((ended - started).total_seconds() for started, ended in spans)


def _took(seconds: float) -> str:
    """About how long that is going to take, as earlier runs did; nothing where there were none."""
    if not seconds:
        return ""
    shown = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f" (about {shown}, by earlier runs)"
