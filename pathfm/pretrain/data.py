"""Batches of crops over many tile stores. Batch ``step`` is a pure function of (seed, step): nothing to remember on resume.

Shapes: B tiles of a batch, L local crops per tile, P patches of a global crop, M masked patches. Crops are view-major: rows
0..B-1 are the first view of each tile, and so on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pathfm.errors import TrainingError
from pathfm.pretrain.colour import draw_colour
from pathfm.pretrain.masking import batch_masks
from pathfm.pretrain.views import Pixels, cut_views
from pathfm.store.tile_store import open_tiles
from pathfm.study import PretrainSettings

Indices = npt.NDArray[np.int64]

ORDER, SUBSET, CROPS, MASKS, COLOUR = range(5)
"""First word of each random key, so that no two kinds of draw share a stream."""
FEISTEL_ROUNDS = 6
OPEN_STORES = 12
"""Stores kept open by one process; each may hold a few dozen files."""


class Tiles(Protocol):
    """What this file needs of a tile store."""

    slide_id: str

    def __len__(self) -> int:
        """Tiles in the store."""

    def read(self, indices: Sequence[int]) -> Pixels:
        """Tiles [n, H, W, 3]."""


class Batch(NamedTuple):
    """Everything a training step needs from outside; colours are applied on the training device.

    Attributes:
        global_crops: uint8 [2B, H, H, 3].
        local_crops: uint8 [L * B, h, h, 3].
        global_colour: float32 [2B, DRAWS].
        local_colour: float32 [L * B, DRAWS].
        masks_CP: bool [2B, P], True is hidden from the student.
        masked_M: int64, positions of the hidden patches in ``masks_CP.flatten()``.
        weight_M: float32, 1 / (hidden patches of the patch's crop).
    """

    global_crops: Tensor
    local_crops: Tensor
    global_colour: Tensor
    local_colour: Tensor
    masks_CP: Tensor
    masked_M: Tensor
    weight_M: Tensor


def permuted(index: Indices, length: int, key: tuple[int, ...]) -> Indices:
    """Where a pseudo-random permutation of ``range(length)`` sends ``index``, without storing the permutation.

    A Feistel network over the next power of four, walked until it lands inside (Black & Rogaway 2002).
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = np.random.default_rng(key).integers(2**63, size=FEISTEL_ROUNDS, dtype=np.uint64)

    def shuffled(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> half, value & low
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        return left << half | right

    value = shuffled(np.atleast_1d(index).astype(np.uint64))
    while (outside := value >= length).any():
        value[outside] = shuffled(value[outside])
    return value.astype(np.int64)


def _mixed(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class TileBatches(Dataset[Batch]):
    """Batch ``step`` of the endless sequence: every epoch a new order of all tiles, its incomplete last batch dropped.

    Args:
        paths: tile stores; their order does not matter.
        settings: batch, crops, masks, cap per slide, seed.
        grid_side: patches along a side of a global crop.
        opener: opens a store; it is called again in every worker process.

    Attributes:
        used: slide_id and number of used tiles of every store, in slide_id order.
        tiles: used tiles altogether.

    Raises:
        TrainingError: there are fewer tiles than a batch needs.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        settings: PretrainSettings,
        grid_side: int,
        opener: Callable[[Path], Tiles] = open_tiles,
    ) -> None:
        self._settings, self._grid_side, self._opener = settings, grid_side, opener
        found = sorted(((store.slide_id, path, len(store)) for store, path in ((opener(path), path) for path in paths)))
        self._paths = [path for _, path, _ in found]
        self._lengths = [length for _, _, length in found]
        self.used = [(slide_id, min(length, settings.max_tiles_per_slide or length)) for slide_id, _, length in found]
        self._starts = np.cumsum([0, *(count for _, count in self.used)])
        self._open: OrderedDict[int, Tiles] = OrderedDict()
        self.tiles = int(self._starts[-1])
        if self.tiles < settings.batch_size:
            raise TrainingError(
                f"{self.tiles} tiles in {len(paths)} stores are fewer than one batch of {settings.batch_size}",
                where="pretrain.batch_size",
                fix="lower it, or add slides",
            )

    def sources(self, step: int) -> list[tuple[int, int]]:
        """Store number (in slide_id order) and tile number of each sample of a batch."""
        epoch, batch = divmod(step, self.tiles // self._settings.batch_size)
        position = np.arange(self._settings.batch_size) + batch * self._settings.batch_size
        flat = permuted(position, self.tiles, (ORDER, self._settings.seed, epoch))
        store = np.searchsorted(self._starts, flat, side="right") - 1
        return [self._tile(*pair) for pair in zip(store.tolist(), (flat - self._starts[store]).tolist(), strict=True)]

    def _tile(self, store: int, rank: int) -> tuple[int, int]:
        """The ``rank``-th used tile of a store: a fixed random subset when the slide has more than the cap."""
        cap = self._settings.max_tiles_per_slide
        if cap is None or self._lengths[store] <= cap:
            return store, rank
        chosen = permuted(np.array([rank]), self._lengths[store], (SUBSET, self._settings.seed, store))
        return store, int(chosen[0])

    def _store(self, number: int) -> Tiles:
        if number not in self._open:
            self._open[number] = self._opener(self._paths[number])
            if len(self._open) > OPEN_STORES:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, object]:
        # Open files do not cross a process border; each worker opens its own.
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, step: int) -> Batch:
        settings, crops = self._settings, self._settings.crops
        size = settings.batch_size
        global_crops = np.empty((2, size, crops.global_px, crops.global_px, 3), dtype=np.uint8)
        local_crops = np.empty((crops.local_count, size, crops.local_px, crops.local_px, 3), dtype=np.uint8)
        for sample, (store, tile) in enumerate(self.sources(step)):
            random = np.random.default_rng((CROPS, settings.seed, step, sample))
            global_crops[:, sample], locals_of_tile = cut_views(self._store(store).read([tile])[0], crops, random)
            if locals_of_tile:
                local_crops[:, sample] = locals_of_tile
        colour = draw_colour(crops, size, np.random.default_rng((COLOUR, settings.seed, step)))
        masks_CP = batch_masks(
            2 * size, self._grid_side, settings.mask_probability, settings.mask_ratio, (MASKS, settings.seed, step)
        )
        weight_CP = masks_CP / np.maximum(masks_CP.sum(axis=1, keepdims=True), 1)
        return Batch(
            torch.from_numpy(global_crops).flatten(0, 1),
            torch.from_numpy(local_crops).flatten(0, 1),
            torch.from_numpy(colour[:2]).flatten(0, 1),
            torch.from_numpy(colour[2:]).flatten(0, 1),
            torch.from_numpy(masks_CP),
            torch.from_numpy(np.flatnonzero(masks_CP)),
            torch.from_numpy(weight_CP[masks_CP].astype(np.float32)),
        )


def load_batches(batches: TileBatches, steps: range, workers: int, pin: bool = False) -> DataLoader[Batch]:
    """The batches of ``steps`` in order, made by worker processes (0: by this one).

    Workers start from a fresh server process: forking one that already runs threads can hang.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_quiet_worker if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=2 if workers else None,
    )


def _quiet_worker(_: int) -> None:
    # One process per core already; threads inside would only fight over them.
    cv2.setNumThreads(1)
