"""Augmentation of features: what each kind changes, what it leaves alone, and that it repeats."""

import pytest
import torch

from pathfm.mil.augment import Batch, augment, is_active, make_batch
from pathfm.mil.projection import Stretch
from pathfm.mil_settings import AugmentSettings

DIM, LENGTHS = 6, (300, 500, 400)


def batch(dtype=torch.float32, lengths=LENGTHS) -> Batch:
    """Bags with means and deviations of their own; ``xy_N2`` says which tile of which bag a row is."""
    stretches = []
    for number, length in enumerate(lengths):
        rest_ND = torch.randn(length, DIM, generator=torch.Generator().manual_seed(number)) * (number + 1)
        xy_N2 = torch.stack([torch.full((length,), float(number)), torch.arange(length).float()], 1)
        stretches.append(Stretch(rest_ND.to(dtype), torch.full((DIM,), 10.0 * number), xy_N2))
    return make_batch(stretches, [20 + number for number in range(len(lengths))])


def changed(before: Batch, seed=0, **settings) -> Batch:
    mean_D, scale_D = torch.full((DIM,), 5.0), torch.arange(1.0, DIM + 1)
    return augment(before, AugmentSettings(**settings), mean_D, scale_D, torch.Generator().manual_seed(seed))


def features(of: Batch) -> torch.Tensor:
    return torch.cat([stretch.features() for stretch in of.stretches])


KINDS = {"noise": 0.5, "dropout": 0.5, "mixup": 1.0, "statistics": 1.0}


def test_nothing_is_active_by_default():
    assert not is_active(AugmentSettings())
    assert all(is_active(AugmentSettings(**{name: value})) for name, value in KINDS.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_it_repeats_leaves_the_batch_alone_and_keeps_its_type(name, dtype):
    before, again = batch(dtype), batch(dtype)
    first, second, other = (changed(before, seed, **{name: KINDS[name]}) for seed in (0, 0, 1))
    assert torch.equal(features(before), features(again))
    assert torch.equal(features(first), features(second))
    assert features(first).shape != features(other).shape or not torch.equal(features(first), features(other))
    assert all(stretch.rest_ND.dtype == dtype for stretch in first.stretches)
    assert sum(first.lengths) == sum(len(stretch.rest_ND) for stretch in first.stretches)


@pytest.mark.parametrize("name", KINDS)
def test_a_bag_of_one_tile_alone_stays_a_bag(name):
    after = changed(batch(lengths=(1,)), **{name: KINDS[name]})
    assert after.lengths == (1,)
    assert torch.isfinite(features(after)).all()


def test_noise_is_in_standard_deviations_of_each_feature():
    before = batch()
    noise_ND = features(changed(before, noise=0.5)) - features(before)
    torch.testing.assert_close(noise_ND.std(0), 0.5 * torch.arange(1.0, DIM + 1), rtol=0.1, atol=0)
    assert float(noise_ND.mean().abs()) < 0.1


def test_dropout_gives_silenced_channels_the_mean_of_the_training_tiles_in_a_whole_bag():
    before = batch()
    after = changed(before, dropout=0.5)
    for old, new in zip(before.stretches, after.stretches, strict=True):
        silent_D = (new.features() == 5.0).all(0)
        assert 0 < silent_D.sum() < DIM
        assert torch.equal(new.features()[:, ~silent_D], old.features()[:, ~silent_D])
    patterns = {tuple((new.features() == 5.0).all(0).tolist()) for new in after.stretches}
    assert len(patterns) > 1


def test_mixup_mixes_tiles_and_judgement_in_the_same_share():
    before = batch()
    after = changed(before, mixup=1.0)
    assert after.place_R[:3] == before.place_R
    assert sorted(after.place_R[3:]) == sorted(before.place_R)
    assert all(own != partner for own, partner in zip(after.place_R[:3], after.place_R[3:], strict=True))
    for bag, (mine, theirs) in enumerate(zip(after.stretches[::2], after.stretches[1::2], strict=True)):
        share, partner = after.share_R[bag], after.place_R[3 + bag] - 20
        assert after.share_R[bag] + after.share_R[3 + bag] == pytest.approx(1)
        assert share >= 0.5
        assert (mine.xy_N2[:, 0] == bag).all()
        assert (theirs.xy_N2[:, 0] == partner).all()
        assert len(mine.rest_ND) == pytest.approx(share * LENGTHS[bag], abs=1)
        assert len(theirs.rest_ND) == pytest.approx((1 - share) * LENGTHS[partner], abs=1)
        assert after.lengths[bag] == len(mine.rest_ND) + len(theirs.rest_ND)
        assert len(mine.xy_N2[:, 1].unique()) == len(mine.xy_N2)


def test_statistics_come_to_lie_between_those_of_two_bags():
    before, seen = batch(), 0
    for seed in range(20):
        after = changed(before, seed, statistics=1.0)
        for old, new in zip(before.stretches, after.stretches, strict=True):
            mean, deviation = new.features().mean(0), new.features().std(0, correction=0)
            assert (mean > -0.5).all()
            assert (mean < 20.5).all()
            assert (deviation > 0.9).all()
            assert (deviation < 3.3).all()
            seen += not torch.allclose(mean, old.features().mean(0), atol=0.5)
    assert seen > 20
    untouched = changed(before, statistics=1e-9)
    assert torch.equal(features(untouched), features(before))
