"""What is shown is what was predicted: one code path, gradients against autograd and differences, curves against counting."""

import numpy as np
import pytest
import torch

from pathfm.errors import SlideError
from pathfm.mil.aggregators.contract import Packed
from pathfm.mil.bags import Bag
from pathfm.mil.explain import (
    asked_again,
    attention_maps,
    deletion_insertion,
    directions,
    gradient_maps,
    gradient_x_input,
    tile_scores,
)
from pathfm.mil.fit import Fitted, ask
from pathfm.mil.network import NetworkSpec, build_network
from pathfm.mil.tasks.classes import Binary, Multiclass, Multilabel, Ordinal
from pathfm.mil.tasks.regression import Regression
from pathfm.mil.tasks.task_set import TaskSet

DIM = 10
BINARY = TaskSet((Binary(name="label", classes=("normal", "tumour"), positive=1),))
THREE = TaskSet((Multiclass(name="label", classes=("a", "b", "c"), positive=2),))


def network(name, outputs=2, seed=0, dim=DIM):
    built = build_network(NetworkSpec(dim, outputs, name, hidden=12, attention=6, dropout=0.25))
    draw = torch.Generator().manual_seed(seed)
    built.draw_weights(draw)
    built.mean_D.copy_(torch.randn(dim, generator=draw))
    built.scale_D.copy_(torch.rand(dim, generator=draw) + 0.5)
    return built


