"""One folder of pre-cut tiles -> one tile store: pixels as they are, a mosaic for coordinates, file names for truth tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from pathfm.errors import SlideError, UnreadableSlideError
from pathfm.faults import crash_point
from pathfm.geometry import Size
from pathfm.slides.tile_folder import TileFolder
from pathfm.slides.tile_reading import TileRead
from pathfm.store.commit import commit_dir
from pathfm.store.mosaic import MosaicCanvas, mosaic_corners
from pathfm.store.tile_store import TileCodec, TileStoreInfo, TileStoreWriter
from pathfm.study import TileSettings
from pathfm.tile.finish import KEPT, Finisher
from pathfm.tile.quality import perceptual_hash
from pathfm.tile.task import ASSUMED, UNKNOWN, Made, TileTask, check_unreadable

Pixels = npt.NDArray[np.uint8]


def tile_folder(task: TileTask, check: Callable[[], None] | None = None) -> Made:
    """Writes the store of a folder of tiles, whole or not at all.

    Raises:
        SlideError: the folder cannot be used, with the reason.
    """
    folder, settings = TileFolder(task.path), task.settings
    check_settings(settings)
    corners = mosaic_corners(len(folder), settings.tile_px)
    canvas = MosaicCanvas(len(folder), settings.tile_px)
    counts: Counter[str] = Counter({"files": len(folder), KEPT: 0})
    codec = TileCodec("jpeg" if settings.codec == "auto" else settings.codec, settings.jpeg_quality)
    finish = Finisher(settings, codec, np.ones(len(folder), dtype=np.float32))
    with commit_dir(task.store, check) as temporary:
        writer = TileStoreWriter(temporary, codec, settings.tile_px, settings.shard_tiles)
        for name, tile in _folder_tiles(folder, settings, counts):
            fate, quality, data = finish(0, TileRead(tile, 0.0))
            counts[fate] += 1
            if fate == KEPT:
                index = len(writer)
                writer.append_encoded(data, (int(corners[index, 0]), int(corners[index, 1])), quality, name)
                canvas.paste(index, tile)
            crash_point("tile.tile")
        check_unreadable(counts["unreadable"], len(folder), settings)
        mpp = task.row.mpp or settings.assume_mpp
        source = "cohort table" if task.row.mpp else ASSUMED if mpp else UNKNOWN
        reason = "" if counts[KEPT] else f"no tile of {len(folder)} was kept"
        info = TileStoreInfo(
            slide_id=task.row.slide_id,
            fingerprint=task.fingerprint(source),
            tile_px=settings.tile_px,
            mpp=mpp,
            tile_side_level0=float(settings.tile_px),
            size_level0=Size(*(int(value) + settings.tile_px for value in corners.max(axis=0))),
            quality_names=finish.quality_names,
            thumbnail_downsample=canvas.downsample,
            coords_synthetic=True,
            extra={
                "identity": task.identity,
                "reader": "tile folder",
                "mpp_source": source,
                "counts": dict(counts),
                "empty_reason": reason,
                "perceptual_hash": perceptual_hash(canvas.picture),
            },
        )
        writer.finish(info, canvas.picture)
    return Made(dict(counts), reason)


def check_settings(settings: TileSettings) -> None:
    """Refuses what would silently not be done: tiles that are cut already are taken as they are."""
    cannot = {
        "several tile.mpp": isinstance(settings.mpp, tuple),
        "tile.keep_px": settings.keep_px is not None,
        "tile.overlap_px": settings.overlap_px > 0,
        "tile.coords": settings.coords is not None,
        "tile.colour": settings.colour.icc or settings.colour.normalise != "none",
    }
    asked = [name for name, is_set in cannot.items() if is_set]
    if asked:
        raise SlideError(f"tiles of a folder are taken as they are, without {', '.join(asked)}", fix="leave these settings out")


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
