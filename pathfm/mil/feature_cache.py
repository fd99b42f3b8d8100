"""Features of all slides within a stated memory budget: each file is checked once, then read as often as epochs need it.

Nothing is mapped into memory: mapped pages count as memory of the process, and nobody decides when they go. What fits the
budget stays in memory; the rest is read where it lies contiguously, or from a copy that does (made once, in ``scratch``).

Legend: N tiles, D feature length.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import StoreError
from pathfm.log import say
from pathfm.store.commit import disk_errors
from pathfm.store.feature_file import open_features
from pathfm.store.feature_place import FeaturePlace, file_stamp, find_place, read_place

BLOCK_ROWS = 512
"""Rows that are looked at together: few enough to stay in the processor's cache as float64."""
NO_MATTER = ("recipe_encoder", "recipe_card", "recipe_hash", "recipe_arithmetic", "recipe_compiled")
"""What of a recipe may differ between machines: the name of a folder, and the ways to compute in half precision, all of which
keep ``extract.min_fidelity``."""

Features = NDArray[Any]


class Foreign(Protocol):
    """What a reader of another tool's file gives (``pathfm.store.interop.ForeignFeatures`` is one)."""

    @property
    def tool(self) -> str:
        """Who wrote the file."""

    @property
    def features(self) -> NDArray[Any]:
        """[N, D] float16 or float32, all finite."""

    @property
    def coords(self) -> NDArray[np.float64] | None:
        """[N, 2] upper left corners in level-0 pixels."""

    @property
    def side_level0(self) -> float | None:
        """Side of a tile in level-0 pixels."""

    @property
    def encoder(self) -> str | None:
        """The tool's name for the encoder."""


@dataclass(frozen=True)
class SlideFacts:
    """What is known of a slide's features without holding them.

    Attributes:
        slide_id: the slide.
        dim: feature length D.
        dtype: float16 or float32, as stored.
        digest: SHA-256 over the values of the tiles that are used.
        row_hashes: [N] uint64 of each feature, rounded to float16 so that a copy in the other type has the same.
        sum_D: sum of the features, float64.
        square_D: sum of their squares, float64.
        corner_N2: see ``xy_level0``; int32 where they are whole numbers, since all slides' are held at the same time.
        used_N: see ``kept``; None: all of them.
        file_rows: rows of the file.
        tile_side_level0: width and height of what a tile covers, in level-0 pixels; from the grid where nothing says it.
        encoder: what made the features; equal for features that may be mixed.
    """

    slide_id: str
    dim: int
    dtype: np.dtype[Any]
    digest: str
    row_hashes: NDArray[np.uint64]
    sum_D: NDArray[np.float64]
    square_D: NDArray[np.float64]
    corner_N2: NDArray[np.int32] | NDArray[np.float64] | None
    used_N: NDArray[np.int64] | None
    file_rows: int
    tile_side_level0: tuple[float, float]
    encoder: Mapping[str, str]

    def __len__(self) -> int:
        return self.file_rows if self.used_N is None else len(self.used_N)

    @property
    def xy_level0(self) -> NDArray[np.float64] | None:
        """Upper left corners of the tiles [N, 2] in level-0 pixels; None where a foreign file does not say."""
        return None if self.corner_N2 is None else self.corner_N2.astype(np.float64)

    @property
    def kept(self) -> NDArray[np.int64]:
        """Rows [N] of the file that are used: those whose pixels could be read."""
        return np.arange(self.file_rows) if self.used_N is None else self.used_N

    @property
    def mean_D(self) -> NDArray[np.float64]:
        """Mean feature."""
        return self.sum_D / max(len(self), 1)

    @property
    def nbytes(self) -> int:
        """Memory for all this."""
        values = (self.row_hashes, self.sum_D, self.square_D, self.corner_N2, self.used_N)
        return sum(value.nbytes for value in values if value is not None)


