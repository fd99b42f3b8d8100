"""Batches of crops over many tile stores: pure functions of (seed, step), so that nothing need be remembered for going on.

A step's batch is cut into the parts that are computed one after another, and each part into those of the processes. What is
drawn for a sample depends on its number in the whole batch: however it is cut, the pieces together are the same.

Shapes: B samples of one piece, L local crops per tile, C = 2B global crops, P patches of a global crop, M masked patches. Crops
are view-major: rows 0..B-1 are the first view of each tile, and so on.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pathfm.errors import TrainingError, UsageError
from pathfm.pretrain.catalogue import Catalogue
from pathfm.pretrain.colour import draw_colour
from pathfm.pretrain.masking import batch_masks
from pathfm.pretrain.reading import Place, TileReader
from pathfm.pretrain.schedule import phase_start
from pathfm.pretrain.views import cut_views, larger_crops
from pathfm.pretrain_settings import CropSettings, PretrainSettings
from pathfm.workers import deaf, end_with_parent

CROPS, MASKS, COLOUR = range(16, 19)
"""First word of each random key, so that no two kinds of draw share a stream."""


class Batch(NamedTuple):
    """Everything one forward pass needs from outside; colours are applied on the training device.

    Attributes:
        global_crops: uint8 [2B, H, H, 3].
        local_crops: uint8 [L * B, h, h, 3].
        global_colour: float32 [2B, DRAWS].
        local_colour: float32 [L * B, DRAWS].
        masks_CP: bool [2B, P], True is hidden from the student.
        masked_M: int64, positions of the hidden patches in ``masks_CP.flatten()``.
        weight_M: float32, 1 / (hidden patches of the patch's crop).
        replaced: samples whose own tile is damaged.
    """

    global_crops: Tensor
    local_crops: Tensor
    global_colour: Tensor
    local_colour: Tensor
    masks_CP: Tensor
    masked_M: Tensor
    weight_M: Tensor
    replaced: int


class TileBatches(Dataset[Batch]):
    """Item ``step * accumulate + part`` is what one process computes of that part of that step.

    Args:
        catalogue: all tiles.
        settings: batch, sampling, masks, seed.
        crops: those of the first phase, that fit the tiles.
        patch_px: side of a patch of the backbone [px].
        rank: number of this process.
        world: how many processes train together.

    Raises:
        TrainingError: there are fewer tiles than a batch needs.
        UsageError: the batch cannot be cut into equal pieces, or the tiles have no room for high resolution.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        settings: PretrainSettings,
        crops: CropSettings,
        patch_px: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        pieces = settings.accumulate * world
        if settings.batch_size % pieces:
            what = f"a batch of {settings.batch_size} cannot be cut into {settings.accumulate} parts for {world} processes"
            raise UsageError(what, where="pretrain.batch_size", fix=f"use a multiple of {pieces}")
        self._reader = TileReader(catalogue, settings)
        if self._reader.epoch < settings.batch_size:
            raise TrainingError(
                f"{self._reader.epoch} tiles in {len(catalogue)} stores are fewer than one batch of {settings.batch_size}",
                where="pretrain.batch_size",
                fix="lower it, or add slides",
            )
        self._settings, self._patch_px, self._rank, self._world = settings, patch_px, rank, world
        self._crops, self._larger = crops, larger_crops(settings, crops, catalogue.tile_px, patch_px)

    def crops_at(self, step: int) -> CropSettings:
        """The crops of a step: larger ones in the high-resolution phase."""
        late = step >= phase_start(self._settings.high_resolution.start, self._settings.steps)
        return self._larger if late else self._crops

    def sources(self, step: int) -> list[tuple[str, int]]:
        """slide_id and tile number of every sample of a step's whole batch."""
        return [self._reader.source(place) for place in self._places(step, range(self._settings.batch_size))]

    def _places(self, step: int, samples: range) -> list[Place]:
        return self._reader.places(step * self._settings.batch_size + np.asarray(samples))

    def _samples(self, part: int) -> range:
        """Numbers of this process's samples of a part in the whole batch."""
        piece = part * self._world + self._rank
        size = self._settings.batch_size // (self._settings.accumulate * self._world)
        return range(piece * size, (piece + 1) * size)

    def __getitem__(self, number: int) -> Batch:
        settings = self._settings
        step, part = divmod(number, settings.accumulate)
        crops, samples = self.crops_at(step), self._samples(part)
        global_crops = np.empty((2, len(samples), crops.global_px, crops.global_px, 3), dtype=np.uint8)
        local_crops = np.empty((crops.local_count, len(samples), crops.local_px, crops.local_px, 3), dtype=np.uint8)
        replaced = 0
        for row, (sample, place) in enumerate(zip(samples, self._places(step, samples), strict=True)):
            tile, is_another = self._reader.read(place)
            replaced += is_another
            random = np.random.default_rng((CROPS, settings.seed, step, sample))
            cut_views(tile, crops, random, (global_crops[:, row], local_crops[:, row]))
        colour = draw_colour(crops, samples, (COLOUR, settings.seed, step))
        rows = [view * settings.batch_size + sample for view in range(2) for sample in samples]
        masks_CP = batch_masks(settings, crops.global_px // self._patch_px, rows, (MASKS, settings.seed, step))
        weight_CP = masks_CP / np.maximum(masks_CP.sum(axis=1, keepdims=True), 1)
        return Batch(
            torch.from_numpy(global_crops).flatten(0, 1),
            torch.from_numpy(local_crops).flatten(0, 1),
            torch.from_numpy(colour[:2]).flatten(0, 1),
            torch.from_numpy(colour[2:]).flatten(0, 1),
            torch.from_numpy(masks_CP),
            torch.from_numpy(np.flatnonzero(masks_CP)),
            torch.from_numpy(weight_CP[masks_CP].astype(np.float32)),
            replaced,
        )


def load_batches(batches: TileBatches, numbers: range, workers: int, pin: bool = False) -> DataLoader[Batch]:
    """The items ``numbers`` in order, made by worker processes (0: by this one).

    Workers start from a fresh server process: forking one that already runs threads can hang. It has imported this file, so
    that they start at once and share its memory.
    """
    context = multiprocessing.get_context("forkserver") if workers else None
    if context:
        context.set_forkserver_preload([__name__])
        for start in (resource_tracker.ensure_running, forkserver.ensure_running):
            deaf(start)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_quiet_worker if workers else None,
        multiprocessing_context=context,
        prefetch_factor=2 if workers else None,
    )


def next_batch(batches: Iterator[Batch]) -> Batch:
    """The next batch.

    Raises:
        TrainingError: a process that makes them was killed.
    """
    try:
        return next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        fix = "often too little memory: fewer compute.workers need less; the same command again goes on"
        raise TrainingError("a process that makes batches was killed", where="pretrain", fix=fix) from error


@atexit.register
def _end_workers() -> None:
    # They do not heed the SIGTERM that ends such processes when Python does, and would be waited for forever.
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _quiet_worker(_: int) -> None:
    # Signals from the scheduler are for the process that trains; it ends the workers when it has saved.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # One process per core already; threads inside would only fight over them.
    cv2.setNumThreads(1)
    # A parent that is killed would leave it waiting for ever, with whatever pipes it has inherited.
    threading.Thread(target=end_with_parent, daemon=True).start()
