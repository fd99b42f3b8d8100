"""Tile stores: one zarr v3 group per slide, one chunk per tile, sharded. Specified in ``docs/tile-store.md``.

Written and read directly (``shards.py``), while the folder stays a plain zarr group that other programs open.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import BytesCodec, ZstdCodec

from pathfm import jpeg
from pathfm.errors import StoreError
from pathfm.geometry import Box, Size
from pathfm.store import zarr_jpeg
from pathfm.store.attributes import ZARR_ERRORS, Kind, TileAttributes, read_attributes
from pathfm.store.commit import commit_dir, read_json, recover
from pathfm.store.shards import CRC_BYTES, ShardReader, write_shard

FORMAT = "pathfm-tile-store"
VERSION = 2
AGAIN = "delete the store and tile again"
KIND = Kind(FORMAT, VERSION, "no tile store", "run `pathfm tile` first", "not a pathfm tile store", AGAIN, TileAttributes)
ZSTD_LEVEL = 3
Pixels = npt.NDArray[np.uint8]

zarr_jpeg.register()


@dataclass(frozen=True)
class TileCodec:
    """How the pixels of a store are encoded; ``none``: they stay in the slide."""

    name: Literal["jpeg", "zstd", "none"] = "jpeg"
    quality: int = 90

    def encode(self, tile: Pixels) -> bytes:
        """One tile [H, W, 3] as bytes."""
        if self.name == "jpeg":
            return jpeg.encode(tile, self.quality)
        data: bytes = Zstd(level=ZSTD_LEVEL).encode(np.ascontiguousarray(tile))
        return data

    def decode(self, data: bytes, side: int) -> Pixels:
        """Bytes back to a tile [side, side, 3]."""
        if self.name == "jpeg":
            return jpeg.decode(data)
        return np.frombuffer(Zstd().decode(data), dtype=np.uint8).reshape(side, side, 3)


@dataclass(frozen=True)
class TileStoreInfo:
    """What is known of a slide and its tiles besides pixels; becomes the group's attributes.

    Attributes:
        slide_id: from the cohort table.
        fingerprint: what the store depends on.
        tile_px: side of a tile [px].
        mpp: micrometres per pixel of the stored tiles, None when unknown.
        tile_side_level0: exact side of a tile in level-0 pixels (0 where tiles have no coordinates).
        size_level0: width and height of the slide [level-0 px].
        quality_names: names of the columns of ``quality``.
        thumbnail_downsample: level-0 px per thumbnail px.
        coords_synthetic: the coordinates are those of a mosaic, not of tissue.
        extra: allow-listed facts (vendor, mpp source, objective, reader, counts, identity, perceptual hash, reason).
    """

    slide_id: str
    fingerprint: str
    tile_px: int
    mpp: float | None
    tile_side_level0: float
    size_level0: Size
    quality_names: tuple[str, ...] = ()
    thumbnail_downsample: float = 1.0
    coords_synthetic: bool = False
    extra: Mapping[str, Any] | None = None


class TileStoreWriter:
    """Appends encoded tiles to shards, holding at most one shard in memory; ``finish`` makes the folder a zarr group.

    Args:
        folder: an empty folder (a temporary one of ``commit_dir``).
        codec: pixel encoding.
        tile_px: side of the tiles [px].
        shard_tiles: tiles per shard file.
    """

    def __init__(self, folder: Path, codec: TileCodec, tile_px: int, shard_tiles: int = 256) -> None:
        self._folder, self._codec, self._tile_px, self._slots = folder, codec, tile_px, shard_tiles
        self._pending: list[bytes] = []
        self._written = 0
        self._xy: list[tuple[int, int]] = []
        self._quality: list[Sequence[float]] = []
        self._names: list[str] = []

    def append(self, tile: Pixels, xy_level0: tuple[int, int], quality: Sequence[float] = (), source_name: str = "") -> None:
        """Adds one tile [tile_px, tile_px, 3]."""
        if tile.shape != (self._tile_px, self._tile_px, 3):
            raise ValueError(f"tile of shape {tile.shape}, expected {self._tile_px} px squares")
        self.append_encoded(self._codec.encode(tile), xy_level0, quality, source_name)

    def append_encoded(
        self, data: bytes, xy_level0: tuple[int, int], quality: Sequence[float] = (), source_name: str = ""
    ) -> None:
        """Adds one tile as bytes of the store's codec (empty when pixels stay in the slide)."""
        if self._codec.name != "none":
            self._pending.append(data)
        self._xy.append(xy_level0)
        self._quality.append(quality)
        self._names.append(source_name)
        if len(self._pending) == self._slots:
            self._flush()

    def _flush(self) -> None:
        write_shard(self._folder / "tiles" / "c" / str(self._written) / "0" / "0" / "0", self._pending, self._slots)
        self._written += 1
        self._pending = []

    def __len__(self) -> int:
        return len(self._xy)

    def finish(self, info: TileStoreInfo, thumbnail: Pixels | None, tissue: npt.NDArray[np.bool_] | None = None) -> None:
        """Writes what is pending, the small arrays and the metadata. An uncommitted folder is not yet a store.

        Args:
            info: becomes the group's attributes.
            thumbnail: RGB picture of the slide; None for further resolutions of a store, which share it.
            tissue: mask at the scale of the thumbnail.
        """
        if self._pending:
            self._flush()
        group = zarr.open_group(self._folder, mode="a", attributes={"pathfm": self._attributes(info)}, zarr_format=3)
        if self._codec.name != "none":
            self._create_tiles(group)
        quality = np.asarray(self._quality, dtype=np.float32).reshape(len(self._xy), len(info.quality_names))
        _whole(group, "xy_level0", np.asarray(self._xy, dtype=np.int64).reshape(-1, 2))
        _whole(group, "quality", quality)
        if thumbnail is not None:
            _whole(group, "thumbnail", thumbnail)
        if tissue is not None:
            _whole(group, "tissue", tissue.astype(np.uint8))
        if any(self._names):
            _whole(group, "source_names", np.frombuffer("\0".join(self._names).encode(), dtype=np.uint8))

    def _create_tiles(self, group: zarr.Group) -> None:
        """Metadata of the array of pixels, whose shards are there already."""
        side, jpegs = self._tile_px, self._codec.name == "jpeg"
        group.create_array(
            "tiles",
            shape=(len(self._xy), side, side, 3),
            chunks=(1, side, side, 3),
            shards=(self._slots, side, side, 3),
            dtype="uint8",
            serializer=zarr_jpeg.JpegCodec(self._codec.quality) if jpegs else BytesCodec(),
            compressors=() if jpegs else (ZstdCodec(level=ZSTD_LEVEL),),
            fill_value=0,
        )

    def _attributes(self, info: TileStoreInfo) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "slide_id": info.slide_id,
            "fingerprint": info.fingerprint,
            "tile_px": info.tile_px,
            "mpp": info.mpp,
            "tile_side_level0": info.tile_side_level0,
            "size_level0": list(info.size_level0),
            "quality_names": list(info.quality_names),
            "thumbnail_downsample": info.thumbnail_downsample,
            "coords": "synthetic" if info.coords_synthetic else "level0",
            "codec": self._codec.name,
            "has_pixels": self._codec.name != "none",
            "jpeg_quality": self._codec.quality if self._codec.name == "jpeg" else None,
            "shard_tiles": self._slots,
            "tiles": len(self._xy),
            **dict(info.extra or {}),
        }


