"""What holds for every kind of task."""

import json

import numpy as np
import pytest
import torch

from pathfm.mil.tasks import task_from_record, tasks_from_record
from pathfm.mil.tasks.contract import Bank
from tests.mil.tasks.conftest import SETTINGS, make, table


def outputs(tasks, count=60, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, tasks.outputs)))


def loss_of(tasks, output, target, weight=None):
    weight = tasks.balance(np.asarray(target)) if weight is None else weight
    return tasks.loss(output, torch.as_tensor(target), torch.as_tensor(weight))


def test_the_kind_is_found_and_shapes_are_as_stated(kind):
    tasks = make(**SETTINGS[kind])
    target = tasks.encode(table())
    states = tasks.fit_state(outputs(tasks).numpy(), target)
    assert tasks.main.kind == kind
    assert target.shape == (60, tasks.targets)
    assert tasks.predict(outputs(tasks).numpy(), states).shape == (60, len(tasks.columns))
    assert np.isfinite(tasks.predict(30 * outputs(tasks).numpy(), states)).all()
    assert tasks.balance(target).mean() == pytest.approx(1)


def test_a_record_gives_the_same_task_again(kind):
    tasks = make(**SETTINGS[kind])
    record = json.loads(json.dumps(tasks.record()))
    assert record == tasks.record()
    assert tasks_from_record(record) == tasks
    assert task_from_record(record["tasks"][0]) == tasks.main


def test_states_survive_json(kind):
    tasks = make(**SETTINGS[kind])
    output = outputs(tasks).numpy()
    states = tasks.fit_state(output, tasks.encode(table()))
    again = json.loads(json.dumps(states))
    np.testing.assert_array_equal(tasks.predict(output, again), tasks.predict(output, states))


def test_the_order_of_rows_plays_no_role(kind):
    rows, order = table(), np.random.default_rng(1).permutation(60)
    tasks, shuffled = make(rows, **SETTINGS[kind]), make([rows[place] for place in order], **SETTINGS[kind])
    assert tasks == shuffled
    target, output = tasks.encode(rows), outputs(tasks)
    assert torch.allclose(loss_of(tasks, output, target), loss_of(tasks, output[order], target[order]), rtol=1e-12)
    states, other = (tasks.fit_state(output.numpy()[at], target[at]) for at in (np.arange(60), order))
    np.testing.assert_allclose(tasks.predict(output.numpy(), states), tasks.predict(output.numpy(), other), rtol=1e-10)


def test_a_class_that_is_missing_in_a_fold_does_not_change_the_head(kind):
    """Categories inferred separately for training and validation change head widths (STAMP 2.5)."""
    rows = table()
    tasks = make(rows, **SETTINGS[kind])
    part = [row for row in rows if row["organ"] == "lung" and row["grade"] == "low" and row["died"] == "0"]
    target = tasks.encode(part)
    learned = tasks.for_part(target)
    assert (learned.outputs, learned.columns) == (tasks.outputs, tasks.columns)
    assert torch.isfinite(loss_of(learned, outputs(tasks)[: len(part)], target))


def test_without_any_target_the_loss_and_its_gradient_are_zero(kind):
    tasks = make(**SETTINGS[kind])
    output = outputs(tasks, 5).requires_grad_()
    target = torch.full((5, tasks.targets), torch.nan)
    bank = Bank(outputs(tasks), torch.from_numpy(tasks.encode(table())), torch.arange(5))
    for known in (None, bank):
        output.grad = None
        loss = tasks.loss(output, target, torch.ones(5, 1), known)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(output.grad, torch.zeros_like(output))


def test_bags_without_a_target_take_no_part(kind):
    tasks = make(**SETTINGS[kind])
    target, output = tasks.encode(table()), outputs(tasks)
    holed = target.copy()
    holed[::3] = np.nan
    kept = np.arange(60) % 3 > 0
    for weight in (np.ones((60, 1)), np.arange(1.0, 61)[:, None]):
        full = loss_of(tasks, output, holed, weight)
        assert torch.allclose(full, loss_of(tasks, output[kept], target[kept], weight[kept]), rtol=1e-12)
    output.requires_grad_()
    loss_of(tasks, output, holed).backward()
    assert not output.grad[::3].any()
    np.testing.assert_allclose(tasks.balance(holed)[kept], tasks.balance(target[kept]))


def test_weights_scale_the_gradient(kind):
    """So that a rare class weighs more even in a batch of its own; a partial likelihood only compares bags with each other."""
    tasks = make(**SETTINGS[kind])
    target, weight = tasks.encode(table()), np.random.default_rng(3).random((60, 1)) + 0.1
    once, seven = (outputs(tasks).requires_grad_() for _ in range(2))
    loss_of(tasks, once, target, weight).backward()
    loss_of(tasks, seven, target, 7 * weight).backward()
    torch.testing.assert_close((1 if kind == "cox" else 7) * once.grad, seven.grad, rtol=1e-12, atol=1e-15)


