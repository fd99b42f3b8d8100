"""Tile stores as other programs want them: pictures, WebDataset shards, coordinates for CLAM and TRIDENT, GeoJSON for QuPath.

What is written appears whole or not at all, and the same store always gives the same bytes. Nothing is ever replaced but by
itself: a file or folder that is there with other content is left alone and named. Specified in ``docs/interop.md``.
"""

from __future__ import annotations

import csv
import filecmp
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import cv2

from pathfm import jpeg
from pathfm.errors import PathfmError, StoreError, UsageError
from pathfm.store.cohort import id_problem
from pathfm.store.commit import commit_dir, commit_file
from pathfm.store.interop.clam import write_clam
from pathfm.store.interop.geojson import measurements, tiles_geojson, tissue_geojson, write_geojson
from pathfm.store.interop.trident import write_trident
from pathfm.store.record import Outcome
from pathfm.store.tile_store import TileStore, open_tiles, scale_group

JPEG_QUALITY = 95
"""Of tiles that are stored without loss; stored JPEG data are written as they are."""
TAR_TILES = 2048
"""Tiles per WebDataset shard."""
TABLE = "tiles.csv"
SQUARE, SQUARE_WITHIN = {"clam", "trident"}, 0.01
"""Formats that know one side of a tile only, and how much the other may differ."""
UNSAFE_IN_KEYS = "%.:{}"
"""Characters that mean something to WebDataset in a key or in the name of a shard; written as %2E and so on."""


