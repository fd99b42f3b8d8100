import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm.pretrain.catalogue import Entry, catalogue_of
from pathfm.pretrain.order import Line, Order, permuted, permuted_in_blocks
from pathfm.pretrain.shares import draws_per_epoch, filled, line
from pathfm.pretrain_settings import SamplingSettings

DRAWS = 100_000
GOLDEN_SAMPLES = [(1, 129), (0, 540), (0, 398), (0, 747), (2, 11), (0, 671), (0, 359), (0, 801)]


def an_order(counts, *, facts=None, mpp=None, shard=256, seed=0, **changes):
    sampling = SamplingSettings(**{"slide_power": 1.0, **changes})
    entries = [Entry(f"s{i:04}", mpp[i] if mpp else 0.5, f"{i}", n, shard, 224) for i, n in enumerate(counts)]
    catalogue = catalogue_of(entries, sampling, facts or {})
    return Order(catalogue.line, sampling, seed), catalogue


def pairs(order, numbers):
    draws = order.draws(np.asarray(numbers))
    return list(zip(draws.entry_B.tolist(), order.tiles(draws.entry_B, order.ranks(draws)).tolist(), strict=True))


def epoch(order, number):
    return pairs(order, np.arange(order.epoch) + number * order.epoch)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 1000, 12_345])
def test_a_permutation_is_one(length):
    found = permuted(np.arange(length), length, (1, 2))
    assert sorted(found.tolist()) == list(range(length))
    assert length < 10 or (found != permuted(np.arange(length), length, (1, 3))).any()


def test_every_row_may_have_its_own_permutation():
    lengths, keys = np.repeat([5, 64, 1000], [5, 64, 1000]), np.repeat([7, 8, 9], [5, 64, 1000])
    index = np.concatenate([np.arange(5), np.arange(64), np.arange(1000)])
    alone = [permuted(np.arange(length), length, (3, key)) for length, key in ((5, 7), (64, 8), (1000, 9))]
    assert np.array_equal(permuted(index, lengths, (3, keys)), np.concatenate(alone))


@pytest.mark.parametrize("length", [33, 64])
def test_a_permutation_looks_random(length):
    positions = np.stack([permuted(np.arange(length), length, (seed,)) for seed in range(2000)])
    counts = np.stack([np.bincount(positions[:, column], minlength=length) for column in range(length)])
    expected = 2000 / length
    chi2 = ((counts - expected) ** 2 / expected).sum(axis=1) / (length - 1)
    assert chi2.mean() == pytest.approx(1, abs=0.1) and chi2.max() < 2
    assert abs(np.corrcoef(positions[:, 0], positions[:, 1])[0, 1]) < 0.1


def test_a_huge_permutation_costs_no_memory():
    found = permuted(np.arange(1000) + 10**9, 3 * 10**9, (0,))
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 3 * 10**9