class FeatureCache:
    """Features by slide, checked when added, read any number of times; a context manager, whose end frees memory and scratch.

    Args:
        budget_bytes: memory for what stays: the facts of all slides, and features in the order in which slides are added, as
            far as they fit.
        scratch: folder for contiguous copies; made when needed.
    """

    def __init__(self, budget_bytes: int, scratch: Path) -> None:
        self.budget_bytes, self.scratch = budget_bytes, scratch
        self.facts: dict[str, SlideFacts] = {}
        self.facts_bytes = self.pinned_bytes = self.bytes_read = self.bytes_from_disk = 0
        self.repacked: list[str] = []
        self._pinned: dict[str, Features] = {}
        self._sources: dict[str, tuple[Path, Callable[[Path], Foreign] | None]] = {}
        self._places: dict[str, FeaturePlace] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Frees memory and scratch; ``facts`` stay."""
        self._pinned.clear()
        self._places.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def add(self, slide_id: str, path: Path, read: Callable[[Path], Foreign] | None = None) -> SlideFacts:
        """Checks a feature file in one pass, and decides where its features are read from. Adding a slide again replaces it.

        Args:
            slide_id: the slide.
            path: its file, of this study unless ``read`` is given.
            read: reader of another tool's files.

        Raises:
            StoreError: absent, damaged, foreign, a value that is not finite, or no room for the contiguous copy.
        """
        opened = _open(path, read)
        used_ND = opened.features if opened.kept is None else opened.features[opened.kept]
        self._forget(slide_id)
        facts = self.facts[slide_id] = _facts(slide_id, opened, used_ND)
        self.facts_bytes += facts.nbytes
        self._sources[slide_id] = (path, read)
        if self.facts_bytes + self.pinned_bytes + used_ND.nbytes <= self.budget_bytes:
            self._pinned[slide_id] = np.ascontiguousarray(used_ND)
            self.pinned_bytes += used_ND.nbytes
        else:
            self._places[slide_id] = self._place(slide_id, path, opened.features)
            self._make_room()
        return facts

    def read(self, slide_id: str) -> Features:
        """Features [N, D] of a slide, float16 or float32 as stored, not to be written to; threads may call this at once.

        Raises:
            StoreError: the file has gone or changed.
        """
        facts, pinned_ND = self.facts[slide_id], self._pinned.get(slide_id)
        if pinned_ND is None:
            values_ND: Features = read_place(self._places[slide_id])
            if len(facts) < facts.file_rows:
                values_ND = values_ND[facts.kept]
        else:
            values_ND = pinned_ND
        with self._lock:
            self.bytes_read += values_ND.nbytes
            self.bytes_from_disk += values_ND.nbytes if pinned_ND is None else 0
        return values_ND

    def _forget(self, slide_id: str) -> None:
        old_ND, facts = self._pinned.pop(slide_id, None), self.facts.pop(slide_id, None)
        self.pinned_bytes -= 0 if old_ND is None else old_ND.nbytes
        self.facts_bytes -= 0 if facts is None else facts.nbytes

    def _make_room(self) -> None:
        """Facts come in with every slide, also when memory is full: then features that came last are read from disk again."""
        while self._pinned and self.facts_bytes + self.pinned_bytes > self.budget_bytes:
            slide_id, pinned_ND = self._pinned.popitem()
            self.pinned_bytes -= pinned_ND.nbytes
            path, read = self._sources[slide_id]
            self._places[slide_id] = self._place(slide_id, path, _open(path, read).features)

    def _place(self, slide_id: str, path: Path, values_ND: Features) -> FeaturePlace:
        """Where the rows of a file are read from: from itself if they lie there in one piece as they are, else from a copy."""
        place = find_place(path)
        if place is None or place.shape != values_ND.shape or place.dtype != values_ND.dtype:
            return self._repack(slide_id, values_ND)
        pairs = zip(_blocks(read_place(place)), _blocks(values_ND), strict=True)
        return place if all(np.array_equal(*pair) for pair in pairs) else self._repack(slide_id, values_ND)

    def _repack(self, slide_id: str, values_ND: Features) -> FeaturePlace:
        if self._folder is None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="features-", dir=self.scratch)
            say("features lie in small or compressed chunks, which are slow to read: they are copied once, contiguously")
        copy = Path(self._folder.name) / f"{len(self.repacked)}.raw"
        with disk_errors(copy):
            np.ascontiguousarray(values_ND).tofile(copy)
        self.repacked.append(slide_id)
        rows, dim = values_ND.shape
        return FeaturePlace(copy, 0, (rows, dim), values_ND.dtype, file_stamp(copy.stat()))


def encoder_identity(attrs: Mapping[str, object]) -> dict[str, str]:
    """What must agree before features of two files are mixed: the recipe, with the weights' hash in place of their name."""
    recipe = {name: str(value) for name, value in attrs.items() if name.startswith("recipe_")}
    if "recipe_weights_sha256" in recipe:
        for name in NO_MATTER:
            recipe.pop(name, None)
    return recipe


class _Opened(NamedTuple):
    """A file as it was read: all rows, and which of them are used (None: all)."""

    features: Features
    kept: NDArray[np.int64] | None
    xy_level0: NDArray[np.float64] | None
    side_level0: tuple[float, float] | None
    encoder: Mapping[str, str]


