"""Dense features: the patch tokens of every tile of a slide, a zarr v3 group. Specified in ``docs/dense-store.md``.

One chunk per tile, many chunks per shard file, so that a slide is a few files and any tile is one positioned read. A shard is
written as its tiles come, so memory does not grow with the slide. Plain zarr opens the folder.

Shapes: N tiles, h x w patches of a tile, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from pathfm.errors import StoreError
from pathfm.faults import crash_point
from pathfm.store.attributes import ZARR_ERRORS, DenseAttributes, Kind, read_attributes
from pathfm.store.commit import commit_dir, disk_errors, recover
from pathfm.store.shards import ABSENT, CRC_BYTES, ShardReader

FORMAT = "pathfm-dense-features"
VERSION = 1
SHARD_BYTES = 2**29
"""About how large a shard file becomes; at least one tile."""
AGAIN = "delete it and run `pathfm extract` again"
KIND = Kind(
    FORMAT,
    VERSION,
    "no dense features",
    "run `pathfm extract` with extract.dense first",
    "not a store of pathfm's dense features",
    AGAIN,
    DenseAttributes,
)

FEATURES = "features"
"""Name of the array."""

Shape = tuple[int, int, int]


class DenseWriter:
    """Writes a dense store tile after tile, in memory that does not grow with the slide.

    The store appears, whole, with ``commit``, once every tile has been written. As a context manager it commits at the end, and
    leaves nothing behind after an error. Bytes do not depend on how the tiles were split up.

    Args:
        path: the folder to make or replace, ``<slide_id>.zarr``.
        rows: tiles of the slide.
        shape: h, w and D of a tile.
        dtype: how features are stored.
        coords: [N, 2] upper left corners of the tiles in level-0 pixels.
        attrs: what else the store says: those of the feature file, and ``patch_frame``.
        check: called right before the store appears; when it raises, nothing changes.

    Raises:
        StoreError: coordinates do not fit, or the drive is full or fails.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        shape: Shape,
        dtype: Literal["float16", "float32"],
        coords: npt.NDArray[np.int64],
        attrs: Mapping[str, Any],
        check: Callable[[], None] | None = None,
    ) -> None:
        if coords.shape != (rows, 2):
            raise StoreError(f"dense features of {rows} tiles, coordinates of {len(coords)}", where=str(path))
        self.path, self.rows, self.shape, self.dtype = path, rows, shape, np.dtype(dtype).newbyteorder("<")
        self._coords, self._attrs, self._check = coords.astype("<i8"), attrs, check
        self._slots = max(1, min(rows, SHARD_BYTES // (math.prod(shape) * self.dtype.itemsize)))
        self._valid = np.ones(rows, dtype=np.uint8)
        self._written = 0
        self._folder = path
        self._shard: _ShardStream | None = None
        self._committing = self._committed()
        self._committing.__enter__()

    def commit(self) -> None:
        """The store appears.

        Raises:
            StoreError: tiles were left out, or the drive is full or fails; nothing appears.
        """
        self._committing.__exit__(None, None, None)

    def abort(self, error: BaseException | None = None) -> None:
        """Nothing appears. Calling it after another end is allowed."""
        error = error or StoreError("given up", where=str(self.path))
        self._committing.__exit__(type(error), error, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.commit()
        else:
            self.abort(error)

    @contextmanager
    def _committed(self) -> Iterator[None]:
        with commit_dir(self.path, self._check) as self._folder:
            try:
                yield
                if self._written != self.rows:
                    raise StoreError(f"{self._written} of {self.rows} tiles were written", where=str(self.path))
                crash_point("store.dense_store.before_metadata")
                self._write_metadata()
            finally:
                if self._shard is not None:
                    self._shard.stream.close()

    def write(self, start: int, rows_NhwD: npt.NDArray[Any], valid_N: npt.NDArray[np.bool_] | None = None) -> None:
        """Writes the features of tiles ``start``, ``start + 1``... in ascending order without gaps.

        Args:
            start: number of the first of these tiles.
            rows_NhwD: their features; rounded to the type of the store.
            valid_N: which of the tiles could be read, default all. Features of the others are stored as zeros.

        Raises:
            StoreError: tiles out of order, of another shape, or not finite; or the drive is full or fails.
        """
        if start != self._written or start + len(rows_NhwD) > self.rows or rows_NhwD.shape[1:] != self.shape:
            what = f"tiles {start} and following, {list(rows_NhwD.shape)}"
            raise StoreError(f"{what}, after {self._written} of {self.rows} of {list(self.shape)}", where=str(self.path))
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused below
            values = np.array(rows_NhwD, dtype=self.dtype, order="C")
        valid = np.ones(len(values), dtype=np.uint8) if valid_N is None else np.asarray(valid_N, dtype=bool).astype(np.uint8)
        values[valid == 0] = 0
        if _has_non_finite(values):
            what = f"dense features are not finite as {self.dtype.name}"
            raise StoreError(what, where=str(self.path), fix="try extract.precision: fp32, dtype: float32")
        self._valid[start : start + len(values)] = valid
        with disk_errors(self.path, self._check):
            for row in values:
                self._append(row.tobytes())

    def _append(self, data: bytes) -> None:
        if self._shard is None:
            self._shard = _ShardStream(self._folder / FEATURES / "c" / str(self._written // self._slots), self._slots)
        self._shard.append(data + _checksum(data))
        self._written += 1
        if self._written % self._slots == 0 or self._written == self.rows:
            self._shard.finish()
            self._shard = None

    def _write_metadata(self) -> None:
        own = {"format": FORMAT, "version": VERSION, "tiles": self.rows, "shard_tiles": self._slots}
        own |= {"grid": list(self.shape[:2]), "dim": self.shape[2], "dtype": self.dtype.name}
        attributes: Any = dict(sorted({**{name: _plain(value) for name, value in self._attrs.items()}, **own}.items()))
        group = zarr.open_group(self._folder, mode="a", attributes={"pathfm": attributes}, zarr_format=3)
        group.create_array(
            FEATURES,
            shape=(self.rows, *self.shape),
            chunks=(1, *self.shape),
            shards=(self._slots, *self.shape),
            dtype=self.dtype,
            serializer=BytesCodec(),
            compressors=(Crc32cCodec(),),
            fill_value=0,
        )
        for name, values in (("coords", self._coords), ("valid", self._valid)):
            chunk = tuple(max(1, length) for length in values.shape)
            array = group.create_array(name, shape=values.shape, chunks=chunk, dtype=values.dtype, compressors=None)
            if values.size:
                array[...] = values


class _ShardStream:
    """One shard file (see ``shards.py``), written chunk by chunk."""

    def __init__(self, folder: Path, slots: int) -> None:
        path = folder / "0" / "0" / "0"
        path.parent.mkdir(parents=True)
        self.stream = path.open("wb")
        self._index = np.full((slots, 2), ABSENT, dtype="<u8")
        self._count = self._offset = 0

    def append(self, chunk: bytes) -> None:
        self.stream.write(chunk)
        self._index[self._count] = self._offset, len(chunk)
        self._count, self._offset = self._count + 1, self._offset + len(chunk)

    def finish(self) -> None:
        encoded = self._index.tobytes()
        self.stream.write(encoded + _checksum(encoded))
        self.stream.close()


def _has_non_finite(values: npt.NDArray[Any]) -> bool:
    """By the bits of the exponent: numpy's own test of float16 takes longer than all else here."""
    bits, exponent = (np.uint16, 0x7C00) if values.itemsize == 2 else (np.uint32, 0x7F800000)
    exponents = np.bitwise_and(values.view(bits), exponent)
    return bool((exponents == exponent).any())


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


class DenseStore:
    """Reads a dense store. Opening reads metadata and the index of each shard; features are read tile by tile.

    Not to be shared between threads: each opens its own.

    Attributes:
        path: the folder.
        attrs: as written.
        grid: h and w, patches of a tile.
        dim: D.
    """

    def __init__(self, path: Path, attrs: dict[str, Any]) -> None:
        self.path, self.attrs = path, attrs
        self.slide_id = str(attrs["slide_id"])
        self.fingerprint = str(attrs["fingerprint"])
        self.grid: tuple[int, int] = (attrs["grid"][0], attrs["grid"][1])
        self.dim: int = attrs["dim"]
        self._shape = (*self.grid, self.dim)
        self._dtype = np.dtype(attrs["dtype"]).newbyteorder("<")
        self._shards = ShardReader(path / FEATURES, attrs["shard_tiles"])

    def __len__(self) -> int:
        return int(self.attrs["tiles"])

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """Features [h, w, D] of a tile.

        Raises:
            StoreError: they are damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        try:
            data = self._shards.read(index)
        except StoreError as error:
            raise StoreError(error.what, where=str(self.path), fix=AGAIN) from error
        content, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if _checksum(content) != crc:
            raise StoreError(f"tile {index} is damaged", where=str(self.path), fix=AGAIN)
        return np.frombuffer(content, dtype=self._dtype).reshape(self._shape)

    def read(self, indices: Sequence[int]) -> npt.NDArray[Any]:
        """Features [n, h, w, D] of tiles by number."""
        rows = np.empty((len(indices), *self._shape), dtype=self._dtype)
        for row, index in enumerate(indices):
            rows[row] = self[int(index)]
        return rows

    @property
    def coords(self) -> npt.NDArray[np.int64]:
        """Upper left corners [N, 2] of the tiles in level-0 pixels."""
        return self._small("coords").astype(np.int64)

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """[N] whether each tile could be read."""
        return self._small("valid").astype(bool)

    def _small(self, name: str) -> npt.NDArray[Any]:
        try:
            array = zarr.open_group(self.path, mode="r")[name]
            return np.asarray(array[...]) if isinstance(array, zarr.Array) else np.empty(0)
        except ZARR_ERRORS as error:
            raise StoreError(f"array {name} is damaged or absent", where=str(self.path), fix=AGAIN) from error

    def close(self) -> None:
        """Closes the shard files."""
        self._shards.close()


def open_dense(path: Path | str) -> DenseStore:
    """Opens and verifies a dense store.

    Raises:
        StoreError: absent, damaged, foreign, or written by a newer pathfm.
    """
    path = Path(path)
    recover(path)
    store = DenseStore(path, read_attributes(path, KIND))
    try:
        for shard in range(-(-len(store) // store.attrs["shard_tiles"])):
            store._shards._shard(shard)
    except StoreError as error:
        raise StoreError(error.what, where=str(path), fix=AGAIN) from error
    return store


def read_dense_attrs(path: Path) -> dict[str, Any] | None:
    """Attributes of a dense store after a look at its metadata and the ends of its shards; None when it cannot be used."""
    try:
        store = open_dense(path)
    except StoreError:
        return None
    store.close()
    return store.attrs


def patch_frame(tile_side_level0: float, resize_px: int, input_px: int, columns: int) -> dict[str, float]:
    """Where patches lie on the slide, for the attributes of a dense store.

    Args:
        tile_side_level0: side of a tile [level-0 px].
        resize_px: side that tiles are resized to before the crop [px].
        input_px: side of the centre crop that the network sees [px].
        columns: patches along it.

    Returns:
        ``patch_px``, side of a patch [px of the input]; ``patch_stride_level0``, from patch to patch [level-0 px];
        ``patch_offset_level0``, from the tile's upper left corner to that of the first patch, along x and y [level-0 px].
    """
    level0_per_px = tile_side_level0 / resize_px
    return {
        "patch_px": input_px / columns,
        "patch_stride_level0": input_px / columns * level0_per_px,
        "patch_offset_level0": (resize_px - input_px) / 2 * level0_per_px,
    }


def _plain(value: object) -> object:
    """JSON knows neither numpy's numbers nor those that are not finite."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
