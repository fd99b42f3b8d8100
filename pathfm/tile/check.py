"""What tiling would do, before anything runs: a table of all slides with mpp and its source, levels, tiles, bytes, minutes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from pathfm.errors import PathfmError, SlideError, UnreadableSlideError
from pathfm.geometry import Mpp, Size, best_level, effective_mpp, fit_within
from pathfm.slides.reader import Level, SlideReader, is_tile_folder, open_slide
from pathfm.slides.tile_folder import TileFolder
from pathfm.store.cohort import SlideRow
from pathfm.study import Study, TileSettings
from pathfm.tile.folder import check_settings
from pathfm.tile.grid import Grid
from pathfm.tile.scene import look, slide_grids, slide_scale

CHEAP_PX = 6_000_000
"""Tissue is looked for when the thumbnail is made from a level of at most so many pixels: about 0.3 s."""
BYTES_PER_PX = {"auto": 0.21, "jpeg": 0.21, "zstd": 2.1, "none": 0.0}
"""Stored bytes per pixel of H&E tissue, by codec (14 kB and 138 kB for tiles of 256 px)."""
DIRECT_MS, OTHER_MS = 1.3, 9.0
"""CPU per tile of 256 px that is read at half the resolution of its level, tile columns and codec included [ms]."""
REFERENCE_PX = 256
LOOKED_AT = 20
"""Pictures of a folder of tiles, at most, whose size is asked."""
CROP_ROOM = 1.1
"""Stored tiles are this much wider than crops that keep the size of nuclei, so that pretraining can move them about."""
HEADER = ("slide", "kind", "size px", "levels", "mpp", "from", "reads", "tile mpp", "tiles", "MB", "min")


class EncoderNeeds(NamedTuple):
    """An encoder's name and the side of its input [px], which tiles are resized to."""

    name: str
    input_px: int


@dataclass(frozen=True)
class CheckedScale:
    """One resolution of one slide.

    Attributes:
        mpp: true micrometres per pixel of the stored tiles, None when unknown.
        effective_mpp: micrometres per pixel after the encoder's resize, None without an encoder or mpp.
        level: pyramid level that is read; None for a folder of tiles.
        shrink: power of two by which it is shrunk while reading.
        grid: tiles of the whole grid.
        tissue: tiles with enough tissue, None when that was too costly to find out.
        tile_px: side of the stored pictures.
    """

    mpp: float | None
    effective_mpp: float | None
    level: int | None
    shrink: int
    grid: int
    tissue: int | None
    tile_px: int

    @property
    def tiles(self) -> int:
        """Tiles to read: those with tissue where known, else the whole grid. Filters may drop more."""
        return self.grid if self.tissue is None else self.tissue


@dataclass(frozen=True)
class CheckRow:
    """What is known of a slide before it is tiled.

    Attributes:
        slide_id: from the cohort.
        problem: why tiling would fail; empty when it would not.
        kind: vendor and reader.
        mpp: micrometres per level-0 pixel.
        mpp_source: key of the file, cohort table, or assumed.
        objective: power of the objective.
        notes: contradictions and other things worth a look.
        size: width and height [level-0 px].
        levels: pyramid levels, finest first.
        scales: one per wanted resolution.
        bytes: expected size of the store, pictures left out.
        cpu_s: expected CPU time, a rough estimate.
    """

    slide_id: str
    problem: str = ""
    kind: str = ""
    mpp: Mpp | None = None
    mpp_source: str = ""
    objective: float | None = None
    notes: tuple[str, ...] = ()
    size: Size | None = None
    levels: tuple[Level, ...] = ()
    scales: tuple[CheckedScale, ...] = ()
    bytes: int = 0
    cpu_s: float = 0.0


def examine(row: SlideRow, settings: TileSettings, encoder: EncoderNeeds | None = None) -> CheckRow:
    """Opens a slide's metadata and plans its tiles; pixels are read only for a cheap look at the tissue.

    A slide that cannot be tiled gives a row with its ``problem``, in the words that tiling would use.
    """
    known = CheckRow(row.slide_id)
    try:
        if is_tile_folder(row.path):
            return _folder(row, settings, encoder)
        with open_slide(row.path, settings.reader) as reader:
            known = _known(row, reader)
            scale = slide_scale(reader.metadata, row, settings)
            known = replace(known, mpp=scale.mpp, mpp_source=scale.source, notes=scale.notes)
            return _planned(known, row, reader, settings, encoder)
    except PathfmError as error:
        return replace(known, problem=error.reason)


