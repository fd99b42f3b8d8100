"""Batches through the networks: copied, encoded and brought back without the device ever waiting for the host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pathfm.errors import UsageError
from pathfm.extract.tiles import Batch, Batches
from pathfm.extract.writing import WriterThread
from pathfm.log import say, track

TOGETHER = 8
"""Batches are filled up to a multiple of this. Kernels for other counts round differently in convolutional networks; so
filled, the features of a tile do not depend on what else is in its batch."""
LARGEST, LARGEST_BYTES = 1024, 2**28
"""Tiles of a batch on a GPU and bytes of their pixels, at most: more gain nothing."""
NO_MEMORY = ("not enough memory", "can't allocate memory", "ALLOC_FAILED", "CUDA error: out of memory")
"""What else libraries say when memory runs out."""
ON_CPU = 16
"""Tiles of a batch on a CPU: more leave its caches."""

DeviceEncode = Callable[[torch.Tensor], torch.Tensor]
"""Features, float32 [B, ...], of tiles uint8 [B, H, W, 3], both on the device."""


class OutOfMemoryError(UsageError):
    """Not even the smallest batch fits."""


@dataclass
class Pace:
    """How fast a stream was.

    Attributes:
        started: when it began (monotonic) [s].
        first_s: until the first batch had been encoded [s].
        waited_s: of the time after that, spent waiting for tiles [s].
        tiles: encoded.
        ended: when it ended (monotonic) [s].
    """

    started: float = field(default_factory=time.monotonic)
    first_s: float = 0.0
    waited_s: float = 0.0
    tiles: int = 0
    ended: float = 0.0

    def __str__(self) -> str:
        seconds = max(self.ended - self.started, 1e-9)
        waited = 100 * self.waited_s / seconds
        rate = f"{self.tiles / seconds:,.0f} tiles per second"
        return f"{rate}, first batch after {self.first_s:.1f} s, waited for tiles {waited:.0f} % of the time"


class _Pending(NamedTuple):
    batch: Batch
    features: Mapping[int, torch.Tensor]
    copied: torch.cuda.Event | None


class Device:
    """Runs encoders on one device, in smaller pieces from the first time that its memory does not hold a batch.

    Args:
        device: where.
        encoders: by feature set.
    """

    def __init__(self, device: torch.device, encoders: Mapping[int, DeviceEncode]) -> None:
        self._device, self._encoders = device, encoders
        self._limit = LARGEST * TOGETHER

    @property
    def is_gpu(self) -> bool:
        """Whether it works beside the host."""
        return self._device.type == "cuda"

    def fitting_size(self, wanted: int, tile_px: int) -> int:
        """Tiles per batch: the wanted number, or with 0 what suits a CPU or the memory of a GPU."""
        if wanted or not self.is_gpu:
            return wanted or ON_CPU
        largest = min(LARGEST, LARGEST_BYTES // (3 * tile_px**2)) // TOGETHER * TOGETHER
        self._limit = max(largest, TOGETHER)
        for number in self._encoders:
            self._encoded(number, torch.zeros((self._limit, tile_px, tile_px, 3), dtype=torch.uint8))
        return self._limit

    def begin(self, batch: Batch) -> _Pending:
        """Starts the work on a batch; the result is there after ``finish``."""
        wanted = {number for work, _, _ in batch.segments if work.error is None for number in work.sets}
        tiles = batch.tiles[: -(-batch.count // TOGETHER) * TOGETHER]
        there: list[torch.Tensor] = []
        features = {
            number: self._encoded(number, tiles, there)[: batch.count] for number in sorted(wanted & self._encoders.keys())
        }
        if not self.is_gpu:
            return _Pending(batch, features, None)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = {number: _on_host(values) for number, values in features.items()}
        copied.record(torch.cuda.current_stream(self._device))
        return _Pending(batch, host, copied)

    def _encoded(self, number: int, tiles: torch.Tensor, there: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Features of tiles of the host; ``there`` keeps what was copied for the encoders after this one."""
        there = [] if there is None else there
        while True:
            try:
                there[:] = there or [tiles.to(self._device, non_blocking=True)]
                found = torch.cat([self._encoders[number](part) for part in torch.split(there[0], self._limit)])
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
            else:
                return _checked(found, len(tiles))
            self._halve(len(tiles))

    def _halve(self, tiles: int) -> None:
        smaller = min(self._limit, tiles) // 2 // TOGETHER * TOGETHER
        if smaller < TOGETHER:
            what = f"the encoder does not fit into the memory of {self._device} with {TOGETHER} tiles"
            raise OutOfMemoryError(what, where="compute.device", fix="use a smaller encoder, half precision or another device")
        say(f"memory of {self._device} does not hold {min(self._limit, tiles)} tiles at once: going on with {smaller}")
        self._limit = smaller
        if self.is_gpu:
            torch.cuda.empty_cache()


def _checked(features: torch.Tensor, tiles: int) -> torch.Tensor:
    if len(features) != tiles:
        what = f"the encoder gives {len(features)} vectors for {tiles} tiles"
        raise UsageError(what, where="extract.encoder", fix="return one vector per tile, in their order")
    return features


def _on_host(values: torch.Tensor) -> torch.Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)


def run_stream(batches: Batches, device: Device, writer: WriterThread, total_batches: int) -> Pace:
    """Encodes all batches and hands their rows to the writer; on a GPU one batch is computed while another is handed on."""
    pace, pending, asked = Pace(), deque[_Pending](), time.monotonic()
    for batch in track(batches, "extract (batches)", total_batches):
        pace.waited_s += time.monotonic() - asked if pace.tiles else 0.0
        pending.append(device.begin(batch))
        if len(pending) > device.is_gpu:
            _finish(pending.popleft(), batches, writer)
        pace.first_s = pace.first_s or time.monotonic() - pace.started
        pace.tiles += batch.count
        asked = time.monotonic()
    while pending:
        _finish(pending.popleft(), batches, writer)
    pace.ended = time.monotonic()
    return pace


def _finish(pending: _Pending, batches: Batches, writer: WriterThread) -> None:
    batch, features, copied = pending
    if copied is not None:
        copied.synchronize()
    for work, start, rows in batch.segments:
        if work.error is not None:
            writer.fail(work)
            continue
        unread = ~work.valid[start : start + rows.stop - rows.start]
        for number in work.sets:
            values = features[number][rows].numpy() if number in features else batch.host[number][rows]
            if unread.any():  # a row of what could not be read says nothing
                values = values.copy()
                values[unread] = 0
            writer.put(work, number, start, values)
    batches.release(batch)
