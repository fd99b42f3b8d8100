"""What surrounds the tile stage: the check before it, the page after it, and its tiles in other tools' formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pathfm.errors import ExitCode, MissingExtraError, StoreError
from pathfm.log import get_log, say, track
from pathfm.store.layout import Layout
from pathfm.store.record import Outcome, StageReport
from pathfm.store.tile_store import open_tiles
from pathfm.study import Study
from pathfm.workers import usable_cores
from pathfm.workflow import begin

if TYPE_CHECKING:
    from pathfm.report.tiles_page import TilesRow
    from pathfm.tile.check import EncoderNeeds

log = get_log(__name__)


def check(study: Study) -> ExitCode:
    """``pathfm tile --check``: says what tiling would do, and does nothing. Exit code 3 when a slide could not be tiled."""
    from pathfm.tile.check import check_table, examine
    from pathfm.tile.stage import shard_of

    rows = shard_of(begin(study).cohort.rows, study.compute.shard)
    encoder = _encoder_needs(study)
    checked = [examine(row, study.tile, encoder) for row in track(rows, "check", len(rows))]
    say(check_table(checked, study.compute.workers or usable_cores()))
    return ExitCode.SOME_FAILED if any(row.problem for row in checked) else ExitCode.DONE


def _encoder_needs(study: Study) -> EncoderNeeds | None:
    """The encoder that the study names, when it is a public one whose input is known."""
    from pathfm.tile.check import EncoderNeeds

    if study.extract.encoder == "pretrained":
        return None
    from pathfm.models.encoders import declared_input_px

    side = study.extract.input_px or declared_input_px(study.extract.encoder)
    return EncoderNeeds(study.extract.encoder, side) if side else None


def write_page(layout: Layout, report: StageReport) -> None:
    """Writes the page with all slides of the stage, for people to look at: ``tiles/<spec>/index.html``."""
    from pathfm.report.tiles_page import write_tiles_page

    try:
        write_tiles_page(layout.tiles, layout.spec, [_row(layout, outcome) for outcome in report.outcomes])
    except MissingExtraError as error:
        log.warning("no page of the slides: %s", error)


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
