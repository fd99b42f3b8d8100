"""Feature files: one HDF5 per slide with features, coordinates, validity and a checksum per tile; whole or absent.

Specified in ``docs/feature-file.md``. Everything lies contiguously and is read at disk speed, also in random rows; chunks of a
row, as some tools write, make both several times slower. Because the place of every row is known as soon as the file is laid
out, rows are written straight to it, in any order: HDF5 holds nothing open meanwhile that a kill or a full disk could spoil.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import h5py
import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.faults import crash_point
from pathfm.store.commit import commit_file, disk_errors
from pathfm.store.hdf5_draft import write_hdf5

FORMAT = "pathfm-features"
VERSION = 2
"""Version 1 had neither ``valid`` nor ``crc32``; it is still read."""
TYPES = {"features": ("<f2", "<f4"), "coords": ("<i8",), "valid": ("|u1",), "crc32": ("<u4",)}
"""Datasets and the types they may have."""
DIMENSIONS = ("dim", "recipe_dim")
"""Attributes that say the length of a feature; what they say must be so."""
LOOKED_AT = 16
"""Rows whose checksum a quick look compares, evenly spread, the first and the last among them."""
BLOCK_ROWS = 4096
REDO = "delete it and run `pathfm extract` again"
DAMAGE = (OSError, EOFError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What h5py raises on files that are damaged or something else."""

_UNWRITTEN = 255

Attribute = str | int | float | bool


