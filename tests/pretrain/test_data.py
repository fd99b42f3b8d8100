from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pathfm.errors import TrainingError
from pathfm.pretrain.data import TileBatches, load_batches, permuted
from tests.pretrain.conftest import tiny


class Plain:
    """Tiles that all have the value of their number."""

    def __init__(self, path: Path) -> None:
        self.slide_id, count = path.name.split("-")
        self._count = int(count)

    def __len__(self) -> int:
        return self._count

    def read(self, indices):
        return np.stack([np.full((40, 40, 3), index, np.uint8) for index in indices])


def batches(*names, **changes):
    return TileBatches([Path(name) for name in names], tiny(**changes), 2, Plain)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 1000, 12_345])
def test_a_permutation_is_one(length):
    found = permuted(np.arange(length), length, (1, 2))
    assert sorted(found.tolist()) == list(range(length))
    assert length < 10 or (found != permuted(np.arange(length), length, (1, 3))).any()


def test_a_permutation_looks_random():
    positions = np.stack([permuted(np.arange(64), 64, (seed,)) for seed in range(2000)])
    counts = np.stack([np.bincount(positions[:, column], minlength=64) for column in range(64)])
    expected = 2000 / 64
    chi2 = ((counts - expected) ** 2 / expected).sum(axis=1) / 63
    assert chi2.mean() == pytest.approx(1, abs=0.1) and chi2.max() < 2
    assert abs(np.corrcoef(positions[:, 0], positions[:, 1])[0, 1]) < 0.1


def test_a_huge_permutation_costs_no_memory():
    found = permuted(np.arange(1000) + 10**9, 3 * 10**9, (0,))
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 3 * 10**9


def test_an_epoch_shows_every_tile_once_and_the_next_in_another_order():
    data = batches("a-9", "b-6", "c-1")
    epochs = [[pair for step in range(start, start + 4) for pair in data.sources(step)] for start in (0, 4)]
    everything = {(store, tile) for store, count in enumerate((9, 6, 1)) for tile in range(count)}
    assert all(len(epoch) == 16 and set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_incomplete_last_batch_is_dropped():
    data = batches("a-9", "b-1")
    assert all(len(set(data.sources(step))) == 4 for step in range(10))


def test_the_cap_takes_the_same_random_tiles_of_a_slide_in_every_epoch():
    data = batches("a-30", "b-4", max_tiles_per_slide=8)
    assert data.used == [("a", 8), ("b", 4)]
    epochs = [Counter(pair for step in range(3 * e, 3 * e + 3) for pair in data.sources(step)) for e in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] and set(epochs[0].values()) == {1}
    assert sorted(tile for store, tile in epochs[0] if store == 0) != list(range(8))


def test_the_order_of_the_stores_does_not_matter():
    first, second = batches("a-9", "b-6"), batches("b-6", "a-9")
    assert torch.equal(first[2].global_crops, second[2].global_crops)


def test_too_few_tiles_is_an_error_that_says_so():
    with pytest.raises(TrainingError, match=r"pretrain.batch_size: 3 tiles in 2 stores are fewer than one batch of 4"):
        batches("a-2", "b-1")


def test_the_rows_of_a_batch_fit_together():
    batch = batches("a-20")[3]
    assert batch.global_crops.shape == (8, 32, 32, 3) and batch.local_crops.shape == (8, 16, 16, 3)
    value = batch.global_crops[:, 0, 0, 0]
    assert torch.equal(value[:4], value[4:]) and torch.equal(batch.local_crops[:4, 0, 0, 0], value[:4])
    assert batch.masks_CP.sum() == len(batch.masked_M) == len(batch.weight_M)
    assert batch.masks_CP.flatten()[batch.masked_M].all()
    assert batch.weight_M.sum() == pytest.approx(4)  # one per masked crop, half of the eight


def test_no_local_crops_is_allowed():
    crops = tiny().crops.model_copy(update={"local_count": 0})
    assert batches("a-20", crops=crops)[0].local_crops.shape == (0, 16, 16, 3)


def test_seed_and_step_decide_everything():
    same, other = batches("a-20"), batches("a-20", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(same[1], batches("a-20")[1], strict=True))
    assert not torch.equal(same[1].global_colour, same[2].global_colour)
    assert not torch.equal(same[1].global_colour, other[1].global_colour)


def test_worker_processes_change_nothing(stores):
    data = TileBatches(stores, tiny(), 2)
    alone, shared = ([*load_batches(data, range(3, 8), workers)] for workers in (0, 2))
    assert len(alone) == len(shared) == 5
    for first, second in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
