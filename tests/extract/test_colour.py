"""The colour control sees colours and nothing else."""

from __future__ import annotations

import numpy as np

from pathfm.extract.colour import colour_histogram


def test_it_is_a_histogram():
    tiles = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_allclose((colour_histogram(tiles) ** 2).sum(axis=1), 1, rtol=1e-5)


def test_it_matches_numpy():
    tile = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain, _ = np.histogramdd(tile.reshape(-1, 3), bins=(4, 4, 4), range=[(0, 256)] * 3)
    np.testing.assert_allclose(colour_histogram(tile[None])[0] ** 2, plain.reshape(-1) / 256, rtol=1e-5)


def test_it_is_blind_to_structure():
    tile = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    shuffled = np.random.default_rng(1).permutation(tile.reshape(-1, 3)).reshape(16, 16, 3)
    np.testing.assert_array_equal(colour_histogram(tile[None]), colour_histogram(shuffled[None]))
