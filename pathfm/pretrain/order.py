"""Which tile is the g-th sample of a run: arithmetic only, so that nothing need be remembered for going on.

All tiles lie on a line. A slide holds a stretch as wide as the draws it gets per epoch, and an epoch visits every whole step of
the line once. Equally spaced steps take from each slide its share to within one draw, and of its tiles each equally often: with
widths equal to the numbers of tiles, each exactly once. Steps that follow each other lie in one shard file. So they are visited
in runs: each window takes one run from each of many equal stretches of the line, and is shuffled whole.

Shapes: E entries (a slide at one resolution), B samples. Widths are whole multiples of 2^-16 draws, so that sums are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pathfm.pretrain_settings import SamplingSettings

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

UNIT_BITS = 16
"""A draw is 2^16 units of width."""
UNIT = 1 << UNIT_BITS
GOLDEN = 40_503
"""2^16 over the golden ratio: multiples of it fill the units of a draw more evenly than random numbers."""
STEP = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, as in splitmix64: what is hashed from keys that differ by it has nothing in common."""
FEISTEL_ROUNDS = 6
LINE, WINDOW, RUNS, BLOCKS, TILES, KEPT, PLACE = range(7)
"""First word of each random key, so that no two kinds of draw share a stream."""


def hashed(*words: int | Indices | Words) -> Words:
    """64 random-looking bits [B] per row of words (numbers, or arrays of B)."""
    value = np.zeros(1, dtype=np.uint64)
    for word in words:
        value = _mixed(value + STEP ^ np.atleast_1d(np.asarray(word)).astype(np.uint64))
    return value