def _open(path: Path, read: Callable[[Path], Foreign] | None) -> _Opened:
    return _open_own(path) if read is None else _open_foreign(path, read(path))


def _open_own(path: Path) -> _Opened:
    file = open_features(path)
    width = file.attrs.get("tile_side_level0")
    side = None if width is None else (float(width), float(file.attrs.get("tile_height_level0", width)))
    kept = None if file.valid.all() else np.flatnonzero(file.valid)
    return _Opened(file.features, kept, file.coords.astype(np.float64), side, encoder_identity(file.attrs))


def _open_foreign(path: Path, foreign: Foreign) -> _Opened:
    if foreign.features.dtype not in (np.float16, np.float32) or foreign.features.ndim != 2:
        raise StoreError(f"features of shape {foreign.features.shape}, {foreign.features.dtype}", where=str(path))
    side = None if foreign.side_level0 is None else (foreign.side_level0, foreign.side_level0)
    return _Opened(foreign.features, None, foreign.coords, side, {"tool": foreign.tool, "encoder": foreign.encoder or ""})


def _facts(slide_id: str, opened: _Opened, used_ND: Features) -> SlideFacts:
    xy_level0 = opened.xy_level0
    if xy_level0 is not None and opened.kept is not None:
        xy_level0 = xy_level0[opened.kept]
    digest = hashlib.sha256(np.ascontiguousarray(used_ND).data)
    digest.update(f"{used_ND.dtype}{used_ND.shape}".encode())
    sum_D, square_D = _sums(used_ND)
    return SlideFacts(
        slide_id,
        used_ND.shape[1],
        used_ND.dtype,
        digest.hexdigest(),
        _row_hashes(used_ND),
        sum_D,
        square_D,
        _compact(xy_level0),
        opened.kept,
        len(opened.features),
        opened.side_level0 or _grid_steps(xy_level0),
        opened.encoder,
    )


def _compact(xy_level0: NDArray[np.float64] | None) -> NDArray[np.int32] | NDArray[np.float64] | None:
    """The same numbers, as int32 if they can be."""
    if xy_level0 is None:
        return None
    with np.errstate(invalid="ignore"):
        whole = xy_level0.astype(np.int32)
    return whole if np.array_equal(whole, xy_level0) else xy_level0


def _blocks(values_ND: Features) -> list[Features]:
    return [values_ND[start : start + BLOCK_ROWS] for start in range(0, len(values_ND), BLOCK_ROWS)]


def _sums(values_ND: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of the columns and of their squares."""
    sum_D, square_D = np.zeros((2, values_ND.shape[1]))
    for block in _blocks(values_ND):
        block_ND = block.astype(np.float64)
        sum_D += block_ND.sum(axis=0)
        square_D += np.einsum("nd,nd->d", block_ND, block_ND)
    return sum_D, square_D


def _row_hashes(values_ND: Features) -> NDArray[np.uint64]:
    """Multilinear hash (Carter and Wegman) of each row's float16 bits, four at a time, with fixed random odd factors."""
    words = -(-values_ND.shape[1] // 4)
    factor_W = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, words, dtype=np.uint64) | np.uint64(1)
    hash_N = np.empty(len(values_ND), np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, len(values_ND), BLOCK_ROWS):
            block_ND = values_ND[start : start + BLOCK_ROWS].astype("<f2")
            padded = np.zeros((len(block_ND), 4 * words), "<f2")
            padded[:, : block_ND.shape[1]] = block_ND
            word_NW = padded.view("<u8")
            # The low bits of a product know nothing of the high bits of its factors, so these are folded in first.
            mixed_NW = (word_NW ^ (word_NW >> np.uint64(32))) * factor_W
            hash_N[start : start + BLOCK_ROWS] = (mixed_NW ^ (mixed_NW >> np.uint64(29))).sum(axis=1, dtype=np.uint64)
    return hash_N


def _grid_steps(xy_level0: NDArray[np.float64] | None) -> tuple[float, float]:
    """Smallest steps between columns and rows of tiles, which is the tile where tiles touch; 1 where there is no step."""
    if xy_level0 is None:
        return 1.0, 1.0
    steps = [np.diff(np.unique(xy_level0[:, axis])) for axis in (0, 1)]
    known = [float(step.min()) for step in steps if len(step)]
    width, height = (float(step.min()) if len(step) else min(known, default=1.0) for step in steps)
    return width, height