def bag(tiles=17, seed=1, half=False):
    draw = torch.Generator().manual_seed(seed)
    feature = torch.randn(tiles, DIM, generator=draw)
    places = torch.stack([torch.arange(tiles) % 5, torch.arange(tiles) // 5], dim=1).float()
    return Bag(feature.half() if half else feature, places)


@pytest.mark.parametrize("name", ["mean", "max", "abmil", "transformer", "class-queries"])
@pytest.mark.parametrize("half", [False, True])
def test_maps_explain_the_very_prediction_that_was_made(name, half):
    # CLAM's heatmaps and its evaluation predict differently (CLAM#154): two code paths.
    net = network(name).train()
    tiles = bag(half=half)
    asked = ask(net, tiles)
    explained = gradient_x_input(net.train(), tiles, np.eye(2))
    np.testing.assert_allclose(explained.output_O, asked.output_O, atol=1e-6)
    assert not net.training
    scores = tile_scores(asked, [Fitted(net, 0, (), {})], tiles, BINARY)
    if asked.attention_NQ is None:
        assert scores.kind == "gradient x input"
        np.testing.assert_allclose(scores.value_NC[:, 0], explained.score_NC @ [-1, 1], atol=1e-6)
    else:
        assert scores.kind == "attention"
        np.testing.assert_array_equal(scores.value_NC, asked.attention_NQ)


@pytest.mark.parametrize("name", ["max", "abmil", "transformer"])
def test_gradient_x_input_is_autograds_on_the_features_themselves(name):
    net, tiles = network(name, 3).eval(), bag()
    feature = tiles.feature_ND.clone().requires_grad_()
    output = net(Packed(feature, (17,), tiles.xy_N2)).output_BO[0]
    wanted = []
    for one in output:
        (slope,) = torch.autograd.grad(one, feature, retain_graph=True)
        wanted.append((slope * (tiles.feature_ND - net.mean_D)).sum(dim=1).numpy())
    found = gradient_x_input(net, tiles, np.eye(3)).score_NC
    np.testing.assert_allclose(found, np.stack(wanted, axis=1), atol=1e-5)


def test_scores_agree_with_differences_of_the_prediction():
    net, tiles = network("abmil").eval(), bag()
    found = gradient_x_input(net, tiles, np.array([[-1.0, 1.0]])).score_NC[:, 0]
    step = 1e-2
    for tile in (0, 8, 16):
        sides = []
        for sign in (-1, 1):
            moved = tiles.feature_ND.clone()
            moved[tile] += sign * step * (moved[tile] - net.mean_D)
            sides.append(ask(net, Bag(moved, tiles.xy_N2)).output_O @ [-1, 1])
        assert found[tile] == pytest.approx((sides[1] - sides[0]) / (2 * step), abs=2e-3)


def test_a_tile_like_the_training_mean_speaks_for_nothing():
    net, tiles = network("mean"), bag()
    tiles.feature_ND[4] = net.mean_D
    assert gradient_x_input(net, tiles, np.eye(2)).score_NC[4] == pytest.approx([0, 0], abs=1e-6)


def test_gradients_do_not_depend_on_the_order_of_tiles():
    net, tiles = network("transformer"), bag()
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    shuffled = gradient_x_input(net, Bag(tiles.feature_ND[order], tiles.xy_N2[order]), np.eye(2)).score_NC
    np.testing.assert_allclose(shuffled, gradient_x_input(net, tiles, np.eye(2)).score_NC[order], atol=1e-5)


def test_empty_bags_have_a_named_error():
    with pytest.raises(SlideError, match="without tiles"):
        gradient_x_input(network("mean"), Bag(torch.zeros(0, DIM), torch.zeros(0, 2)), np.eye(2))


def test_directions_compare_a_class_with_the_others():
    # The gradient of a softmax is about nothing where the network is sure; logits, and only their differences, matter.
    names, direction = directions(BINARY)
    assert (names, direction.tolist()) == (("tumour",), [[-1, 1]])
    names, direction = directions(THREE)
    assert names == ("a", "b", "c")
    np.testing.assert_allclose(direction, [[1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1]])
    shifted = np.array([0.3, 2.0, -1.0])
    np.testing.assert_allclose(direction @ shifted, direction @ (shifted + 7))


def test_directions_of_other_tasks_leave_the_further_ones_out():
    ordinal, labels = Ordinal(name="grade", classes=("1", "2", "3")), Multilabel(name="m", classes=("x", "y"))
    assert directions(TaskSet((ordinal, labels)))[0] == ("3",)
    np.testing.assert_array_equal(directions(TaskSet((ordinal, labels)))[1], [[1, 1, 0, 0]])
    assert directions(TaskSet((labels, ordinal)))[0] == ("x", "y")
    number = TaskSet((Regression(name="age"), *BINARY.tasks))
    assert directions(number)[0] == ("age",)
    np.testing.assert_array_equal(directions(number)[1], [[1, 0, 0]])


def test_class_wise_attention_is_named_by_the_classes_of_the_main_task():
    both = TaskSet((*THREE.tasks, *(Binary(name="other", classes=("n", "y"), positive=1),)))
    attention = np.random.default_rng(0).random((6, 5))
    found = attention_maps(attention, np.log(attention), both)
    assert (found.names, found.main) == (("a", "b", "c"), 2)
    np.testing.assert_array_equal(found.value_NC, attention[:, :3])
    np.testing.assert_array_equal(found.logit_NC, np.log(attention)[:, :3])
    assert attention_maps(attention[:, :1], None, both).names == ("",)
    grades = TaskSet((Ordinal(name="grade", classes=("1", "2", "3")),))
    assert attention_maps(attention[:, :2], None, grades).names == ("above 1", "above 2")


def test_an_ensemble_is_explained_by_the_mean_of_its_members():
    nets, tiles = [network("max", 3, seed) for seed in range(3)], bag()
    direction = directions(THREE)[1]
    each = [gradient_x_input(net, tiles, direction).score_NC for net in nets]
    np.testing.assert_allclose(gradient_maps(nets, tiles, THREE).value_NC, np.mean(each, axis=0))
    np.testing.assert_allclose(gradient_maps(nets, tiles, THREE).value_NC.sum(axis=1), 0, atol=1e-5)


def planted(kept):
    """What a perfect model says of a bag of 40 whose first four tiles are lesion."""
    return float((kept < 4).any())


def test_curves_fall_and_rise_with_the_tiles_that_matter():
    score = -np.arange(40.0)
    found = deletion_insertion(planted, score, seed=0)
    assert (found.kept_K[0], found.kept_K[-1]) == (1, 40)
    assert len(found.kept_K) <= 21
    assert found.deletion_K[-1] == found.insertion_K[0] == 1.0
    assert found.deletion_K[-3] == 0.0  # 36 tiles are left, all of the lesion is gone
    assert found.deletion_area < found.random_area < found.insertion_area == 1.0
    backward = deletion_insertion(planted, -score, seed=0)
    assert backward.deletion_area > found.random_area > backward.insertion_area


def test_curves_are_the_means_of_asking_by_hand():
    weight = np.random.default_rng(0).random(7)
    found = deletion_insertion(lambda kept: float(weight[kept].mean()), weight, seed=0, steps=50, repeats=2)
    order = np.argsort(-weight)
    assert found.kept_K == (1, 2, 3, 4, 5, 6, 7)
    assert found.insertion_K == pytest.approx([weight[order[:kept]].mean() for kept in range(1, 8)])
    assert found.deletion_K == pytest.approx([weight[order[7 - kept :]].mean() for kept in range(1, 8)])
    assert found.insertion_area == pytest.approx(np.trapezoid(found.insertion_K) / 6)


def test_scores_that_say_nothing_do_no_better_than_chance():
    rng = np.random.default_rng(0)
    gains = []
    for seed in range(40):
        found = deletion_insertion(planted, rng.random(40), seed, steps=10, repeats=5)
        gains.append(found.random_area - found.deletion_area)
    assert abs(np.mean(gains)) < 3 * np.std(gains) / np.sqrt(40)


def test_curves_cost_what_is_said_and_come_out_the_same():
    asked = []

    def count(kept):
        assert (np.diff(kept) > 0).all()  # tiles stay in their order
        asked.append(len(kept))
        return len(kept) / 500

    first = deletion_insertion(count, np.zeros(500), seed=3, steps=20, repeats=5)
    assert len(asked) == 7 * 21
    assert min(asked) >= 1
    assert deletion_insertion(count, np.zeros(500), seed=3, steps=20, repeats=5) == first
    lone = deletion_insertion(lambda kept: 0.25, np.ones(1), seed=0)
    assert (lone.kept_K, lone.deletion_area, lone.random_area) == ((1,), 0.25, 0.25)
    assert set(first.record()) == set(first._fields)


def test_a_network_asked_again_with_all_tiles_says_the_same():
    nets, tiles = [network("abmil", 2, seed) for seed in range(2)], bag()
    states = {"label": {}}
    predict = asked_again([Fitted(net, 0, (), states) for net in nets], tiles, BINARY, 1)
    wanted = np.mean([BINARY.predict(ask(net, tiles).output_O[None], states)[0, 1] for net in nets])
    assert predict(np.arange(17)) == wanted
    part = Bag(tiles.feature_ND[[2, 5]], tiles.xy_N2[[2, 5]])
    wanted = np.mean([BINARY.predict(ask(net, part).output_O[None], states)[0, 1] for net in nets])
    assert predict(np.array([2, 5])) == pytest.approx(wanted)
