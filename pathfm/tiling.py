"""What surrounds the tile stage: the check before it, the page after it, and its tiles in other tools' formats."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.errors import ExitCode, MissingExtraError, StoreError, UsageError
from pathfm.log import get_log, say, status, track
from pathfm.pretrain_settings import PretrainSettings
from pathfm.store.cohort import shard_of
from pathfm.store.layout import Layout
from pathfm.store.record import Outcome, StageReport, read_record
from pathfm.store.tile_store import open_tiles
from pathfm.study import Study
from pathfm.workers import map_isolated, usable_cores
from pathfm.workflow import Run, begin, open_study

if TYPE_CHECKING:
    from pathfm.report.tiles_page import TilesRow
    from pathfm.store.cohort import SlideRow
    from pathfm.tile.check import EncoderNeeds

log = get_log(__name__)


def check(study: Study) -> ExitCode:
    """``pathfm tile --check``: says what tiling would do, and does nothing. Exit code 3 when a slide could not be tiled."""
    from pathfm.tile.check import CheckRow, check_table, examine

    rows = shard_of(begin(study).cohort.rows, study.compute.shard)
    work = partial(examine, settings=study.tile, encoder=_encoder_needs(study))
    found = map_isolated(work, rows, study.compute.workers, study.compute.slide_timeout_s)
    checked = {
        row.slide_id: result if isinstance(result, CheckRow) else CheckRow(row.slide_id, problem=result.reason)
        for row, result in track(found, "check", len(rows))
    }
    say(check_table([checked[row.slide_id] for row in rows], study.compute.workers or usable_cores()))
    say_keep_note(study)
    return ExitCode.SOME_FAILED if any(row.problem for row in checked.values()) else ExitCode.DONE


def _encoder_needs(study: Study) -> EncoderNeeds | None:
    """The encoder that the study names, when it is a public one whose input is known."""
    from pathfm.tile.check import EncoderNeeds

    if study.extract.encoder == "pretrained":
        return None
    from pathfm.models.networks import declared_input_px

    side = study.extract.input_px or declared_input_px(study.extract.encoder)
    return EncoderNeeds(study.extract.encoder, side) if side else None


def show_tiles(layout: Layout, report: StageReport) -> None:
    """Writes the page of all slides, unless nothing has happened since it was written."""
    if report.did_nothing and not page_is_old(layout):
        return
    page = write_page(layout, read_record(layout.tiles) or report)
    if page:
        say(f"page: {page}")


def page_is_old(layout: Layout) -> bool:
    """Whether the page tells of an earlier run than the records do: a kill between the two leaves it so."""
    page, records = layout.tiles / "index.html", layout.tiles.glob("record*.json")
    return not page.is_file() or any(page.stat().st_mtime_ns < record.stat().st_mtime_ns for record in records)


def write_page(layout: Layout, report: StageReport) -> Path | None:
    """Writes the page with all slides of the stage, for people to look at, and says what it flags; None without its library."""
    from pathfm.report.tiles_page import write_tiles_page

    try:
        rows = [_row(layout, outcome) for outcome in report.outcomes]
        page = write_tiles_page(layout.tiles, layout.spec, rows)
    except MissingExtraError as error:
        log.warning("no page of the slides: %s", error)
        return None
    for row in rows:
        for note in row.notes:
            status(row.slide_id, "note", note)
    return page


def _row(layout: Layout, outcome: Outcome) -> TilesRow:
    """What the page tells of a slide."""
    from pathfm.report.tiles_page import TilesRow

    try:
        attrs = open_tiles(layout.store(outcome.slide_id)).attrs if outcome.status != "failed" else {}
    except StoreError:
        attrs = {}
    overlay, contact = (
        path.relative_to(layout.tiles).as_posix() if attrs and path.is_file() else ""
        for path in layout.pictures(outcome.slide_id)
    )
    scale = attrs.get("slide_mpp")
    return TilesRow(
        slide_id=outcome.slide_id,
        status=outcome.status,
        reason=outcome.reason,
        counts=attrs.get("counts", {}),
        mpp=attrs.get("mpp"),
        slide_mpp=(scale[0], scale[1]) if scale else None,
        mpp_source=attrs.get("mpp_source", ""),
        notes=tuple(attrs.get("notes", ())),
        reader=attrs.get("reader", ""),
        overlay=overlay,
        contact=contact,
    )


def export(source: Path, format: str, out: Path) -> ExitCode:
    """``pathfm export tiles``: stores in another program's format; one bad store does not stop the others.

    Raises:
        UsageError: an unknown format, or no tile store in the source.
    """
    from pathfm.store.export import FORMATS, export_stores

    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}", where="--format", fix=f"one of {', '.join(FORMATS)}")
    stores, missing = _stores_in(source)
    outcomes = (*missing, *track(export_stores(stores, out, format), "export", len(stores)))
    for outcome in outcomes:
        if outcome.status != "done":
            status(outcome.slide_id, outcome.status, outcome.reason)
    report = StageReport("export", outcomes)
    say(f"export: {', '.join(f'{number} {name}' for name, number in sorted(report.statuses.items()))} in {out}")
    return report.exit_code


def say_keep_note(study: Study) -> None:
    """Says which ``tile.keep_px`` the study's pretraining wants, when the tiles have less.

    Only of a study that sets something of pretraining: others may be tiled for a public encoder that nobody has named yet.
    """
    from pathfm.tile.check import keep_note

    if study.pretrain != PretrainSettings() and (note := keep_note(study)):
        say(f"note: {note}")


def _stores_in(source: Path) -> tuple[list[Path], list[Outcome]]:
    """One store, the stores of a folder, or those of a study; and the study's slides that have none which is up to date."""
    if source.suffix == ".zarr":
        return [source], []
    if source.is_dir() and (found := sorted(source.glob("*.zarr"))):
        return found, []
    run = begin(open_study(source))
    stores = {row.slide_id: run.layout.store(row.slide_id) for row in run.cohort.rows if _is_current(run, row)}
    if not stores:
        raise UsageError("no up-to-date tile stores", where=str(source), fix="run `pathfm tile` first")
    missing = [row.slide_id for row in run.cohort.rows if row.slide_id not in stores]
    return list(stores.values()), [Outcome(name, "failed", "no up-to-date store (run `pathfm tile`)") for name in missing]


def _is_current(run: Run, row: SlideRow) -> bool:
    """Whether a slide has the store that tiling would make now."""
    from pathfm.tile.stage import store_is_current

    try:
        return store_is_current(open_tiles(run.layout.store(row.slide_id)), row, run.study.tile)
    except StoreError:
        return False
