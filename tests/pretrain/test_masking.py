import numpy as np
import pytest

from pathfm.pretrain.masking import batch_masks, block_mask


@pytest.mark.parametrize("side", [2, 3, 7, 14])
def test_a_mask_hides_exactly_as_many_patches_as_asked(side):
    for count in range(side * side + 1):
        mask = block_mask(side, count, np.random.default_rng(count))
        assert mask.shape == (side, side) and mask.sum() == count


def test_hidden_patches_lie_in_blocks():
    """Far more hidden neighbours of hidden patches than when patches are drawn one by one."""
    neighbours = []
    for seed in range(200):
        mask = block_mask(14, 60, np.random.default_rng(seed))
        neighbours.append((mask[1:] & mask[:-1]).sum() / mask[1:].sum())
    assert np.mean(neighbours) > 0.6  # single patches: 60 / 196 = 0.31


def test_half_of_the_crops_are_masked_with_ratios_spread_over_the_range():
    masks = batch_masks(16, 14, 0.5, (0.1, 0.5), (0, 1))
    shares = np.sort(masks.mean(axis=1))
    assert (shares == 0).sum() == 8
    slices = np.linspace(0.1, 0.5, 9)
    assert all(low - 1 / 196 <= share <= high for share, low, high in zip(shares[8:], slices[:-1], slices[1:], strict=True))


def test_over_many_steps_every_crop_and_every_patch_is_masked_alike():
    masks = np.stack([batch_masks(8, 7, 0.5, (0.1, 0.5), (0, step)) for step in range(500)])
    assert np.abs(masks.any(axis=2).mean(axis=0) - 0.5).max() < 0.08
    assert masks.mean() == pytest.approx(0.5 * 0.3, abs=0.01)
    ratio_by_crop = masks.sum(axis=(0, 2)) / masks.any(axis=2).sum(axis=0) / 49
    assert np.abs(ratio_by_crop - 0.3).max() < 0.03
    by_patch = masks.mean(axis=(0, 1))
    assert by_patch.min() > 0.04 and by_patch.max() < 0.25  # blocks reach corners less often


def test_masks_depend_on_the_key_only():
    first, again, other = (batch_masks(8, 7, 0.5, (0.1, 0.5), key) for key in ((3, 5), (3, 5), (3, 6)))
    assert (first == again).all() and (first != other).any()


def test_tiny_grids_and_no_masks():
    assert batch_masks(4, 2, 0.5, (0.1, 0.5), (0,)).any(axis=1).sum() == 2
    assert not batch_masks(4, 2, 0.0, (0.1, 0.5), (0,)).any()