def export_tiles(store: TileStore, folder: Path, format: str) -> tuple[Path, ...]:
    """Writes the tiles of a store, of one resolution, into ``folder``.

    Args:
        store: the tiles.
        folder: made if need be; several stores may share it.
        format: one of ``FORMATS``.

    Returns:
        The files written (for ``png`` and ``jpeg`` the slide's folder).

    Raises:
        UsageError: an unknown format.
        StoreError: the store is damaged or lacks what the format needs, or something else is in the place.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}", fix=f"one of {', '.join(FORMATS)}")
    problem = id_problem(store.slide_id)
    if problem:
        raise StoreError(problem, where=str(store.path))
    if store.coords_synthetic and format in SQUARE:
        raise StoreError("the tiles have no coordinates on a slide", where=str(store.path))
    width, height = store.tile_sides_level0
    if format in SQUARE and abs(height - width) > SQUARE_WITHIN * width:
        raise StoreError(f"{format} only knows square tiles, and the slide's pixels are not square", where=str(store.path))
    try:
        return tuple(FORMATS[format](store, folder))
    except OSError as error:
        raise StoreError(f"export broke off: {error.strerror or error}", where=str(folder)) from error


def export_stores(stores: Sequence[Path], folder: Path, format: str) -> Iterator[Outcome]:
    """Exports stores one after the other; one that fails becomes a failed outcome, and the others go on.

    A store of several resolutions gives one folder for each, named as its groups (``0.5mpp``).

    Raises:
        UsageError: an unknown format.
    """
    for path in stores:
        try:
            store = open_tiles(path)
            written, tiles = 0, 0
            for mpp in store.scales or (None,):
                scale = open_tiles(path, mpp)
                written += len(export_tiles(scale, folder / scale_group(mpp) if mpp else folder, format))
                tiles += len(scale)
        except UsageError:
            raise
        except PathfmError as error:
            yield Outcome(path.stem, "failed", error.reason)
        else:
            reason = "" if tiles else str(store.attrs.get("empty_reason") or "no tiles")
            yield Outcome(store.slide_id, "done" if tiles else "empty", reason, {"tiles": tiles, "written": written})


class _IsThere(Exception):
    """What was to be written is in its place already."""


@contextmanager
def commit_new(commit: Callable[[Path], AbstractContextManager[Path]], path: Path) -> Iterator[Path]:
    """As ``commit``, but touches nothing that is there: the same content is left as it is, anything else is refused."""
    with suppress(_IsThere), commit(path) as temporary:
        yield temporary
        if os.path.lexists(path):
            if _is_same(path, temporary):
                raise _IsThere
            raise StoreError("something else is here already", where=str(path), fix="choose another folder, or remove it")


def _is_same(theirs: Path, ours: Path) -> bool:
    """Whether two files have the same bytes, or two folders the same names, hidden ones included, with the same content."""
    if not ours.is_dir():
        return theirs.is_file() and filecmp.cmp(theirs, ours, shallow=False)
    if not theirs.is_dir() or {path.name for path in theirs.iterdir()} != {path.name for path in ours.iterdir()}:
        return False
    return all(_is_same(theirs / path.name, path) for path in ours.iterdir())


def _png(store: TileStore, index: int) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(store[index], cv2.COLOR_RGB2BGR))[1].tobytes()


def _jpeg(store: TileStore, index: int) -> bytes:
    if _is_jpeg(store):
        return store.encoded(index)
    return jpeg.encode(store[index], JPEG_QUALITY)


def _is_jpeg(store: TileStore) -> bool:
    return bool(store.attrs["codec"] == "jpeg")


def _write_png(store: TileStore, folder: Path) -> list[Path]:
    return _write_pictures(store, folder / store.slide_id, ".png", _png)


def _write_jpeg(store: TileStore, folder: Path) -> list[Path]:
    return _write_pictures(store, folder / store.slide_id, ".jpg", _jpeg)


def _write_pictures(store: TileStore, folder: Path, ending: str, encode: Callable[[TileStore, int], bytes]) -> list[Path]:
    """A folder of pictures ``<x>_<y>`` with a table of them."""
    taken: dict[str, int] = {}
    with commit_new(commit_dir, folder) as temporary, (temporary / TABLE).open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["file", "x_level0", "y_level0", "side_level0", "mpp", *store.quality_names])
        for index, (x, y) in enumerate(store.xy_level0.tolist()):
            name = f"{x}_{y}"
            taken[name] = taken.get(name, 0) + 1
            # Two tiles of one place, as other tools may choose them, are two pictures.
            name += f"_{taken[name]}" * (taken[name] > 1) + ending
            (temporary / name).write_bytes(encode(store, index))
            measured = measurements(store, index)
            columns = [measured.get(column, "") for column in store.quality_names]
            table.writerow([name, x, y, store.tile_side_level0, store.mpp or "", *columns])
    return [folder]


def _write_webdataset(store: TileStore, folder: Path) -> list[Path]:
    """Tar shards with a picture and a JSON file per tile: stored JPEG data as they are, else PNG."""
    key, encode, ending = _key(store.slide_id), *((_jpeg, "jpg") if _is_jpeg(store) else (_png, "png"))
    written = []
    for start in range(0, len(store), TAR_TILES):
        shard = folder / f"{key}-{start // TAR_TILES:06d}.tar"
        with commit_new(commit_file, shard) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for index in range(start, min(start + TAR_TILES, len(store))):
                _add(tar, f"{key}_{index:08d}.{ending}", encode(store, index))
                _add(tar, f"{key}_{index:08d}.json", _facts(store, index))
        written.append(shard)
    return written


def _key(slide_id: str) -> str:
    return "".join(f"%{ord(letter):02X}" if letter in UNSAFE_IN_KEYS else letter for letter in slide_id)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # time, user and group are zero and empty
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _facts(store: TileStore, index: int) -> bytes:
    facts = {
        "slide_id": store.slide_id,
        "index": index,
        "xy_level0": store.xy_level0[index].tolist(),
        "side_level0": store.tile_side_level0,
        "mpp": store.mpp,
        "coords": store.attrs["coords"],
        "quality": measurements(store, index),
    }
    return json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()


def _write_clam(store: TileStore, folder: Path) -> list[Path]:
    path = folder / "patches" / f"{store.slide_id}.h5"
    with commit_new(commit_file, path) as temporary:
        write_clam(temporary, store)
    return [path]


def _write_trident(store: TileStore, folder: Path) -> list[Path]:
    path = folder / "patches" / f"{store.slide_id}_patches.h5"
    with commit_new(commit_file, path) as temporary:
        write_trident(temporary, store)
    return [path]


def _write_geojson(store: TileStore, folder: Path) -> list[Path]:
    path = folder / f"{store.slide_id}.geojson"
    with commit_new(commit_file, path) as temporary:
        mask, scale = store.tissue, store.thumbnail_downsample
        outlines = tissue_geojson(mask, scale, store.slide_id) if mask is not None else iter(())
        write_geojson(temporary, itertools.chain(outlines, tiles_geojson(store)))
    return [path]


FORMATS: dict[str, Callable[[TileStore, Path], list[Path]]] = {
    "png": _write_png,
    "jpeg": _write_jpeg,
    "webdataset": _write_webdataset,
    "clam": _write_clam,
    "trident": _write_trident,
    "geojson": _write_geojson,
}
"""What ``export_tiles`` can write."""
