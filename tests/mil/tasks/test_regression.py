import numpy as np
import pytest
import torch

from tests.mil.tasks.conftest import SETTINGS, make, table


def test_the_network_learns_in_units_of_its_training_part():
    tasks = make(**SETTINGS["regression"])
    target = tasks.encode(table())
    part = tasks.for_part(target[:20])
    state = part.fit_state(np.zeros((20, 1)), target[:20])
    assert state == {"age": {"mean": [pytest.approx(target[:20].mean())], "deviation": [pytest.approx(target[:20].std())]}}
    unit = (target[:20] - target[:20].mean()) / target[:20].std()
    assert part.loss(torch.from_numpy(unit), torch.from_numpy(target[:20]), torch.ones(20, 1)).item() == pytest.approx(0)
    np.testing.assert_allclose(part.predict(unit, state), target[:20])
    assert tasks.columns == ("value",)


def test_other_bags_have_no_part_in_the_unit():
    rows = table()
    part = make(rows, **SETTINGS["regression"]).encode(rows[:20])
    rows[50]["age"] = "900"
    other = make(rows, **SETTINGS["regression"])
    state = make(table(), **SETTINGS["regression"]).for_part(part).fit_state(np.zeros((20, 1)), part)
    assert other.for_part(part).fit_state(np.zeros((20, 1)), part) == state


def test_the_loss_is_hubers():
    tasks = make([{"age": "-1"}, {"age": "1"}], **SETTINGS["regression"])
    output, target = torch.tensor([[0.5], [4.0]]), torch.tensor([[0.0], [0.0]])
    assert tasks.loss(output, target, torch.ones(2, 1)).item() == pytest.approx((0.5 * 0.5**2 + (4 - 0.5)) / 2)


def test_a_part_without_different_values_is_noted_and_learned_in_units_of_one():
    tasks = make(**SETTINGS["regression"])
    flat = np.array([[0.1], [0.1], [0.1], [np.nan]])
    assert tasks.notes(flat) == ["age: no two bags with different values of age"]
    assert tasks.for_part(flat).main.deviation == 1
    assert tasks.for_part(flat * np.nan) == tasks


def test_strata_are_quarters_of_all_numbers():
    tasks = make([{"age": str(value)} for value in range(1, 101)], **SETTINGS["regression"])
    assert [tasks.main.stratum(np.array([value])) for value in (1.0, 30, 60, 100)] == [f"quarter {n}" for n in (1, 2, 3, 4)]
