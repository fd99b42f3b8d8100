"""Masks: exact counts, ratios spread over the batch, blocks, and rows that do not depend on each other."""

import math
import random

import numpy as np
import pytest

from pathfm.pretrain import masking
from pathfm.pretrain.masking import batch_masks, block_mask
from pathfm.pretrain_settings import PretrainSettings


def settings(batch_size=8, **changes):
    return PretrainSettings(batch_size=batch_size, **changes)


def masks_of(asked, grid_side, key):
    return batch_masks(asked, grid_side, range(2 * asked.batch_size), key)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 14])
def test_a_mask_hides_exactly_as_many_patches_as_asked(side):
    for count in range(side * side + 1):
        mask = block_mask(side, count, np.random.default_rng(count))
        assert mask.shape == (side, side) and mask.sum() == count


def test_blocks_have_four_patches_or_more_at_most_half_of_a_crop_and_aspects_up_to_ten_thirds():
    sizes, aspects, sharpest = [], [], []
    for seed in range(2000):
        mask = np.zeros((14, 14), dtype=bool)
        assert masking._add_block(mask, 98, np.random.default_rng(seed))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        height, width = len(rows), len(columns)
        assert mask.sum() == height * width == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # one filled rectangle
        sizes.append(height * width)
        aspects.append(math.log(height / width))
        sharpest.append((max(height, width) - 0.5) / (min(height, width) + 0.5))  # sides are rounded to whole patches
    assert min(sizes) >= 4 and max(sizes) <= 98
    assert max(sharpest) <= 1 / 0.3
    assert np.mean(aspects) == pytest.approx(0, abs=0.05)
    assert max(aspects) > 1.0 and min(aspects) < -1.0


def test_masks_are_as_blocky_as_those_of_another_implementation():
    """Share of hidden patches whose neighbour below is hidden too; for patches drawn one by one, 60 / 196 = 0.31."""
    theirs = pytest.importorskip("lightly.models.utils").random_block_mask_image
    random.seed(0)

    def together(mask):
        return (mask[1:] & mask[:-1]).sum() / mask[:-1].sum()

    ours = np.array([together(block_mask(14, 60, np.random.default_rng(seed))) for seed in range(400)])
    other = np.array([together(theirs((14, 14), 60).numpy()) for _ in range(400)])
    assert ours.mean() > 0.6 and ours.mean() == pytest.approx(other.mean(), abs=0.03)


@pytest.mark.parametrize(("batch_size", "probability"), [(8, 0.5), (3, 0.5), (5, 0.33), (4, 1.0), (6, 0.01)])
def test_exactly_the_asked_share_of_all_global_crops_is_masked(batch_size, probability):
    asked = settings(batch_size, mask_probability=probability)
    for step in range(20):
        assert masks_of(asked, 7, (0, step)).any(axis=1).sum() == math.floor(2 * batch_size * probability)


def test_ratios_are_spread_evenly_over_the_range():
    shares = np.sort(masks_of(settings(), 14, (0, 1)).mean(axis=1))
    assert (shares == 0).sum() == 8
    slices = np.linspace(0.1, 0.5, 9)
    assert all(low - 1 / 196 <= share <= high for share, low, high in zip(shares[8:], slices[:-1], slices[1:], strict=True))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 1.0])
def test_equal_ratios_mask_exactly_as_many_patches_of_every_masked_crop(ratio):
    hidden = masks_of(settings(mask_ratio=(ratio, ratio)), 14, (0, 2)).sum(axis=1)
    assert set(hidden[hidden > 0].tolist()) == {math.floor(196 * ratio)} and (hidden > 0).sum() == 8


def test_rows_do_not_depend_on_which_others_are_asked_for():
    asked = settings(batch_size=8)
    whole = masks_of(asked, 7, (3, 5))
    for rows in ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15], [13], [9, 2], []):
        assert (batch_masks(asked, 7, rows, (3, 5)) == whole[rows]).all()
    assert (masks_of(asked, 7, (3, 6)) != whole).any() and (masks_of(asked, 7, (4, 5)) != whole).any()


def test_over_many_steps_every_crop_and_every_patch_is_masked_alike():
    masks = np.stack([masks_of(settings(batch_size=4), 7, (0, step)) for step in range(500)])
    assert np.abs(masks.any(axis=2).mean(axis=0) - 0.5).max() < 0.08
    assert masks.mean() == pytest.approx(0.5 * 0.3, abs=0.01)
    ratio_by_crop = masks.sum(axis=(0, 2)) / masks.any(axis=2).sum(axis=0) / 49
    assert np.abs(ratio_by_crop - 0.3).max() < 0.03
    by_patch = masks.mean(axis=(0, 1))
    assert by_patch.min() > 0.04 and by_patch.max() < 0.25  # blocks reach corners less often


def test_the_tokens_masked_per_batch_hardly_vary():
    """What spreading the ratios is for: the work of the patch loss is nearly the same at every step."""
    totals = np.array([masks_of(settings(batch_size=16), 14, (0, step)).sum() for step in range(100)])
    assert totals.std() / totals.mean() < 0.02


def test_tiny_grids_and_no_masks():
    assert masks_of(settings(2), 2, (0,)).any(axis=1).sum() == 2
    assert masks_of(settings(2), 1, (0,)).sum() == 2
    assert not masks_of(settings(2, mask_probability=0.0), 2, (0,)).any()