def test_a_weight_of_two_is_the_bag_twice(kind):
    tasks = make(**SETTINGS[kind])
    target, output, weight = tasks.encode(table()), outputs(tasks), np.ones((60, 1))
    weight[4] = 2
    place = [*range(60), 4]
    twice = loss_of(tasks, output[place], target[place], np.ones((61, 1)))
    known = int((~np.isnan(target).any(axis=1) if kind != "multilabel" else ~np.isnan(target).all(axis=1)).sum())
    if kind != "cox":  # means over 61 and 60 bags
        twice = twice * (known + 1) / known
    assert torch.allclose(loss_of(tasks, output, target, weight), twice, rtol=1e-12)


def test_gradients_are_those_of_finite_differences(kind):
    tasks = make(**SETTINGS[kind])
    target = torch.from_numpy(tasks.encode(table()))[:12]
    weight = torch.rand(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    output = outputs(tasks, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: tasks.loss(value, target, weight), output)


def test_half_precision_outputs_are_judged_in_float32(kind):
    tasks = make(**SETTINGS[kind])
    output, target = outputs(tasks).to(torch.bfloat16), tasks.encode(table()).astype(np.float32)
    loss = loss_of(tasks, output, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_of(tasks, output.double(), target).item(), rel=1e-4)


def test_predictions_of_several_networks_may_be_averaged(kind):
    """On their scale: probabilities still sum to 1, survival still falls."""
    tasks = make(**SETTINGS[kind])
    target = tasks.encode(table())
    said = [
        tasks.predict(scale * outputs(tasks, seed=seed).numpy(), tasks.fit_state(outputs(tasks, seed=seed).numpy(), target))
        for seed, scale in ((0, 1), (1, 3), (2, 0.1))
    ]
    mean = np.mean(said, axis=0)
    if kind in ("binary", "multiclass", "ordinal"):
        np.testing.assert_allclose(mean.sum(1), 1)
    if kind in ("cox", "discrete"):
        assert (np.diff(mean[:, 1:]) <= 1e-12).all()
    if kind != "regression":
        assert ((mean >= 0) & (mean <= 1)).all()


def test_every_bag_has_a_stratum_unless_its_target_is_missing(kind):
    tasks = make(**SETTINGS[kind])
    strata = {tasks.main.stratum(row) for row in tasks.encode(table())}
    assert len(strata) > 1
    assert "" not in strata
    assert tasks.main.stratum(np.full(tasks.targets, np.nan)) == ""


def test_a_good_part_has_no_note(kind):
    tasks = make(**SETTINGS[kind])
    assert tasks.notes(tasks.encode(table())) == []
    assert tasks.notes(np.full((3, tasks.targets), np.nan))


@pytest.mark.parametrize("train_in_batches", [False, True])
def test_a_linear_model_learns(kind, train_in_batches):
    """From a planted direction: predictions on new bags follow it."""
    rng = np.random.default_rng(5)
    signal = rng.normal(size=400)
    feature = np.c_[signal, rng.normal(size=(400, 3))]
    rows = [planted(value, rng) for value in signal]
    tasks = make(rows[:250], **SETTINGS[kind]).for_part(make(rows, **SETTINGS[kind]).encode(rows[:250]))
    weight_DO = fitted(tasks, torch.from_numpy(feature[:250]), torch.from_numpy(tasks.encode(rows[:250])), train_in_batches)
    states = tasks.fit_state(feature[:250] @ weight_DO, tasks.encode(rows[:250]))
    said = tasks.predict(feature[250:] @ weight_DO, states)
    first = {"multilabel": 0, "regression": 0, "cox": 0, "discrete": 0}.get(kind, tasks.main.positive)
    truth = (signal if kind != "multiclass" else -np.abs(signal))[250:]
    assert np.corrcoef(said[:, first], truth)[0, 1] > 0.7


def planted(value, rng):
    time, lost = rng.exponential(10 * np.exp(-1.5 * value)), rng.exponential(30)
    return {
        "lesion": "yes" if value > 0 else "no",
        # "skin" lies in the middle, which a linear model finds too: its logit stays between the others.
        "organ": "colon" if value < -0.5 else "lung" if value > 0.5 else "skin",
        "braf": str(int(value > 0.3)),
        "kras": str(int(value < 0)),
        "grade": "low" if value < -0.5 else "high" if value > 0.5 else "mid",
        "age": f"{60 + 10 * value:.3f}",
        "months": f"{min(time, lost):.3f}",
        "died": str(int(time <= lost)),
    }


def fitted(tasks, feature, target, in_batches):
    weight_FK = torch.from_numpy(tasks.balance(target.numpy()))
    weight_DO = torch.zeros(feature.shape[1], tasks.outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight_DO], lr=0.05)
    bank = torch.full((len(feature), tasks.outputs), torch.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(15 if in_batches else 100):
        order = torch.randperm(len(feature), generator=generator)
        for place in order.split(16 if in_batches else len(feature)):
            output = feature[place] @ weight_DO
            bank[place] = output.detach()
            loss = tasks.loss(output, target[place], weight_FK[place], Bank(bank, target, place) if in_batches else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight_DO.detach().numpy()