def check_table(rows: Sequence[CheckRow], workers: int = 1) -> str:
    """All slides as aligned plain text, notes and problems under their slides, totals last.

    Args:
        rows: of ``examine``, in the order to print.
        workers: slides tiled at once, which the total time is divided by.
    """
    encoded = any(scale.effective_mpp is not None for row in rows for scale in row.scales)
    header = [*HEADER, *(["encoder sees"] if encoded else [])]
    cells = [(row, _cells(row, len(header))) for row in rows]
    widths = [
        max(len(line[column]) for line in [header, *(line for _, each in cells for line in each)])
        for column in range(len(header))
    ]
    lines = [_aligned(header, widths)]
    for row, each in cells:
        lines += [_aligned(line, widths) for line in each]
        lines += [f"    cannot be tiled: {row.problem}"] * bool(row.problem)
        lines += [f"    note: {note}" for note in row.notes]
    return "\n".join([*lines, "", *_totals(rows, workers)])


def keep_note(study: Study) -> str:
    """What ``tile.keep_px`` pretraining wants, when the stored tiles will have no room for its crops; else nothing."""
    crops, settings = study.pretrain.crops, study.tile
    high = study.pretrain.high_resolution
    side = max(crops.global_px, high.global_px if high.start < 1 else 0)
    wanted, stored = math.ceil(side * CROP_ROOM - 1e-9), settings.keep_px or settings.tile_px
    if study.extract.encoder != "pretrained" or crops.scale_of == "tile" or stored >= wanted or study.cohort.folder_of_tiles:
        return ""
    return (
        f"pretraining wants tile.keep_px={wanted}, room for crops of {side} px at the tiles' own scale: "
        f"with {stored} px stored, it takes smaller crops"
    )


def _known(row: SlideRow, reader: SlideReader) -> CheckRow:
    facts = reader.metadata
    return CheckRow(
        row.slide_id,
        kind=f"{facts.vendor}, {reader.name}" if facts.vendor != reader.name else facts.vendor,
        mpp=facts.mpp,
        objective=facts.objective,
        notes=facts.notes,
        size=facts.size_level0,
        levels=facts.levels,
    )


def _planned(
    known: CheckRow, row: SlideRow, reader: SlideReader, settings: TileSettings, encoder: EncoderNeeds | None
) -> CheckRow:
    grids = slide_grids(reader.metadata, known.mpp, row, settings)
    tissue = _tissue(reader, known.mpp, row, settings, grids)
    scales = tuple(_checked(grid, count, encoder) for grid, count in zip(grids, tissue, strict=True))
    notes = known.notes + ("smaller than one tile",) * any(scale.grid == 0 for scale in scales)
    return _costed(replace(known, notes=notes, scales=scales), DIRECT_MS if reader.name == "direct" else OTHER_MS, settings)


def _checked(grid: Grid, tissue: int | None, encoder: EncoderNeeds | None) -> CheckedScale:
    side = grid.cut.side
    seen = effective_mpp(grid.mpp, side, encoder.input_px) if encoder else None
    return CheckedScale(grid.mpp, seen, grid.cut.level, grid.cut.shrink, len(grid), tissue, side)


def _tissue(
    reader: SlideReader, mpp: Mpp | None, row: SlideRow, settings: TileSettings, grids: Sequence[Grid]
) -> list[int | None]:
    """Tiles of each grid with enough tissue, as tiling would find them; None where a look would take long."""
    facts, wanted = reader.metadata, settings.tissue.thumbnail_px
    level = best_level([each.downsample for each in facts.levels], fit_within(facts.size_level0, wanted)[1])
    if math.prod(facts.levels[level].size) > CHEAP_PX:
        return [None] * len(grids)
    scene = look(reader, mpp, row, settings)
    return [int((scene.tissue(grid) >= settings.tissue.min_fraction).sum()) for grid in grids]


