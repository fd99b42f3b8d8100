"""The aggregator against golden numbers, and the contract every aggregator has to keep."""

import numpy as np
import pytest
import torch

from pathfm.errors import SlideError
from pathfm.mil.aggregator import AttentionMil, AttentionPool


def network(dropout=0.0):
    model = AttentionMil(6, 16, 8, 3, dropout)
    model.draw_weights(torch.Generator().manual_seed(0))
    return model.eval()


def tiles(*lengths):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(length, 6, generator=draw) for length in lengths]


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_pooling_matches_the_golden_numbers(golden, kind):
    numbers = {name: torch.from_numpy(value) for name, value in np.load(golden / "attention_mil.npz").items()}
    pool = AttentionPool(20, 8, gated=kind == "gated")
    parts = ["V", "U"] if kind == "gated" else ["V"]
    state = {f"project.{what}": torch.cat([numbers[f"{part}.{what}"] for part in parts]) for what in ("weight", "bias")}
    pool.load_state_dict({**state, "score.weight": numbers["w.weight"], "score.bias": numbers["w.bias"]})
    pooled = pool(numbers["h"], [11])
    torch.testing.assert_close(pooled.attention_N, numbers[f"{kind}/attention"], atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled.slide_BH[0], numbers[f"{kind}/pooled"], atol=1e-5, rtol=0)


def test_packing_bags_together_changes_nothing():
    model, bags = network(), tiles(1, 7, 40, 3)
    together = model(torch.cat(bags), [1, 7, 40, 3])
    alone = [model(bag, [len(bag)]) for bag in bags]
    torch.testing.assert_close(together.logit_BC, torch.cat([one.logit_BC for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.attention_N, torch.cat([one.attention_N for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        together.attention_logit_N, torch.cat([one.attention_logit_N for one in alone]), atol=1e-5, rtol=0
    )


def test_a_neighbour_of_extreme_values_changes_nothing():
    model, (bag, other) = network(), tiles(5, 9)
    beside = model(torch.cat([bag, other * 1e6]), [5, 9])
    torch.testing.assert_close(beside.logit_BC[:1], model(bag, [5]).logit_BC, atol=1e-5, rtol=0)
    assert torch.isfinite(beside.logit_BC).all()


def test_order_of_tiles_does_not_matter():
    model, (bag,) = network(), tiles(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    one, two = model(bag, [50]), model(bag[order], [50])
    torch.testing.assert_close(one.logit_BC, two.logit_BC, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.attention_N[order], two.attention_N, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [[1], [100_000], [1, 1, 1], [3, 500]])
def test_attention_sums_to_one_in_every_bag(lengths):
    verdict = network()(torch.cat(tiles(*lengths)), lengths)
    sums = torch.stack([part.double().sum() for part in verdict.attention_N.split(lengths)])
    torch.testing.assert_close(sums, torch.ones(len(lengths), dtype=torch.float64), atol=1e-5, rtol=0)
    assert torch.isfinite(verdict.logit_BC).all()


def test_a_bag_of_one_tile_has_attention_1():
    assert network()(tiles(1)[0], [1]).attention_N.tolist() == [1.0]


@pytest.mark.parametrize("lengths", [[0], [3, 0], []])
def test_an_empty_bag_is_a_named_error(lengths):
    with pytest.raises(SlideError, match="without tiles"):
        network()(torch.zeros(sum(lengths), 6), lengths)


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="add up"):
        network()(torch.zeros(5, 6), [2, 2])


def test_gradients_of_a_bag_do_not_reach_its_neighbour():
    bags = [bag.requires_grad_() for bag in tiles(4, 4)]
    network()(torch.cat(bags), [4, 4]).logit_BC[0].sum().backward()
    assert bags[0].grad.abs().sum() > 0
    assert bags[1].grad.abs().sum() == 0


def test_dropout_is_off_when_a_network_is_asked_and_repeatable_when_it_learns():
    model, (bag,) = network(dropout=0.5), tiles(30)
    assert torch.equal(model(bag, [30]).logit_BC, model(bag, [30]).logit_BC)
    model.train()
    one, two, other = (model(bag, [30], torch.Generator().manual_seed(seed)).logit_BC for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