def _mixed(value: Words) -> Words:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permuted(index: int | Indices, length: int | Indices, key: tuple[int | Indices, ...]) -> Indices:
    """Where pseudo-random permutations of ``range(length)`` send ``index``, without storing the permutations.

    A Feistel network over the next power of two, walked until it lands inside (Black & Rogaway 2002).

    Args:
        index: numbers [B] below ``length``.
        length: of each row's permutation, or of all.
        key: which permutation, per row or for all.
    """
    rows = np.broadcast_arrays(np.atleast_1d(index), length, hashed(*key))
    value, length_B, key_B = (row.astype(np.uint64) for row in rows)
    # frexp counts the bits of a whole number: it is below 2^53.
    bits = np.frexp((length_B - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    low_bits = bits >> np.uint64(1)
    inside = np.arange(len(value))
    while len(inside):
        value[inside] = _feistel(value[inside], bits[inside], low_bits[inside], key_B[inside])
        inside = inside[value[inside] >= length_B[inside]]
    return value.astype(np.int64)


def _feistel(value: Words, bits: Words, low_bits: Words, key: Words) -> Words:
    """Permutes the numbers of ``bits`` bits. The halves differ by a bit when it is odd, and change sides each round."""
    one = np.uint64(1)
    left, right = value >> low_bits, value & ((one << low_bits) - one)
    left_mask, right_mask = (one << (bits - low_bits)) - one, (one << low_bits) - one
    for _ in range(FEISTEL_ROUNDS):
        key = key + STEP
        left, right = right, left ^ (_mixed(right ^ key) & left_mask)
        left_mask, right_mask = right_mask, left_mask
    return left << low_bits | right


def permuted_in_blocks(index: Indices, length: Indices, block: Indices, key: tuple[int | Indices, ...]) -> Indices:
    """As ``permuted``, but blocks of neighbours stay together: the blocks change places, and the numbers inside each block.

    The last block may be shorter; it comes to stand anywhere among the others.
    """
    full, rest = np.divmod(length, block)
    place = (hashed(PLACE, *key) % (full + 1).astype(np.uint64)).astype(np.int64) * block
    in_short = (index >= place) & (index < place + rest)
    number, slot = np.divmod(np.where(index < place, index, index - rest), block)
    number = np.where(in_short, full, permuted(np.where(in_short, 0, number), np.maximum(full, 1), (BLOCKS, *key)))
    slot, size = np.where(in_short, index - place, slot), np.where(in_short, rest, block)
    return number * block + permuted(slot, size, (TILES, *key, number))


class Line(NamedTuple):
    """What the order must know of the tiles; the arrays may be memory-mapped.

    Attributes:
        ends_E: where each entry's stretch of the line ends, in units (``shares.line``).
        tiles_E: tiles in the store.
        used_E: how many of them are used.
        shard_tiles_E: tiles per shard file.
    """

    ends_E: Indices
    tiles_E: Indices
    used_E: Indices
    shard_tiles_E: Indices


class Draws(NamedTuple):
    """Samples: the entry each is of, and where in it [0, 1)."""

    entry_B: Indices
    place_B: npt.NDArray[np.float64]


class Order:
    """The endless sequence of samples.

    Args:
        line: where each entry's tiles lie.
        sampling: ``run_tiles``, ``window_runs``.
        seed: of everything drawn.

    Attributes:
        epoch: samples per epoch.
    """

    def __init__(self, line: Line, sampling: SamplingSettings, seed: int) -> None:
        self._line, self._run, self._strata, self._seed = line, sampling.run_tiles, sampling.window_runs, seed
        self.epoch = int(line.ends_E[-1]) >> UNIT_BITS if len(line.ends_E) else 0

    def draws(self, number_B: Indices) -> Draws:
        """The samples of these numbers."""
        epoch_B, step_B = np.divmod(number_B, self.epoch)
        position_B = self._positions(epoch_B, step_B) * UNIT + self._offsets(epoch_B)
        entry_B = np.searchsorted(self._line.ends_E, position_B, side="right")
        start_B = np.where(entry_B > 0, self._line.ends_E[entry_B - 1], 0)
        width_B, inside_B = self._line.ends_E[entry_B] - start_B, position_B - start_B
        # Within a slide: the whole steps change places, the part of a step before the first of them stays.
        step_B, offset_B = np.divmod(inside_B, UNIT)
        count_B = (width_B - offset_B + UNIT - 1) // UNIT
        block_B = np.rint(self._line.shard_tiles_E[entry_B] * (width_B / (self._line.tiles_E[entry_B] * UNIT))).astype(np.int64)
        step_B = permuted_in_blocks(step_B, count_B, np.maximum(block_B, 1), (self._seed, epoch_B, entry_B))
        # Half a unit keeps the product away from whole numbers, where rounding could change its floor.
        return Draws(entry_B, (step_B * UNIT + offset_B + 0.5) / width_B)

    def _offsets(self, epoch_B: Indices) -> Indices:
        """Where in a draw's width the steps of an epoch fall."""
        return (hashed(LINE, self._seed).astype(np.int64) + epoch_B * GOLDEN) % UNIT

    def _positions(self, epoch_B: Indices, step_B: Indices) -> Indices:
        """Steps of the line in the order of visit: a permutation of an epoch."""
        run, seed = self._run, self._seed
        runs = self.epoch // run
        strata = max(1, min(self._strata, runs))
        windows = -(-runs // strata) or 1
        window_B = np.minimum(step_B // (strata * run), windows - 1)
        start_B = window_B * (strata * run)
        length_B = np.where(window_B < windows - 1, strata * run, self.epoch - start_B)
        inside_B = permuted(step_B - start_B, length_B, (WINDOW, seed, epoch_B, window_B))
        place_B, slot_B = np.divmod(inside_B, run)
        # Stretches of the line differ by one run at most; only the longer ones have a run left for the last window.
        bounds = np.arange(strata + 1) * runs // strata
        longer = np.flatnonzero(np.diff(bounds) == windows)
        in_tail_B = start_B + inside_B >= runs * run
        last_B = np.take(longer, place_B, mode="clip") if len(longer) else place_B
        stratum_B = np.where(in_tail_B, 0, np.where(window_B == windows - 1, last_B, place_B))
        first_B, size_B = bounds[stratum_B], np.maximum(bounds[stratum_B + 1] - bounds[stratum_B], 1)
        run_B = first_B + permuted(np.minimum(window_B, size_B - 1), size_B, (RUNS, seed, epoch_B, stratum_B))
        return np.where(in_tail_B, runs, run_B) * run + slot_B

    def ranks(self, draws: Draws) -> Indices:
        """Numbers of the samples among the used tiles of their entries, when all tiles of an entry weigh the same."""
        return np.floor(draws.place_B * self._line.used_E[draws.entry_B]).astype(np.int64)

    def tiles(self, entry_B: Indices, rank_B: Indices) -> Indices:
        """Numbers of used tiles in their stores, rising with the rank but for one step back.

        When a slide has more tiles than are used, one is taken at random from each of as many equal stretches, always the same.
        """
        tiles_B, used_B = self._line.tiles_E[entry_B], self._line.used_E[entry_B]
        low_B, high_B = rank_B * tiles_B // used_B, (rank_B + 1) * tiles_B // used_B
        jitter_B = hashed(KEPT, self._seed, entry_B, rank_B) % (high_B - low_B).astype(np.uint64)
        # Stretches of unlike length would favour the same tiles in all slides; turning each slide evens that out.
        turn_B = np.where(used_B < tiles_B, hashed(KEPT, self._seed, entry_B) % tiles_B.astype(np.uint64), 0)
        return (low_B + jitter_B.astype(np.int64) + turn_B.astype(np.int64)) % tiles_B
