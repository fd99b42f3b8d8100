"""One slide -> one tile store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.errors import MissingMppError, SlideError, UnreadableSlideError
from pathfm.faults import crash_point
from pathfm.geometry import Mpp, Size, fit_within
from pathfm.slides.reader import SlideReader, is_tile_folder, open_slide
from pathfm.slides.tile_folder import TileFolder
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import commit_dir
from pathfm.store.mosaic import MosaicCanvas, mosaic_corners
from pathfm.store.tile_store import TileCodec, TileStoreInfo, TileStoreWriter
from pathfm.study import TileSettings
from pathfm.tile.grid import Grid, plan_grid
from pathfm.tile.quality import Quality, measure, perceptual_hash
from pathfm.tile.tissue import mask_fractions, tissue_mask

Pixels = npt.NDArray[np.uint8]

ASSUMED = "assumed"


class Made(NamedTuple):
    """What came of a slide: counts by reason, and why nothing was kept (else empty)."""

    counts: dict[str, int]
    empty_reason: str


class Target(NamedTuple):
    """Where a store goes and what it depends on."""

    store: Path
    identity: str
    fingerprints: tuple[str, str]

    def fingerprint(self, mpp_source: str) -> str:
        """The fingerprint that holds for this source of the mpp."""
        return self.fingerprints[mpp_source == ASSUMED]


def tile_slide(row: SlideRow, settings: TileSettings, store: Path, identity: str, fingerprints: tuple[str, str]) -> Made:
    """Writes the tile store of one slide, whole or not at all.

    Args:
        row: the slide.
        settings: the stage's settings.
        store: where the store goes.
        identity: hash of the slide file.
        fingerprints: what the store depends on: when the slide's own mpp is used, and when the assumed one is.

    Raises:
        SlideError: the slide cannot be used, with the reason.
    """
    target = Target(store, identity, fingerprints)
    if is_tile_folder(row.path):
        return _tile_folder(row, settings, target)
    with open_slide(row.path) as reader:
        return _tile_glass(reader, row, settings, target)


def _tile_glass(reader: SlideReader, row: SlideRow, settings: TileSettings, target: Target) -> Made:
    facts = reader.metadata
    mpp, source = _slide_mpp(reader, row, settings)
    grid = plan_grid(facts.size_level0, tuple(level.downsample for level in facts.levels), mpp, settings)
    thumbnail, downsample = reader.thumbnail(settings.tissue.thumbnail_px)
    mask = tissue_mask(thumbnail, mpp.mean * downsample if mpp else None, settings.tissue)
    share = mask_fractions(mask, grid.boxes(downsample))
    chosen = np.flatnonzero(share >= settings.tissue.min_fraction)
    counts: Counter[str] = Counter({"grid": len(share), "no tissue": len(share) - len(chosen), "kept": 0})
    with commit_dir(target.store) as folder:
        writer = _writer(folder, settings)
        for index in chosen:
            tile = _read(reader, grid, int(index), settings.tile_px, counts)
            if tile is None:
                continue
            quality = measure(tile, float(share[index]))
            if _passes(quality, settings, counts):
                x, y = (int(value) for value in grid.corners_level0[index])
                writer.append(tile, (x, y), quality)
            crash_point("tile.tile")
        _check_unreadable(counts, len(chosen), settings)
        reason = _empty_reason(counts, facts.size_level0, grid, settings)
        kept_size, _ = fit_within(Size(thumbnail.shape[1], thumbnail.shape[0]), settings.keep_thumbnail_px)
        picture = cv2.resize(thumbnail, tuple(kept_size), interpolation=cv2.INTER_AREA)
        allowed = {
            "vendor": facts.vendor,
            "objective": facts.objective,
            "icc_sha256": facts.icc_sha256,
            "reader": reader.name,
            "slide_mpp": list(mpp) if mpp else None,
        }
        extra = {"identity": target.identity, **allowed, "mpp_source": source, "read_level": grid.level}
        info = TileStoreInfo(
            slide_id=row.slide_id,
            fingerprint=target.fingerprint(source),
            tile_px=settings.tile_px,
            mpp=grid.mpp,
            tile_side_level0=grid.side_level0[0],
            size_level0=facts.size_level0,
            quality_names=Quality._fields,
            thumbnail_downsample=facts.size_level0.width / kept_size.width,
            extra=_extra(extra, counts, reason, picture),
        )
        writer.finish(info, picture)
    return Made(dict(counts), reason)


def _writer(folder: Path, settings: TileSettings) -> TileStoreWriter:
    return TileStoreWriter(folder, TileCodec(settings.codec, settings.jpeg_quality), settings.tile_px, settings.shard_tiles)


def _extra(base: dict[str, Any], counts: Counter[str], reason: str, picture: Pixels) -> dict[str, Any]:
    return {**base, "counts": dict(counts), "empty_reason": reason, "perceptual_hash": perceptual_hash(picture)}


def _slide_mpp(reader: SlideReader, row: SlideRow, settings: TileSettings) -> tuple[Mpp | None, str]:
    """Micrometres per pixel and where they come from: the cohort table, the file, or the assumption, in this order."""
    if row.mpp:
        return Mpp(row.mpp, row.mpp), "cohort table"
    facts = reader.metadata
    if facts.mpp:
        return facts.mpp, facts.mpp_source
    if settings.assume_mpp:
        return Mpp(settings.assume_mpp, settings.assume_mpp), ASSUMED
    if settings.mpp == "native":
        return None, "unknown"
    found = f" ({facts.mpp_source})" if facts.mpp_source else ""
    raise MissingMppError(f"no mpp in the file{found}", fix="set `mpp` for it in the cohort table or pass `--assume-mpp`")


def _read(reader: SlideReader, grid: Grid, index: int, side: int, counts: Counter[str]) -> Pixels | None:
    """One tile at the wanted scale, None when its region cannot be decoded (counted, never filled in)."""
    x, y = (int(value) for value in grid.corners_level0[index])
    try:
        region = reader.read_region(x, y, grid.level, grid.read_px)
    except UnreadableSlideError:
        counts["unreadable"] += 1
        return None
    if region.shape[:2] == (side, side):
        return region
    resized: Pixels = cv2.resize(region, (side, side), interpolation=cv2.INTER_AREA)
    return resized


def _passes(quality: Quality, settings: TileSettings, counts: Counter[str]) -> bool:
    if quality.white > settings.max_white:
        counts["white"] += 1
    elif quality.black > settings.max_black:
        counts["black"] += 1
    else:
        counts["kept"] += 1
        return True
    return False


def _check_unreadable(counts: Counter[str], wanted: int, settings: TileSettings) -> None:
    if counts["unreadable"] > settings.max_unreadable * wanted:
        raise UnreadableSlideError(
            f"{counts['unreadable']} of {wanted} tiles cannot be decoded", fix="get a new copy of the slide or rescan it"
        )


def _empty_reason(counts: Counter[str], size: Size, grid: Grid, settings: TileSettings) -> str:
    """Why a slide gave no tile, or nothing when it gave some."""
    if counts["kept"]:
        return ""
    side = f"{grid.side_level0[0]:.0f} x {grid.side_level0[1]:.0f}"
    if not counts["grid"]:
        return f"slide of {size.width} x {size.height} px is smaller than one tile ({side} level-0 px at {settings.mpp} mpp)"
    dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if name not in {"grid", "kept"} and count)
    return f"no tile of {counts['grid']} was kept: {dropped}"


def _tile_folder(row: SlideRow, settings: TileSettings, target: Target) -> Made:
    """A folder of pre-cut tiles: pixels as they are, a mosaic for coordinates, file names for truth tables."""
    folder = TileFolder(row.path)
    corners = mosaic_corners(len(folder), settings.tile_px)
    canvas = MosaicCanvas(len(folder), settings.tile_px)
    counts: Counter[str] = Counter({"files": len(folder), "kept": 0})
    with commit_dir(target.store) as temporary:
        writer = _writer(temporary, settings)
        for name, tile in _folder_tiles(folder, settings, counts):
            quality = measure(tile, 1.0)
            if _passes(quality, settings, counts):
                index = counts["kept"] - 1
                x, y = (int(value) for value in corners[index])
                writer.append(tile, (x, y), quality, name)
                canvas.paste(index, tile)
            crash_point("tile.tile")
        _check_unreadable(counts, len(folder), settings)
        reason = "" if counts["kept"] else f"no tile of {len(folder)} was kept"
        mpp = row.mpp or settings.assume_mpp
        size = Size(*(int(value) + settings.tile_px for value in corners.max(axis=0))) if len(folder) else Size(0, 0)
        source = "cohort table" if row.mpp else ASSUMED if mpp else "unknown"
        extra = {"identity": target.identity, "reader": "tile folder", "mpp_source": source}
        info = TileStoreInfo(
            slide_id=row.slide_id,
            fingerprint=target.fingerprint(source),
            tile_px=settings.tile_px,
            mpp=mpp,
            tile_side_level0=float(settings.tile_px),
            size_level0=size,
            quality_names=Quality._fields,
            thumbnail_downsample=canvas.downsample,
            coords_synthetic=True,
            extra=_extra(extra, counts, reason, canvas.picture),
        )
        writer.finish(info, canvas.picture)
    return Made(dict(counts), reason)


def _folder_tiles(folder: TileFolder, settings: TileSettings, counts: Counter[str]) -> Iterator[tuple[str, Pixels]]:
    """The readable tiles of the wanted size; the others are counted, and a folder of another size altogether is refused."""
    sides: Counter[tuple[int, int]] = Counter()
    for name in folder.names:
        try:
            tile = folder.read(name)
        except UnreadableSlideError:
            counts["unreadable"] += 1
            continue
        sides[tile.shape[1], tile.shape[0]] += 1
        if tile.shape[:2] == (settings.tile_px, settings.tile_px):
            yield name, tile
        else:
            counts["other size"] += 1
    if sides and (settings.tile_px, settings.tile_px) not in sides:
        width, height = sides.most_common(1)[0][0]
        raise SlideError(f"tiles are {width} x {height} px, not {settings.tile_px}", fix=f"set tile.tile_px={width}")