@dataclass(frozen=True)
class FeatureFile:
    """Features of one slide.

    Attributes:
        features: [N, D] float16 or float32, row i belongs to tile i of the store; zeros where the tile is not valid.
        coords: [N, 2] int64, x and y of the tiles' upper left corners in level-0 pixels.
        valid: [N] whether the pixels of the tile could be read.
        attrs: encoder, recipe, fingerprint and geometry, as written.
    """

    features: npt.NDArray[Any]
    coords: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    attrs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What the features depend on."""
        return str(self.attrs["fingerprint"])


class FeatureWriter:
    """Writes a feature file row by row, in any order and in any pieces: the bytes of the file are the same.

    The file appears, whole, with ``commit``, once every row has been written. As a context manager it commits at the end, and
    leaves nothing behind after an error. Memory grows by a few bytes per row only.

    Args:
        path: where the file goes; one that is there is replaced.
        rows: number of tiles N.
        dim: length of a feature D.
        dtype: how features are stored.
        coords: [N, 2] upper left corners of the tiles in level-0 pixels.
        attrs: what else the file says; ``format`` and ``version`` are added.
        check: called last; when it raises, nothing changes.

    Raises:
        StoreError: coordinates or the stated dimension do not fit, or the drive is full or fails.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        dim: int,
        dtype: Literal["float16", "float32"],
        coords: npt.NDArray[np.int64],
        attrs: Mapping[str, Attribute],
        check: Callable[[], None] | None = None,
    ) -> None:
        if coords.shape != (rows, 2):
            raise StoreError(f"{rows} feature rows for {len(coords)} tiles", where=str(path))
        _check_dim(path, dim, attrs)
        self.path, self.dim, self.dtype = path, dim, np.dtype(dtype).newbyteorder("<")
        self._coords = np.ascontiguousarray(coords, dtype="<i8")
        self._valid = np.full(rows, _UNWRITTEN, dtype=np.uint8)
        self._crc32 = np.zeros(rows, dtype="<u4")
        self._attrs, self._check = {**attrs, "format": FORMAT, "version": VERSION}, check
        self._starts: dict[str, int] = {}
        self._handle = -1
        self._committing = self._committed()
        self._committing.__enter__()

    def commit(self) -> None:
        """The file appears.

        Raises:
            StoreError: rows were left out, or the drive is full or fails; nothing appears.
        """
        self._committing.__exit__(None, None, None)

    def abort(self, error: BaseException | None = None) -> None:
        """Nothing appears. Calling it after another end is allowed."""
        error = error or self._error("given up")
        self._committing.__exit__(type(error), error, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.commit()
        else:
            self.abort(error)

    def write(self, start: int, rows_ND: npt.NDArray[Any], valid_N: npt.NDArray[np.bool_] | None = None) -> None:
        """Writes the features of tiles ``start``, ``start + 1``...

        Args:
            start: number of the first tile.
            rows_ND: its feature and those of the next tiles; rounded to the type of the file.
            valid_N: which of the tiles could be read, default all. Features of the others are stored as zeros.

        Raises:
            StoreError: a feature is not finite, a row is written twice or is none of the file's, or the drive is full or fails.
        """
        here, rows = slice(start, start + len(rows_ND)), len(self._valid)
        if rows_ND.shape[1:] != (self.dim,) or not 0 <= start <= here.stop <= rows:
            raise self._error(f"rows {start} to {here.stop} of shape {rows_ND.shape} for features [{rows}, {self.dim}]")
        if not np.all(self._valid[here] == _UNWRITTEN):
            raise self._error(f"rows {start} to {here.stop} hold rows that were written before")
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused below
            values = np.array(rows_ND, dtype=self.dtype, order="C")
        valid = np.ones(len(values), dtype=np.uint8) if valid_N is None else np.asarray(valid_N, dtype=bool).astype(np.uint8)
        values[valid == 0] = 0
        if len(wrong := _not_finite(values)):
            what = f"features are not finite as {self.dtype.name}: tile {start + wrong[0]}"
            raise self._error(what, "try extract.precision: fp32, dtype: float32")
        self._valid[here] = valid
        self._crc32[here] = _checksums(values, self._coords[here], valid)
        self._put("features", values, start)

    @contextmanager
    def _committed(self) -> Iterator[None]:
        with commit_file(self.path, self._check) as temporary:
            # One layout, whatever the version of HDF5.
            self._starts = write_hdf5(temporary, ("v110", "v110"), self._lay_out)
            self._handle = os.open(temporary, os.O_WRONLY)
            try:
                yield
                crash_point("store.feature_file.between_datasets")
                self._finish()
            finally:
                os.close(self._handle)

    def _lay_out(self, file: h5py.File) -> dict[str, int]:
        """Fills the file but for its data, and says where in it the data of each dataset start."""
        shapes = {"features": (len(self._valid), self.dim), "coords": self._coords.shape}
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        created.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        created.set_obj_track_times(False)  # the same features give the same bytes
        starts = {}
        for name, types in TYPES.items():
            kind = h5py.h5t.py_create(self.dtype if name == "features" else np.dtype(types[0]))
            space = h5py.h5s.create_simple(shapes.get(name, self._valid.shape))
            starts[name] = h5py.h5d.create(file.id, name.encode(), kind, space, created).get_offset() or 0
        for name, value in sorted(self._attrs.items()):
            _put_attribute(file, name, value)
        return starts

    def _finish(self) -> None:
        left_out = np.flatnonzero(self._valid == _UNWRITTEN)
        if len(left_out):
            raise self._error(f"{len(left_out)} of {len(self._valid)} rows were not written, the first is {left_out[0]}")
        for name, values in (("coords", self._coords), ("valid", self._valid), ("crc32", self._crc32)):
            self._put(name, values)

    def _put(self, name: str, values: npt.NDArray[Any], row: int = 0) -> None:
        data, start = _raw(values), self._starts[name]
        start += row * values.strides[0] if len(data) else 0
        with disk_errors(self.path, self._check):
            while data:
                written = os.pwrite(self._handle, data, start)
                data, start = data[written:], start + written

    def _error(self, what: str, fix: str = "") -> StoreError:
        return StoreError(what, where=str(self.path), fix=fix)


def write_features(
    path: Path, features: npt.NDArray[Any], coords: npt.NDArray[np.int64], attrs: Mapping[str, Attribute]
) -> None:
    """Writes a feature file from features held in memory: float16 stays, everything else becomes float32.

    Raises:
        StoreError: as ``FeatureWriter``.
    """
    rows, dim = features.shape
    with FeatureWriter(path, rows, dim, "float16" if features.dtype == np.float16 else "float32", coords, attrs) as writer:
        writer.write(0, features)


def open_features(path: Path | str) -> FeatureFile:
    """Reads and verifies a feature file: every row against its checksum.

    Raises:
        StoreError: absent, damaged, of another tool, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError("no feature file", where=str(path), fix="run `pathfm extract` first")
    try:
        with h5py.File(path, "r") as file:
            attrs = _checked_attrs(path, file)
            rows = _read_rows(file, np.arange(file["features"].shape[0]), slice(None))
    except DAMAGE as error:
        raise StoreError("damaged feature file", where=str(path), fix=REDO) from error
    _check_rows(path, rows)
    return FeatureFile(rows.features, rows.coords, rows.valid != 0, attrs)


def read_feature_attrs(path: Path) -> dict[str, Any] | None:
    """Attributes of a feature file after a quick look, None when it is absent, cut short, filled with zeros or NaN, or foreign.

    The look takes in everything but the data, and the checksums of a few rows; ``open_features`` compares all of them.
    """
    for _ in range(2):  # a network drive loses a file that another machine replaces while it is read: the new one is looked at
        try:
            with h5py.File(path, "r") as file:
                attrs = _checked_attrs(path, file)
                last = file["features"].shape[0] - 1
                some = np.unique(np.linspace(0, last, LOOKED_AT).round().astype(np.int64)) if last >= 0 else np.arange(0)
                _check_rows(path, _read_rows(file, some, some))
                return attrs
        except FileNotFoundError:
            return None
        except (StoreError, *DAMAGE):
            continue
    return None


class _Rows(NamedTuple):
    """Some rows of a file, as stored; version 1 has no checksums."""

    numbers: npt.NDArray[np.int64]
    features: npt.NDArray[Any]
    coords: npt.NDArray[np.int64]
    valid: npt.NDArray[np.uint8]
    crc32: npt.NDArray[np.uint32] | None


def _read_rows(file: h5py.File, numbers: npt.NDArray[np.int64], where: slice | npt.NDArray[np.int64]) -> _Rows:
    features, coords = file["features"][where], file["coords"][where]
    if "crc32" not in file:
        return _Rows(numbers, features, coords, np.ones(len(features), dtype=np.uint8), None)
    return _Rows(numbers, features, coords, file["valid"][where], file["crc32"][where])


def _checked_attrs(path: Path, file: h5py.File) -> dict[str, Any]:
    """The attributes of a file whose datasets are those of its version, and fit each other and what the attributes say."""
    attrs: dict[str, Any] = {name: _plain(value) for name, value in file.attrs.items()}
    if attrs.get("format") != FORMAT:
        fix = "files of other tools: pathfm.store.interop.features.read_features"
        raise StoreError("not a pathfm feature file", where=str(path), fix=fix)
    if attrs["version"] > VERSION:
        what = f"written by a newer pathfm (format version {attrs['version']})"
        raise StoreError(what, where=str(path), fix="upgrade pathfm")
    rows, dim = file["features"].shape
    shapes = {"features": (rows, dim), "coords": (rows, 2), "valid": (rows,), "crc32": (rows,)}
    for name in TYPES if attrs["version"] > 1 else ("features", "coords"):
        if file[name].shape != shapes[name] or file[name].dtype.str not in TYPES[name]:
            what = f"{name} {file[name].shape} {file[name].dtype} do not fit features {(rows, dim)}"
            raise StoreError(what, where=str(path), fix=REDO)
    _check_dim(path, dim, attrs)
    return attrs


def _check_dim(path: Path, dim: int, attrs: Mapping[str, Any]) -> None:
    for name in DIMENSIONS:
        if name in attrs and str(attrs[name]) != str(dim):
            raise StoreError(f"features of length {dim}, where {name} says {attrs[name]}", where=str(path), fix=REDO)


def _check_rows(path: Path, rows: _Rows) -> None:
    """Refuses rows that are not finite, or not what was written."""
    wrong, what = _not_finite(rows.features), "features that are not finite"
    if not len(wrong) and rows.crc32 is not None:
        wrong, what = np.flatnonzero(_checksums(rows.features, rows.coords, rows.valid) != rows.crc32), "damaged features"
    if len(wrong):
        raise StoreError(f"{what}: {len(wrong)} rows, the first is {rows.numbers[wrong[0]]}", where=str(path), fix=REDO)


def _not_finite(values_ND: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Numbers of the rows with NaN or infinity."""
    bits, exponent = ("<u2", 0x7C00) if values_ND.itemsize == 2 else ("<u4", 0x7F800000)
    odd = np.zeros(len(values_ND), dtype=bool)
    for start in range(0, len(values_ND), BLOCK_ROWS):  # blocks keep what is compared in the cache; bits, as float16 is slow
        block: npt.NDArray[np.unsignedinteger[Any]] = values_ND[start : start + BLOCK_ROWS].view(bits)
        odd[start : start + BLOCK_ROWS] = ((block & exponent) == exponent).any(axis=1)
    return np.flatnonzero(odd)


def _checksums(
    features_ND: npt.NDArray[Any], coords: npt.NDArray[np.int64], valid: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint32]:
    """CRC-32 per tile over the bytes of its feature, its coordinates and its validity."""
    rows, width, rest = len(valid), features_ND.strides[0], coords.itemsize * 2 + 1
    data = _raw(np.ascontiguousarray(features_ND))
    tails = np.concatenate([np.ascontiguousarray(coords).view(np.uint8), valid[:, None]], axis=1)
    tail = _raw(tails)
    sums = (
        zlib.crc32(tail[row * rest : (row + 1) * rest], zlib.crc32(data[row * width : (row + 1) * width]))
        for row in range(rows)
    )
    return np.fromiter(sums, dtype="<u4", count=rows)


def _raw(values: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _put_attribute(file: h5py.File, name: str, value: Attribute) -> None:
    """Text of a fixed length lies in the attribute itself, under HDF5's checksum; other text lies where nothing guards it."""
    if isinstance(value, str):
        data = value.encode()
        file.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", max(len(data), 1)))
    else:
        file.attrs[name] = value


def _plain(value: object) -> object:
    plain = value.item() if isinstance(value, np.generic) else value
    return plain.decode() if isinstance(plain, bytes) else plain
