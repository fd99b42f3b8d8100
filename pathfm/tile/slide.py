"""One slide -> one tile store, with an overlay and a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pathfm import jpeg
from pathfm.errors import UnreadableSlideError
from pathfm.faults import crash_point
from pathfm.geometry import Size, fit_within
from pathfm.slides.reader import SlideMetadata, SlideReader, is_tile_folder, open_slide
from pathfm.slides.tile_reading import coincides, read_tiles
from pathfm.store.commit import commit_dir, commit_file
from pathfm.store.tile_store import TileCodec, TileStore, TileStoreInfo, TileStoreWriter, open_tiles, scale_group
from pathfm.study import TileSettings
from pathfm.tile.colour import StainVectors, estimate_stains
from pathfm.tile.finish import KEPT, NO_TISSUE, UNREADABLE, Finisher, counted, why_empty
from pathfm.tile.folder import tile_folder
from pathfm.tile.grid import Grid
from pathfm.tile.pictures import contact_sheet, overlay, png_bytes, sample_evenly
from pathfm.tile.quality import perceptual_hash
from pathfm.tile.scene import Colours, Scale, Scene, look, slide_colours, slide_grids, slide_scale
from pathfm.tile.task import Made, TileTask, check_unreadable
from pathfm.tile.tissue import Mask

Pixels = npt.NDArray[np.uint8]

CONTACT_TILES, SHEET_QUALITY = 16, 85
INKY = "most tiles have the colour of pen ink; if that is the stain, set tile.filters.max_pen=1"


class _Slide(NamedTuple):
    """An open slide and everything that was decided before its tiles are read."""

    reader: SlideReader
    task: TileTask
    scale: Scale
    scene: Scene
    colours: Colours
    stains: StainVectors | None
    notes: tuple[str, ...]

    @property
    def facts(self) -> SlideMetadata:
        return self.reader.metadata


class _Scale(NamedTuple):
    """One resolution, written: the fate of every tile of its grid, counts of them, and why nothing was kept."""

    grid: Grid
    fates: npt.NDArray[np.str_]
    counts: dict[str, int]
    empty_reason: str


def tile_slide(task: TileTask, check: Callable[[], None] | None = None) -> Made:
    """Writes the tile store of one slide, whole or not at all, and its pictures.

    Args:
        task: the slide, the settings, and where everything goes.
        check: called right before the store appears; what it raises keeps it from appearing.

    Raises:
        SlideError: the slide cannot be used, with the reason.
    """
    if is_tile_folder(task.path):
        return tile_folder(task, check)
    with open_slide(task.path, task.settings.reader) as reader:
        slide = _prepared(reader, task)
        asked = _asked(task.settings)
        grids = slide_grids(slide.facts, slide.scale.mpp, task.row, task.settings)
        with commit_dir(task.store, check) as folder:
            further: dict[str, int] = {}
            for grid, each in zip(grids[1:], asked[1:], strict=True):
                scale = _write_scale(slide, grid, folder / scale_group(each), None)
                further[f"{KEPT} at {each:g} mpp"] = scale.counts[KEPT]
            first = _write_scale(slide, grids[0], folder, further)
            _draw(slide, first, folder)
            crash_point("tile.before_commit")
        return Made(first.counts, first.empty_reason)


def _asked(settings: TileSettings) -> tuple[Any, ...]:
    return settings.mpp if isinstance(settings.mpp, tuple) else (settings.mpp,)


def _prepared(reader: SlideReader, task: TileTask) -> _Slide:
    """Scale, tissue and colours, decided on the thumbnail."""
    settings = task.settings
    scale = slide_scale(reader.metadata, task.row, settings)
    scene = look(reader, scale.mpp, task.row, settings)
    colours = slide_colours(reader, scene, settings.colour)
    notes = scale.notes + scene.notes
    if colours.normalised != settings.colour.normalise:
        notes += ("too little tissue, or one stain alone: colours are not normalised",)
    return _Slide(reader, task, scale, scene, colours, estimate_stains(colours.thumbnail, scene.mask), notes)


def _write_scale(slide: _Slide, grid: Grid, folder: Path, further: Mapping[str, int] | None) -> _Scale:
    """Reads, filters and stores the tiles of one resolution, in a store's folder or a group inside it.

    Args:
        slide: the slide.
        grid: where its tiles lie.
        folder: the store's, or that of a group in it.
        further: tiles kept at the store's other resolutions, told with those of the first; None for these others.
    """
    reader, task, settings = slide.reader, slide.task, slide.task.settings
    share = slide.scene.tissue(grid)
    fates = np.where(share >= settings.tissue.min_fraction, KEPT, NO_TISSUE).astype("<U16")
    chosen = [int(index) for index in np.flatnonzero(fates == KEPT)]
    codec = TileCodec("jpeg" if settings.codec == "auto" else settings.codec, settings.jpeg_quality)
    finish = Finisher(settings, codec, share, slide.colours.recolour)
    passing = settings.codec == "auto" and not slide.colours.recolour and len(grid) > 0 and coincides(reader, grid.cut)
    pixels = settings.filters.measure or (settings.codec != "none" and not passing)
    folder.mkdir(exist_ok=True)
    writer = TileStoreWriter(folder, codec, grid.cut.side, settings.shard_tiles)
    for index, result in read_tiles(reader, grid.cut, chosen, finish, threads=task.threads, pixels=pixels, stored=passing):
        if isinstance(result, UnreadableSlideError):
            fates[index] = UNREADABLE
            continue
        fates[index] = result.fate
        if result.fate == KEPT:
            x, y = (int(value) for value in grid.corners_level0[index])
            writer.append_encoded(result.data, (x, y), result.quality)
        crash_point("tile.tile")
    counts = {**counted(fates.tolist()), **(further or {})}
    check_unreadable(counts.get(UNREADABLE, 0), len(chosen), settings)
    why = why_empty(counts, _nothing_fits(slide.facts.size_level0, grid, settings))
    scale = _Scale(grid, fates, counts, "; ".join([why, *slide.scene.notes]) if why else "")
    info = TileStoreInfo(
        slide_id=task.row.slide_id,
        fingerprint=task.fingerprint(slide.scale.source),
        tile_px=grid.cut.side,
        mpp=grid.mpp,
        tile_side_level0=grid.side_level0[0],
        size_level0=slide.facts.size_level0,
        quality_names=finish.quality_names,
        thumbnail_downsample=_small(slide)[1],
        extra={
            "counts": counts,
            "empty_reason": scale.empty_reason,
            "tile_height_level0": grid.side_level0[1],
            "read_level": grid.cut.level,
            "read_shrink": grid.cut.shrink,
            "passed_through": passing,
            "reader": reader.name,
        },
    )
    if further is None:
        writer.finish(replace(info, extra={**(info.extra or {}), "scale_of": task.row.slide_id}), None)
        return scale
    info, picture, tissue = _with_slide(info, slide)
    writer.finish(info, picture, tissue)
    return scale


def _with_slide(info: TileStoreInfo, slide: _Slide) -> tuple[TileStoreInfo, Pixels, Mask]:
    """The attributes of a whole store, and the thumbnail and tissue mask that it keeps."""
    facts, stains, mpp, task = slide.facts, slide.stains, slide.scale.mpp, slide.task
    picture, _ = _small(slide)
    mask = cv2.resize(slide.scene.mask.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    about = {
        "identity": task.identity,
        "vendor": facts.vendor,
        "objective": facts.objective,
        "icc_sha256": facts.icc_sha256,
        "icc_applied": task.settings.colour.icc and facts.icc_sha256 is not None,
        "normalised": slide.colours.normalised,
        "slide_mpp": list(mpp) if mpp else None,
        "mpp_source": slide.scale.source,
        "notes": [*slide.notes, *_inky(info)],
        "stains": stains.as_dict() if stains else None,
        "scales": list(_asked(task.settings)) if len(_asked(task.settings)) > 1 else [],
        "perceptual_hash": perceptual_hash(picture),
    }
    return replace(info, extra={**(info.extra or {}), **about}), picture, mask


def _inky(info: TileStoreInfo) -> list[str]:
    """A note for a slide that lost most of its tissue to the pen filter: a whole stain may have the colour of ink."""
    counts = (info.extra or {})["counts"]
    return [INKY] if counts.get("pen", 0) > counts[KEPT] else []


def _small(slide: _Slide) -> tuple[Pixels, float]:
    """The thumbnail that is kept, and its downsample."""
    thumbnail = slide.scene.thumbnail
    size, _ = fit_within(Size(thumbnail.shape[1], thumbnail.shape[0]), slide.task.settings.keep_thumbnail_px)
    picture = cv2.resize(thumbnail, tuple(size), interpolation=cv2.INTER_AREA)
    return np.asarray(picture), slide.facts.size_level0.width / size.width


def _nothing_fits(size: Size, grid: Grid, settings: TileSettings) -> str:
    side = f"{grid.side_level0[0]:.0f} x {grid.side_level0[1]:.0f}"
    scale = f"{grid.mpp:.4g} mpp" if grid.mpp and settings.mpp != "native" else "native scale"
    return f"slide of {size.width} x {size.height} px is smaller than one tile ({side} level-0 px at {scale})"


def _draw(slide: _Slide, scale: _Scale, folder: Path) -> None:
    """Writes the overlay and the contact sheet of the first resolution."""
    if slide.task.pictures is None:
        return
    grid, mpp = scale.grid, slide.scale.mpp
    boxes = np.concatenate([grid.corners_level0, grid.corners_level0 + np.array(grid.side_level0)], axis=1)
    thumbnail, downsample = _small(slide)
    picture = overlay(thumbnail, downsample, slide.scene.mask, boxes, scale.fates.tolist(), mpp.mean if mpp else None)
    tiles = dict(_sample(slide, scale, open_tiles(folder)))
    captions = ["{}, {}".format(*(int(value) for value in grid.corners_level0[index])) for index in tiles]
    sheet = contact_sheet(list(tiles.values()), captions, mpp=grid.mpp)
    for path, data in zip(slide.task.pictures, (png_bytes(picture), jpeg.encode(sheet, SHEET_QUALITY)), strict=True):
        with commit_file(path) as temporary:
            temporary.write_bytes(data)


def _sample(slide: _Slide, scale: _Scale, store: TileStore) -> Iterator[tuple[int, Pixels]]:
    """A few kept tiles spread over the slide, by their number in the grid."""
    kept = [int(index) for index in np.flatnonzero(scale.fates == KEPT)]
    rows = sample_evenly(len(kept), CONTACT_TILES)
    if store.has_pixels:
        yield from ((kept[row], store[row]) for row in rows)
        return
    for index, pixels in read_tiles(slide.reader, scale.grid.cut, [kept[row] for row in rows], lambda _, tile: tile.pixels):
        if isinstance(pixels, np.ndarray):
            for transform in slide.colours.recolour:
                pixels = transform(pixels)
            yield index, pixels