@given(st.integers(1, 400), st.integers(1, 50), st.integers(0, 10**6))
def test_blocks_change_places_and_stay_together(length, block, seed):
    found = permuted_in_blocks(np.arange(length), np.full(length, length), np.full(length, block), (seed,))
    assert sorted(found.tolist()) == list(range(length))
    changes = np.count_nonzero(np.diff(found // block))
    assert changes == -(-length // block) - 1


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=12).filter(any),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(0, 5),
)
def test_an_epoch_shows_every_tile_once_and_the_next_in_another_order(counts, run_tiles, window_runs, shard, number):
    order, _ = an_order(counts, run_tiles=run_tiles, window_runs=window_runs, shard=shard)
    seen, after = epoch(order, number), epoch(order, number + 1)
    assert sorted(seen) == sorted(after) == [(entry, tile) for entry, count in enumerate(counts) for tile in range(count)]
    assert seen != after or len(seen) < 8


@given(st.lists(st.integers(1, 300), min_size=2, max_size=8), st.floats(0, 1), st.integers(0, 4))
def test_the_shard_size_changes_the_order_only(counts, power, number):
    one, other = (an_order(counts, slide_power=power, shard=shard, run_tiles=4)[0] for shard in (7, 256))
    assert Counter(epoch(one, number)) == Counter(epoch(other, number))


@given(st.lists(st.integers(1, 300), min_size=2, max_size=8), st.floats(0, 1), st.integers(0, 4))
def test_tiles_of_a_slide_come_equally_often(counts, power, number):
    order, catalogue = an_order(counts, slide_power=power, max_repeats=9)
    seen = Counter(epoch(order, number))
    widths = np.diff(catalogue.ends_E, prepend=0) / 2**16
    for entry, count in enumerate(counts):
        often = [seen[entry, tile] for tile in range(count)]
        assert max(often) - min(often) <= 1 and abs(sum(often) - widths[entry]) < 1


def test_a_window_reads_few_shards_and_mixes_what_it_reads():
    order, _ = an_order(np.random.default_rng(0).integers(900, 3000, 400), run_tiles=16, window_runs=32)
    windows = np.array(pairs(order, np.arange(50 * 512))).reshape(50, 512, 2)
    shards = [len({(entry, tile // 256) for entry, tile in window.tolist()}) for window in windows]
    # Every run lies in one shard, but where a slide or a shard ends within it.
    assert max(shards) <= 2 * 32 and np.mean(shards) < 1.2 * 32
    places = np.array([np.flatnonzero(window[:, 0] == window[0, 0]).mean() for window in windows])
    assert 150 < places.mean() < 330, "the tiles of a run are spread over the window"


def test_a_window_takes_as_much_from_every_part_of_the_line():
    facts = {f"s{i:04}": {"site": "AB"[i % 5 == 0]} for i in range(200)}
    order, catalogue = an_order([500] * 200, facts=facts, weights={"site": {"A": 1, "B": 1}}, run_tiles=8, window_runs=40)
    of_b = {entry for entry in range(200) if facts[catalogue.slide_id(entry)]["site"] == "B"}
    for window in range(20):
        drawn = order.draws(np.arange(320) + window * 320).entry_B
        assert abs(np.isin(drawn, list(of_b)).sum() - 160) <= 8


def test_any_cut_of_the_numbers_gives_the_same_samples():
    order, _ = an_order([40, 17, 300], slide_power=0.3)
    whole = pairs(order, np.arange(900))
    assert [pair for start in range(0, 900, 7) for pair in pairs(order, np.arange(start, min(start + 7, 900)))] == whole
    assert whole != pairs(an_order([40, 17, 300], slide_power=0.3, seed=1)[0], np.arange(900))


@settings(max_examples=15)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=30), st.floats(0, 1))
def test_slides_come_as_often_as_the_power_says(counts, power):
    order, _ = an_order(counts, slide_power=power, max_repeats=1e9)
    drawn = np.bincount(order.draws(np.arange(DRAWS)).entry_B, minlength=len(counts)) / DRAWS
    wanted = np.array(counts) ** power / (np.array(counts) ** power).sum()
    assert np.abs(drawn / wanted - 1).max() < 0.01 + 3 / (wanted * DRAWS).min()


@settings(max_examples=15)
@given(st.data())
def test_groups_come_as_often_as_their_weights_say(data):
    counts = data.draw(st.lists(st.integers(20, 2000), min_size=12, max_size=40))
    a, b = data.draw(st.floats(0.2, 5)), data.draw(st.floats(0.2, 5))
    facts = {f"s{i:04}": {"site": "ABC"[i % 3]} for i in range(len(counts))}
    mpp = [(0.4987, 0.2511)[i // 3 % 2] for i in range(len(counts))]
    weights = {"site": {"A": a, "B": b}, "mpp": {"0.5": a, "0.25": b}}
    order, catalogue = an_order(counts, facts=facts, mpp=mpp, weights=weights, max_repeats=1e9, slide_power=0.5)
    entries = order.draws(np.arange(DRAWS)).entry_B
    site_E = np.array(["ABC".index(facts[catalogue.slide_id(entry)]["site"]) for entry in range(len(counts))])
    by_site = np.bincount(site_E[entries], minlength=3) / DRAWS
    by_mpp = np.bincount((catalogue.mpp_E[entries] > 0.3).astype(int), minlength=2) / DRAWS
    assert by_site == pytest.approx(np.array([a, b, 1]) / (a + b + 1), rel=0.01)
    assert by_mpp == pytest.approx(np.array([b, a]) / (a + b), rel=0.01)


def test_a_weight_of_zero_leaves_a_group_out():
    facts = {f"s{i:04}": {"site": "ABC"[i % 3]} for i in range(9)}
    order, catalogue = an_order([10] * 9, facts=facts, weights={"site": {"B": 0}})
    seen = Counter(entry for entry, _ in epoch(order, 0))
    assert order.epoch == 60 and {facts[catalogue.slide_id(entry)]["site"] for entry in seen} == {"A", "C"}
    assert dict(catalogue.used)["s0001"] == 0 and dict(catalogue.used)["s0002"] == 10


def test_no_slide_comes_more_often_than_allowed_and_the_others_take_over():
    order, catalogue = an_order([1000, 1000, 5, 5], slide_power=0.0, max_repeats=3.0)
    widths = np.diff(catalogue.ends_E, prepend=0) / 2**16
    assert widths.tolist() == [990, 990, 15, 15] and order.epoch == 2010


def test_the_excess_of_a_slide_stays_in_its_group():
    facts = {name: {"site": site} for name, site in zip(("s0000", "s0001", "s0002"), "ABB", strict=True)}
    _, catalogue = an_order([1000, 500, 5], facts=facts, weights={"site": {"A": 1, "B": 1}}, slide_power=0.0, max_repeats=4.0)
    assert np.diff(catalogue.ends_E, prepend=0) / 2**16 == pytest.approx([752.5, 732.5, 20])


def test_what_cannot_be_is_told(caplog):
    facts = {f"s{i:04}": {"site": "AB"[i > 0]} for i in range(3)}
    _, catalogue = an_order([10, 500, 500], facts=facts, weights={"site": {"A": 1, "B": 1}}, max_repeats=4.0)
    assert np.diff(catalogue.ends_E, prepend=0)[0] == 40 * 2**16
    assert "site gets A 4.0% instead of 50.0%, B 96.0% instead of 50.0% of the draws" in caplog.text


def test_fewer_repeats_than_one_make_epochs_shorter():
    order, catalogue = an_order([100, 300], max_repeats=0.25)
    assert order.epoch == 100 and (np.diff(catalogue.ends_E, prepend=0) / 2**16).tolist() == [25, 75]


def test_the_cap_takes_the_same_tiles_of_a_slide_in_every_epoch_from_all_over_it():
    order, catalogue = an_order([3000, 4], max_tiles_per_slide=80)
    assert catalogue.used == [("s0000", 80), ("s0001", 4)]
    seen = [Counter(epoch(order, number)) for number in range(3)]
    assert seen[0] == seen[1] == seen[2] and set(seen[0].values()) == {1}
    tiles = sorted(tile for entry, tile in seen[0] if entry == 0)
    assert np.diff([*tiles, tiles[0] + 3000]).max() <= 2 * 3000 / 80


def test_the_cap_favours_no_tile():
    kept = Counter()
    for seed in range(600):
        order, _ = an_order([30], max_tiles_per_slide=16, seed=seed)
        kept.update(tile for _, tile in epoch(order, 0))
    assert min(kept[tile] for tile in range(30)) > 600 * 16 / 30 * 0.85
    assert max(kept.values()) < 600 * 16 / 30 * 1.15


AMOUNT = st.integers(0, 1000).map(lambda thousandths: thousandths / 100)


@given(st.lists(st.tuples(AMOUNT, AMOUNT), min_size=1, max_size=30), st.floats(0, 100))
def test_filling_spends_the_total_within_the_limits(rows, total):
    share, limit = np.array(rows).T
    given_E = filled(share, limit, np.zeros(len(rows), dtype=np.int64), np.array([total]))
    assert (given_E <= limit * (1 + 1e-9)).all() and (given_E[share == 0] == 0).all()
    possible = limit[share > 0].sum()
    assert given_E.sum() == pytest.approx(min(total, possible), abs=1e-6)
    below = (given_E < limit * (1 - 1e-6)) & (share > 1e-3)
    if below.sum() > 1:
        ratio = given_E[below] / share[below]
        assert ratio == pytest.approx(ratio[0], rel=1e-6)


def test_a_line_ends_at_whole_draws_and_forgets_no_slide():
    ends = line(np.array([1 / 3, 1e-9, 0.0, 5 + 2 / 3]))
    assert ends[-1] == 6 * 2**16 and (np.diff(ends, prepend=0) > 0).tolist() == [True, True, False, True]


def test_a_billion_tiles_are_counted_exactly():
    tiles = np.full(1000, 10**6, dtype=np.int64)
    sampling = SamplingSettings(slide_power=1.0)
    ends = line(draws_per_epoch(tiles, [], sampling))
    order = Order(Line(ends, tiles, tiles, np.full(1000, 256)), sampling, 0)
    numbers = np.random.default_rng(0).choice(10**9, 20_000, replace=False)
    seen = pairs(order, numbers)
    assert order.epoch == 10**9 and len(set(seen)) == 20_000
    assert math.isclose(np.mean([tile for _, tile in seen]), 5e5, rel_tol=0.02)


def test_the_order_is_that_of_earlier_versions():
    # A run that is resumed under another version must go on with the same samples.
    order, _ = an_order([1000, 300, 20], slide_power=0.5, run_tiles=4, window_runs=8, shard=64, seed=3)
    assert pairs(order, np.array([0, 1, 2, 500, 1319, 1320, 10**6, 10**12])) == GOLDEN_SAMPLES
