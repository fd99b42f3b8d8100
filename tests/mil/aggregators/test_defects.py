"""Defects that other tools had, and ours must not have: named after them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from pathfm.mil.aggregators.clam import Instances
from pathfm.mil.aggregators.contract import Packed
from pathfm.mil.aggregators.dsmil import Dsmil
from tests.mil.aggregators.examples import Bag, bag, close, network, pack

CLAMS = ("clam-sb", "clam-mb")


@pytest.mark.parametrize("name", CLAMS)
@pytest.mark.parametrize("tiles", [1, 2, 7])
def test_clam_bags_smaller_than_the_tiles_of_the_instance_loss(name, tiles):
    pooled = network(name).train()(pack(bag(tiles), class_B=torch.tensor([1])))
    assert torch.isfinite(pooled.output_BO).all()
    assert (pooled.extra is None) == (tiles == 1)
    assert pooled.weight == (1.0 if tiles == 1 else 0.7)


def test_clam_a_tile_is_never_evidence_for_and_against():
    instances = Instances(6, 2, tiles=8, subtyping=False)
    seen = []
    instances.head.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    packed = pack(bag(7), class_B=torch.tensor([0]))
    instances(packed, torch.arange(7.0)[:, None])
    close(seen[0], packed.tile_NH[[6, 5, 4, 0, 1, 2]])


@pytest.mark.parametrize("name", CLAMS)
def test_clam_needs_no_label_when_it_is_asked(name):
    model = network(name)
    packed = pack(bag(30))
    answer = model(packed)
    assert answer.extra is None
    assert torch.equal(answer.output_BO, model(packed._replace(class_B=torch.tensor([1]))).output_BO)
    assert model.train()(packed).extra is None


@pytest.mark.parametrize("name", CLAMS)
def test_clam_only_tiles_of_the_bag_enter_its_instance_loss(name):
    """Padding cannot be there, and neighbours, also those without a known class, have no part."""
    model = network(name, options={"instance_tiles": 4}).train()
    small, large = bag(5), bag(50, 2)
    both = model(pack(small, large, class_B=torch.tensor([1, 0]))).extra
    alone = [model(pack(one, class_B=torch.tensor([number]))).extra for one, number in ((small, 1), (large, 0))]
    close(both, sum(alone) / 2)
    close(model(pack(small, large, class_B=torch.tensor([1, -1]))).extra, alone[0])


@pytest.mark.parametrize("subtyping", [False, True])
def test_clam_instance_loss_is_that_of_a_plain_version(subtyping):
    model = network("clam-mb", options={"instance_tiles": 3, "subtyping": subtyping, "instance_weight": 0.4}).train()
    packed = pack(bag(20), class_B=torch.tensor([1]))
    pooled = model(packed)
    tile_NH = model.embed(packed.tile_NH).relu()
    logits = model.aggregator.instances.head(tile_NH).view(20, -1, 2)
    losses = []
    for number in range(3):
        order = pooled.attention_NQ[:, number].argsort(descending=True)
        if number == 1:
            rows, targets = torch.cat([order[:3], order[-3:]]), torch.tensor([1, 1, 1, 0, 0, 0])
        else:
            rows, targets = order[:3], torch.zeros(3, dtype=torch.long)
        losses.append(cross_entropy(logits[rows, number], targets))
    close(pooled.extra, 0.4 * (sum(losses) / 3 if subtyping else losses[1]))
    assert pooled.weight == 0.6


def test_clam_class_numbers_beyond_the_outputs_are_left_out():
    """An ordinal task has one output less than classes; what is no class at all is not judged."""
    model = network("clam-mb", outputs=2).train()
    assert torch.isfinite(model(pack(bag(20), class_B=torch.tensor([2]))).extra)
    assert model(pack(bag(20), class_B=torch.tensor([57]))).extra is None


def test_transmil_positions_come_from_coordinates_not_from_the_order_of_storage():
    """Elsewhere the same 500 tiles in six orders gave probabilities from 0.04 to 0.87."""
    model, one = network("transmil", hidden=32, heads=4), bag(500)
    outputs = []
    for seed in range(6):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
        outputs.append(model(pack(Bag(one.tile_NH[order], one.xy_N2[order]))).output_BO)
    for output in outputs[1:]:
        close(output, outputs[0])
    moved = Bag(one.tile_NH, one.xy_N2[torch.randperm(500, generator=torch.Generator().manual_seed(9))])
    assert (model(pack(moved)).output_BO - outputs[0]).abs().max() > 1e-3


def test_transmil_nothing_is_repeated_to_fill_a_square():
    """A bag of 5 tiles, which elsewhere is filled to 9, is what its 5 tiles are: one more of them changes the result."""
    model, one = network("transmil"), bag(5)
    filled = Bag(torch.cat([one.tile_NH, one.tile_NH[:4]]), torch.cat([one.xy_N2, one.xy_N2[:4] + 40]))
    assert (model(pack(one)).output_BO - model(pack(filled)).output_BO).abs().max() > 1e-5
    seen = []
    model.aggregator.attention_1.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[0]))
    model(pack(one))
    assert seen == [6]  # and the class token


def test_transmil_the_pseudo_inverse_of_a_bag_does_not_depend_on_its_neighbours():
    """Elsewhere the iteration starts from the largest sum of the whole batch."""
    model, one = network("transmil"), bag(30)
    close(model(pack(one, Bag(bag(60, 2).tile_NH * 50, bag(60, 2).xy_N2))).output_BO[:1], model(pack(one)).output_BO)


def test_dtfd_the_loss_of_tier_2_reaches_tier_1():
    model = network("dtfd").train()
    model(pack(bag(40), noise=torch.Generator().manual_seed(0))).output_BO.square().sum().backward()
    assert model.aggregator.scores_1.project.weight.grad.abs().sum() > 0
    assert model.aggregator.head_1.weight.grad is None  # which the loss of tier 1 trains
    model(pack(bag(40), noise=torch.Generator().manual_seed(0))).side[0].output_KO.square().sum().backward()
    assert model.aggregator.head_1.weight.grad.abs().sum() > 0


def test_dtfd_pseudo_bags_are_random_in_training_and_fixed_when_asked():
    model, one = network("dtfd"), bag(40)
    answers = [model(pack(one, noise=torch.Generator().manual_seed(seed))).output_BO for seed in range(3)]
    assert torch.equal(answers[0], answers[1])
    model.train()
    learned = [model(pack(one, noise=torch.Generator().manual_seed(seed))).output_BO for seed in range(3)]
    assert not torch.equal(learned[0], learned[1])


def test_dtfd_attention_of_tier_1_sums_to_one_in_each_pseudo_bag():
    """Elsewhere it summed to -25.5."""
    model, one = network("dtfd"), bag(40)
    pooled = model(pack(one))
    assert pooled.attention_NQ.min() >= 0
    close(pooled.attention_NQ.sum(), torch.tensor(1.0))
    tile_NH = model.embed(one.tile_NH).relu()
    close(pooled.slide_BH, pooled.attention_NQ.T @ tile_NH)  # a weighted mean of tiles, through both tiers


def test_dtfd_keeps_one_vector_per_pseudo_bag_not_all_tiles():
    model, seen = network("dtfd", options={"pseudo_bags": 4}), []
    model.aggregator.scores_2.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    pooled = model(pack(bag(400), bag(300, 2)))
    assert seen == [8]
    assert pooled.side[0].bag_K.tolist() == [0] * 4 + [1] * 4
    assert model(pack(bag(1))).side[0].bag_K.tolist() == [0]


def test_tiles_of_zeros_are_tiles_and_never_padding():
    """Elsewhere bags are filled with zeros, which take part. Here a tile of zeros is there only if it was extracted."""
    one, other = bag(5), bag(50, 2)
    for name in ("abmil", "transmil", "transformer", "clam-mb"):
        close(network(name)(pack(one, other)).output_BO[:1], network(name)(pack(one)).output_BO)


def test_dsmil_likeness_is_to_the_critical_tile_of_each_output():
    model = Dsmil(width=6, outputs=3, attention=8)
    packed = pack(bag(20), bag(9, 2))
    pooled = model(packed)
    tile_NH = packed.tile_NH[20:]
    score_NO, query_NA = model.instance(tile_NH), model.query(tile_NH)
    for output in range(3):
        critical = int(score_NO[:, output].argmax())
        likeness = (query_NA * query_NA[critical]).sum(1) / 8**0.5
        close(pooled.attention_NQ[20:, output], likeness.softmax(0))
    close(pooled.side[0].output_KO[1], score_NO.amax(0))
    assert (pooled.weight, pooled.side[0].weight, pooled.side[0].bag_K.tolist()) == (0.5, 0.5, [0, 1])


def test_a_large_bag_of_a_transformer_reads_all_tiles_through_keys_drawn_by_place():
    model = network("transformer", options={"max_keys": 16})
    one = bag(200)
    keys = model.aggregator._keys(one.xy_N2)
    assert len(keys) == 17
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    again = model.aggregator._keys(one.xy_N2[order])
    chosen, chosen_again = one.xy_N2[keys[1:] - 1], one.xy_N2[order][again[1:] - 1]
    assert sorted(chosen.tolist()) == sorted(chosen_again.tolist())
    tile_NH = one.tile_NH.clone().requires_grad_()
    model(Packed(tile_NH, (200,), one.xy_N2)).output_BO.sum().backward()
    assert (tile_NH.grad.abs().sum(1) > 0).all()


def test_a_transformer_with_all_keys_is_one_that_draws_none():
    small, large = (network("transformer", options={"max_keys": keys}) for keys in (60, 61))
    one = bag(61)
    assert small.aggregator._keys(one.xy_N2) is not None
    assert large.aggregator._keys(one.xy_N2) is None
    same_place = Bag(one.tile_NH, torch.zeros(61, 2))  # all share the last place, so all are keys
    close(small(pack(same_place)).output_BO, large(pack(same_place)).output_BO)