def _whole(group: zarr.Group, name: str, values: npt.NDArray[Any]) -> None:
    """An array in one chunk: one file."""
    shape = tuple(max(1, length) for length in values.shape)
    array = group.create_array(
        name, shape=values.shape, chunks=shape, dtype=values.dtype, compressors=(ZstdCodec(level=ZSTD_LEVEL),)
    )
    if values.size:
        array[...] = values


class TileStore:
    """Reads a tile store: tiles by number, coordinates, quality columns, thumbnail.

    Opening reads one small JSON file; arrays are read when first asked for; tiles by positioned reads.
    """

    def __init__(self, path: Path, attrs: dict[str, Any]) -> None:
        self.path, self.attrs = path, attrs
        self.slide_id: str = attrs["slide_id"]
        self.fingerprint: str = attrs["fingerprint"]
        self.tile_px: int = attrs["tile_px"]
        self.mpp: float | None = attrs["mpp"]
        self.tile_side_level0: float = attrs["tile_side_level0"]
        side = self.tile_side_level0
        self.tile_sides_level0: tuple[float, float] = (side, attrs.get("tile_height_level0", side))
        self.size_level0 = Size(*attrs["size_level0"])
        self.quality_names = tuple(attrs["quality_names"])
        self.thumbnail_downsample: float = attrs["thumbnail_downsample"]
        self.coords_synthetic: bool = attrs["coords"] == "synthetic"
        self.has_pixels: bool = attrs.get("has_pixels", True)
        self._codec = TileCodec(attrs["codec"], attrs["jpeg_quality"] or 90)
        self._shards = ShardReader(path / "tiles", attrs["shard_tiles"])

    def __len__(self) -> int:
        return int(self.attrs["tiles"])

    def __getitem__(self, index: int) -> Pixels:
        """Tile ``index`` as RGB [tile_px, tile_px, 3]."""
        try:
            return self._codec.decode(self.encoded(index), self.tile_px)
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"tile {index} is damaged", where=str(self.path), fix=AGAIN) from error

    def encoded(self, index: int) -> bytes:
        """Tile ``index`` as it is stored: a JPEG image, or zstd data.

        Raises:
            StoreError: the tile is damaged, or pixels stayed in the slide.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        if not self.has_pixels:
            fix = "tile with another tile.codec than none"
            raise StoreError("the store has coordinates only", where=str(self.path), fix=fix)
        return self._shards.read(index)

    def is_whole(self) -> bool:
        """Whether no array or shard of any resolution is absent or cut short, told by metadata and the shards' ends alone."""
        try:
            return all(open_tiles(self.path, mpp)._has_all() for mpp in self.scales or (None,))
        except (StoreError, OSError):
            return False

    def _has_all(self) -> bool:
        count, slots = len(self), self.attrs["shard_tiles"]
        shapes = {"xy_level0": [count, 2], "quality": [count, len(self.quality_names)]}
        if self.has_pixels:
            shapes["tiles"] = [count, self.tile_px, self.tile_px, 3]
        if any(read_json(self.path / name / "zarr.json").get("shape") != shape for name, shape in shapes.items()):
            return False
        starts = range(0, count, slots) if self.has_pixels else ()
        return all(self._has_shard(start // slots, min(slots, count - start)) for start in starts)

    def _has_shard(self, shard: int, tiles: int) -> bool:
        handle, index = self._shards._shard(shard)
        end = os.fstat(handle).st_size - index.nbytes - CRC_BYTES
        offsets, lengths = index[:tiles].T
        return bool(np.all((offsets <= end) & (lengths > 0) & (lengths <= end - offsets)))

    @property
    def scales(self) -> tuple[float, ...]:
        """The resolutions [um per px] of a store that has several; ``open_tiles(path, mpp)`` opens one."""
        return tuple(self.attrs.get("scales", ()))

    def overlapping(self, box_level0: Box) -> npt.NDArray[np.int64]:
        """Numbers of the tiles that share pixels with a rectangle of the slide: how tiles of another resolution are found."""
        left, top = self.xy_level0.T
        right, bottom = left + self.tile_sides_level0[0], top + self.tile_sides_level0[1]
        inside = (left < box_level0.right) & (right > box_level0.left) & (top < box_level0.bottom) & (bottom > box_level0.top)
        return np.flatnonzero(inside)

    def read(self, indices: Sequence[int]) -> Pixels:
        """Tiles by number as one array [n, tile_px, tile_px, 3]."""
        tiles = np.empty((len(indices), self.tile_px, self.tile_px, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            tiles[row] = self[int(index)]
        return tiles

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r")

    def _array(self, name: str) -> npt.NDArray[Any]:
        try:
            array = self._group[name]
            return np.asarray(array[...]) if isinstance(array, zarr.Array) else np.empty(0)
        except ZARR_ERRORS as error:
            raise StoreError(f"array {name} is damaged or absent", where=str(self.path), fix=AGAIN) from error

    @cached_property
    def xy_level0(self) -> npt.NDArray[np.int64]:
        """Upper left corners [N, 2] in level-0 pixels."""
        return self._array("xy_level0").astype(np.int64)

    @cached_property
    def quality(self) -> npt.NDArray[np.float32]:
        """Quality columns [N, C], named by ``quality_names``."""
        return self._array("quality").astype(np.float32)

    @cached_property
    def thumbnail(self) -> Pixels:
        """RGB picture of the whole slide."""
        if "scale_of" in self.attrs:
            return open_tiles(self.path.parent).thumbnail
        return self._array("thumbnail").astype(np.uint8)

    @cached_property
    def tissue(self) -> npt.NDArray[np.bool_] | None:
        """The tissue mask at the scale of the thumbnail; None for slides that are folders of tiles, and in older stores."""
        home = self.path.parent if "scale_of" in self.attrs else self.path
        if not (home / "tissue").is_dir():
            return None
        return (self._array("tissue") if home == self.path else open_tiles(home)._array("tissue")).astype(bool)

    @cached_property
    def source_names(self) -> tuple[str, ...] | None:
        """File name of each tile of a folder-of-tiles slide, else None."""
        if not (self.path / "source_names").is_dir():
            return None
        return tuple(self._array("source_names").tobytes().decode().split("\0"))

    def __reduce__(self) -> tuple[object, ...]:
        return open_tiles, (self.path,)


def open_tiles(path: Path | str, mpp: float | None = None) -> TileStore:
    """Opens a tile store, or one resolution of it.

    Args:
        path: the store.
        mpp: as the settings asked for it [um per px]; None: the first.

    Raises:
        StoreError: absent, damaged, foreign, or written by a newer pathfm; or without this resolution.
    """
    path = Path(path)
    recover(path)
    attrs = read_attributes(path, KIND)
    scales = list(attrs.get("scales", ()))
    if mpp is None or scales[:1] == [mpp]:
        return TileStore(path, attrs)
    if mpp not in scales:
        has = ", ".join(f"{scale:g}" for scale in scales) or "one resolution"
        raise StoreError(f"no tiles of {mpp:g} mpp", where=str(path), fix=f"it has {has}")
    return open_tiles(path / scale_group(mpp))


def scale_group(mpp: float) -> str:
    """Name of the group of a further resolution inside its store."""
    return f"{mpp:g}mpp"


def write_tiles(
    path: Path,
    images: Pixels,
    *,
    slide_id: str,
    mpp: float | None = 0.5,
    xy_level0: npt.NDArray[np.int64] | None = None,
    source_names: Sequence[str] | None = None,
    codec: Literal["jpeg", "zstd"] = "jpeg",
) -> None:
    """Writes tiles [N, H, W, 3] held in memory as a store: for notebooks and tests.

    Without ``xy_level0`` the tiles are laid out as a mosaic flagged ``coords: synthetic``.
    """
    from pathfm.store.mosaic import mosaic

    count, side = len(images), images.shape[1]
    picture, corners, downsample = mosaic(images)
    xy = corners if xy_level0 is None else xy_level0
    size = Size(int(xy[:, 0].max()) + side, int(xy[:, 1].max()) + side) if count else Size(0, 0)
    with commit_dir(path) as folder:
        writer = TileStoreWriter(folder, TileCodec(codec), side)
        for index in range(count):
            name = source_names[index] if source_names else ""
            writer.append(images[index], (int(xy[index, 0]), int(xy[index, 1])), (), name)
        info = TileStoreInfo(
            slide_id, "in memory", side, mpp, float(side), size, (), downsample, coords_synthetic=xy_level0 is None
        )
        writer.finish(info, picture)
