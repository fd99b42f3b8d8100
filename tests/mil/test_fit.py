"""Training: what may have a say, what may not, and that the same seed gives the same network."""

import pytest
import torch

from pathfm.errors import TrainingError
from pathfm.mil.bags import tile_statistics
from pathfm.mil.fit import Bags, ask, evaluate_loss, fit
from pathfm.study import MilSettings

SETTINGS = MilSettings(hidden=16, attention=8, epochs=8, patience=8, batch_bags=4)


def make_bags(count, seed=0, length=6, dim=5):
    draw = torch.Generator().manual_seed(seed)
    bags = [torch.randn(length, dim, generator=draw) + 2.0 * (index % 2) for index in range(count)]
    return Bags(tuple(bags), tuple(index % 2 for index in range(count)))


def same(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_same_seed_same_network_and_global_chance_plays_no_part():
    torch.manual_seed(1)
    one = fit(make_bags(12), make_bags(4, 1), 2, SETTINGS, 7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = fit(make_bags(12), make_bags(4, 1), 2, SETTINGS, 7)
    other = fit(make_bags(12), make_bags(4, 1), 2, SETTINGS, 8)
    assert same(one.model, two.model)
    assert not same(one.model, other.model)
    assert before.shape == torch.get_rng_state().shape


def test_standardisation_is_fitted_on_the_training_bags_only():
    train = make_bags(12)
    far = Bags(tuple(bag + 100 for bag in make_bags(4, 1).bags), make_bags(4, 1).label_B)
    fitted = fit(train, far, 2, SETTINGS, 0)
    mean, deviation = tile_statistics(train.bags)
    assert torch.equal(fitted.model.mean_D, mean)
    assert torch.equal(fitted.model.scale_D, deviation)


def test_a_feature_that_never_varies_does_not_divide_by_zero():
    mean, deviation = tile_statistics([torch.tensor([[1.0, 3.0], [2.0, 3.0]])])
    assert mean.tolist() == [1.5, 3.0]
    assert deviation.tolist() == [0.5, 1.0]


def test_half_precision_features_are_summed_in_full_precision():
    _, deviation = tile_statistics([torch.full((100_000, 1), 300.0).half() + torch.arange(100_000).remainder(2)[:, None]])
    assert deviation.item() == pytest.approx(0.5, abs=1e-3)


def test_the_best_validation_epoch_is_kept_not_the_last():
    train, held = make_bags(12), make_bags(6, 1)
    wrong = Bags(held.bags, tuple(1 - label for label in held.label_B))  # learning makes it worse from the first epoch on
    fitted = fit(train, wrong, 2, SETTINGS.model_copy(update={"patience": 3}), 0)
    losses = [loss.validation for loss in fitted.curve]
    assert fitted.best_epoch == losses.index(min(losses)) == 0
    assert len(losses) == 4
    assert evaluate_loss(fitted.model, wrong, torch.ones(2)) == pytest.approx(min(losses), rel=1e-5)


def test_the_network_is_in_eval_mode_without_gradients_when_asked():
    fitted = fit(make_bags(8), make_bags(4, 1), 2, SETTINGS.model_copy(update={"dropout": 0.9}), 0)
    fitted.model.train()
    one, two = (ask(fitted.model, make_bags(4, 2).bags) for _ in range(2))
    assert not fitted.model.training
    assert all((a.probability_C == b.probability_C).all() for a, b in zip(one, two, strict=True))


def test_training_leaves_no_trace_of_asking():
    # Asking must not move any state (batch statistics, gradients): weights before and after are the same.
    fitted = fit(make_bags(8), make_bags(4, 1), 2, SETTINGS, 0)
    before = {name: value.clone() for name, value in fitted.model.state_dict().items()}
    ask(fitted.model, make_bags(4, 3).bags)
    assert all(torch.equal(value, before[name]) for name, value in fitted.model.state_dict().items())


def test_other_tiles_are_drawn_every_epoch(monkeypatch):
    from pathfm.mil import fit as module

    seen = []
    draw = module._draw_tiles
    monkeypatch.setattr(module, "_draw_tiles", lambda *args: seen.append(draw(*args)) or seen[-1])
    bags = Bags((torch.arange(50.0)[:, None], torch.arange(50.0)[:, None]), (0, 1))
    fit(bags, bags, 2, SETTINGS.model_copy(update={"max_bag_tiles": 5, "epochs": 4}), 0)
    drawn = [tuple(sorted(tiles[:, 0].tolist())) for tiles in seen]
    assert {len(tiles) for tiles in drawn} == {5}
    assert len(set(drawn)) == len(drawn) == 8


def test_all_tiles_are_used_when_asked_whatever_max_bag_tiles_says():
    fitted = fit(make_bags(8), make_bags(4, 1), 2, SETTINGS.model_copy(update={"max_bag_tiles": 2}), 0)
    assert len(ask(fitted.model, [torch.zeros(30, 5)])[0].attention_N) == 30


def test_rare_class_weighs_as_much_as_the_common_one():
    from pathfm.mil.fit import _class_weights

    assert _class_weights((0, 0, 0, 1), 2).tolist() == pytest.approx([2 / 3, 2.0])


def test_a_loss_that_is_not_finite_is_a_named_error():
    bad = Bags(tuple(bag * 1e38 for bag in make_bags(8).bags), make_bags(8).label_B)
    with pytest.raises(TrainingError, match="not finite"):
        fit(bad, bad, 2, SETTINGS.model_copy(update={"lr": 1e30}), 0)


def test_a_bag_in_many_chunks_is_answered_as_alone(monkeypatch):
    from pathfm.mil import fit as module

    fitted = fit(make_bags(8), make_bags(4, 1), 2, SETTINGS, 0)
    bags = make_bags(10, 4).bags
    together = ask(fitted.model, bags)
    monkeypatch.setattr(module, "ASK_TILES", 7)
    for one, two in zip(together, ask(fitted.model, bags), strict=True):
        assert one.probability_C == pytest.approx(two.probability_C, abs=1e-6)