def _folder(row: SlideRow, settings: TileSettings, encoder: EncoderNeeds | None) -> CheckRow:
    """A folder of pre-cut tiles: all of them, at the mpp that is given for them."""
    folder, mpp = TileFolder(row.path), row.mpp or settings.assume_mpp
    _refuse(folder, settings)
    count = len(folder)
    source = "cohort table" if row.mpp else "assumed" if mpp else "unknown"
    seen = effective_mpp(mpp, settings.tile_px, encoder.input_px) if encoder else None
    scale = CheckedScale(mpp, seen, None, 1, count, count, settings.tile_px)
    known = CheckRow(row.slide_id, kind="folder of tiles", mpp=Mpp(mpp, mpp) if mpp else None, mpp_source=source)
    return _costed(replace(known, scales=(scale,)), DIRECT_MS, settings)


def _refuse(folder: TileFolder, settings: TileSettings) -> None:
    """Raises what tiling would: no picture has the wanted size."""
    check_settings(settings)
    sizes: list[Size] = []
    for name in folder.names[:LOOKED_AT]:
        with suppress(UnreadableSlideError):
            sizes.append(Size(*folder.read(name).shape[1::-1]))
        if sizes[-1:] == [Size(settings.tile_px, settings.tile_px)]:
            return
    if sizes:
        width, height = sizes[0]
        raise SlideError(f"tiles are {width} x {height} px, not {settings.tile_px}", fix=f"set tile.tile_px={width}")


def _costed(row: CheckRow, ms: float, settings: TileSettings) -> CheckRow:
    pixels = sum(scale.tiles * scale.tile_px**2 for scale in row.scales)
    size = math.ceil(pixels * BYTES_PER_PX[settings.codec])
    return replace(row, bytes=size, cpu_s=pixels / REFERENCE_PX**2 * ms / 1e3)


def _cells(row: CheckRow, columns: int) -> list[list[str]]:
    """The lines of a slide: one per resolution, and what belongs to the slide in the first."""
    size = f"{row.size.width} x {row.size.height}" if row.size else ""
    levels = "/".join(f"{level.downsample:.4g}" for level in row.levels)
    mpp = _mpp(row.mpp) if row.mpp_source else ""
    slide = [row.slide_id, row.kind, size, levels, mpp, row.mpp_source]
    lines = [_scale_cells(row, scale) for scale in row.scales] or [[]]
    blank = [""] * len(slide)
    filled = [(blank if number else slide) + line for number, line in enumerate(lines)]
    return [(line + [""] * columns)[:columns] for line in filled]


def _scale_cells(row: CheckRow, scale: CheckedScale) -> list[str]:
    share = scale.tiles * scale.tile_px**2 / (sum(each.tiles * each.tile_px**2 for each in row.scales) or 1)
    reads = "" if scale.level is None else f"level {scale.level}" + (f", 1/{scale.shrink}" if scale.shrink > 1 else "")
    return [
        reads,
        _number(scale.mpp),
        f"{'<= ' if scale.tissue is None else ''}{scale.tiles}",
        f"{row.bytes * share / 1e6:.1f}",
        _minutes(row.cpu_s * share),
        _number(scale.effective_mpp),
    ]


def _mpp(mpp: Mpp | None) -> str:
    if mpp is None:
        return "unknown"
    return f"{mpp.x:.4g}" if f"{mpp.x:.4g}" == f"{mpp.y:.4g}" else f"{mpp.x:.4g} x {mpp.y:.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _minutes(seconds: float) -> str:
    return "< 0.1" if 0 < seconds < 3 else f"{seconds / 60:.1f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _totals(rows: Sequence[CheckRow], workers: int) -> Iterator[str]:
    failing = sum(bool(row.problem) for row in rows)
    tiles = sum(scale.tiles for row in rows for scale in row.scales)
    bounded = any(scale.tissue is None for row in rows for scale in row.scales)
    size, minutes = sum(row.bytes for row in rows) / 1e6, _minutes(sum(row.cpu_s for row in rows) / max(1, workers))
    yield (
        f"{len(rows)} slides, {failing} cannot be tiled: {'at most ' if bounded else ''}{tiles} tiles, about {size:.0f} MB "
        f"and {minutes} min with {workers} worker{'s' * (workers != 1)}"
    )
    if bounded:
        yield "<=: tiles of the whole grid, of which only those with tissue are kept; to find it would take long here"
    yield "MB and min are rough: they depend on stain, scanner, drive and processor"
