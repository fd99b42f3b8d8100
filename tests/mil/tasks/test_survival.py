import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit

from pathfm.mil.tasks.contract import Bank
from tests.mil.tasks.conftest import SETTINGS, make, table
from tests.stats.plain_survival import concordance_index

# Remission of leukaemia in weeks, placebo and 6-mercaptopurine (Freireich et al. 1963), with many tied times.
PLACEBO = (1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23)
TREATED = (6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35)
RELAPSE = (1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0)


def cohort(*pairs):
    return [{"months": str(time), "died": str(event)} for time, event in pairs]


def ones(target):
    return torch.ones(len(target), 1, dtype=torch.float64)


def plain_cox(log_risk, time, event, weight):
    """Breslow's partial likelihood by a double loop."""
    total = events = 0.0
    for i in range(len(time)):
        if event[i]:
            at_risk = sum(weight[j] * np.exp(log_risk[j]) for j in range(len(time)) if time[j] >= time[i])
            total += weight[i] * (np.log(at_risk) - log_risk[i])
            events += weight[i]
    return total / events


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("digits", [0, 3])
def test_the_cox_loss_is_the_partial_likelihood(weighted, digits):
    rng = np.random.default_rng(0)
    tasks = make(**SETTINGS["cox"])
    log_risk, time, event = rng.normal(size=40), rng.exponential(5, 40).round(digits), (rng.random(40) < 0.5).astype(float)
    weight = rng.random(40) if weighted else np.ones(40)
    loss = tasks.loss(*map(torch.from_numpy, (log_risk[:, None], np.c_[time, event], weight[:, None])))
    assert loss.item() == pytest.approx(plain_cox(log_risk, time, event, weight), rel=1e-12)


def test_the_cox_loss_finds_the_published_hazard_ratio():
    """Placebo against 6-mercaptopurine: 1.509 with Breslow's ties (1.572 with Efron's)."""
    rows = cohort(*((time, 1) for time in PLACEBO), *zip(TREATED, RELAPSE, strict=True))
    tasks = make(rows, **SETTINGS["cox"])
    target = torch.from_numpy(tasks.encode(rows))
    placebo = torch.tensor([[1.0]] * 21 + [[0.0]] * 21, dtype=torch.float64)
    beta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([beta], line_search_fn="strong_wolfe", tolerance_grad=1e-10, max_iter=50)

    def step():
        optimizer.zero_grad()
        loss = tasks.loss(placebo * beta, target, ones(target))
        loss.backward()
        return loss

    optimizer.step(step)
    assert beta.item() == pytest.approx(1.509, abs=5e-4)


def test_large_outputs_neither_overflow_nor_vanish():
    rows = cohort((1, 1), (2, 1), (3, 0))
    tasks = make(rows, **SETTINGS["cox"])
    target = torch.from_numpy(tasks.encode(rows))
    output = torch.tensor([[1000.0], [-1000.0], [900.0]], dtype=torch.float64, requires_grad=True)
    loss = tasks.loss(output, target, ones(target))
    loss.backward()
    assert loss.item() == pytest.approx(1900 / 2)
    assert torch.isfinite(output.grad).all()
    assert np.isfinite(tasks.predict(output.detach().numpy(), tasks.fit_state(output.detach().numpy(), target.numpy()))).all()


def whole_fold(seed=1, count=60):
    tasks = make(**SETTINGS["cox"])
    target = torch.from_numpy(tasks.encode(table(count, seed)))
    output = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 1)))
    live = output.clone().requires_grad_()
    loss = tasks.loss(live, target, ones(target))
    loss.backward()
    return tasks, target, output, loss.item(), live.grad


def test_a_batch_with_an_up_to_date_bank_gets_the_gradient_rows_of_the_whole_fold():
    tasks, target, output, whole, gradient = whole_fold()
    mean = torch.zeros_like(gradient)
    for place in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(10):
        live = output[place].requires_grad_()
        loss = tasks.loss(live, target[place], ones(place), Bank(output, target, place))
        loss.backward()
        assert loss.item() == pytest.approx(whole)
        torch.testing.assert_close(live.grad, gradient[place] * 60 / 10)
        mean[place] += live.grad / 6
    torch.testing.assert_close(mean, gradient)  # over an epoch: the gradient of the whole fold


def test_the_latest_outputs_of_the_batch_count_not_those_in_the_bank():
    tasks, target, output, whole, _ = whole_fold()
    place, stale = torch.arange(10), output.clone()
    stale[:10] = 99.0
    assert tasks.loss(output[:10], target[:10], ones(place), Bank(stale, target, place)).item() == pytest.approx(whole)


def test_cox_loss_per_mini_batch():
    """Risk sets of a mini-batch alone (STAMP 2.5, batches of 64) give another gradient: here even of the opposite sign."""
    tasks, target, output, whole, gradient = whole_fold()
    place = torch.arange(10)
    alone = output[place].requires_grad_()
    loss = tasks.loss(alone, target[place], ones(place))
    loss.backward()
    assert abs(loss.item() - whole) > 0.5
    assert (alone.grad.sign() != gradient[place].sign()).any()
    assert not torch.allclose(alone.grad, gradient[place] * 6, atol=0.05)


def test_several_rows_of_a_bag_are_one_patient_in_the_risk_sets():
    """As pseudo-bags are, or bags that balanced sampling has drawn twice."""
    tasks, target, output, whole, gradient = whole_fold()
    place = torch.tensor([0, 1, 1, 1, 2, 0])
    live = output[place].requires_grad_()
    loss = tasks.loss(live, target[place], ones(place), Bank(output, target, place))
    loss.backward()
    assert loss.item() == pytest.approx(whole)
    torch.testing.assert_close(live.grad, gradient[place] * 60 / 3 / torch.tensor([[2], [3], [3], [3], [1], [2]]))


def test_bags_not_asked_yet_and_bags_without_times_are_in_no_risk_set():
    tasks, target, output, _, _ = whole_fold()
    known, target = output.clone(), target.clone()
    known[20:40], target[40:50] = torch.nan, torch.nan
    place, kept = torch.arange(10), [*range(20), *range(50, 60)]
    loss = tasks.loss(output[:10], target[:10], ones(place), Bank(known, target, place))
    assert loss.item() == pytest.approx(tasks.loss(output[kept], target[kept], ones(kept)).item())


def test_a_fold_without_events_is_noted_and_does_not_crash():
    """STAMP 2.5 cannot log its C-index then, and early stopping fails."""
    for kind in ("cox", "discrete"):
        tasks = make(**SETTINGS[kind])
        target = np.array([[3.0, 0], [5.0, 0], [np.nan, np.nan]])
        output = torch.zeros(3, tasks.outputs, dtype=torch.float64, requires_grad=True)
        part = tasks.for_part(target)
        loss = part.loss(output, torch.from_numpy(target), ones(target))
        loss.backward()
        said = part.predict(output.detach().numpy(), part.fit_state(output.detach().numpy(), target))
        assert tasks.notes(target) == ["os: no event is observed, so nothing about risk can be learned or judged"]
        assert np.isfinite([loss.item(), *said.ravel()]).all()
        assert torch.isfinite(output.grad).all()


def test_cox_predictions_by_hand():
    """Baseline hazards 1/2 at 1 and 3/2 from 2 on; survival until 4 is 1, e^-1/2, e^-3/2, e^-3/2."""
    rows = cohort((1, 1), (2, 1), (4, 0))
    tasks = make([*rows, *cohort((4, 1))], **SETTINGS["cox"], horizons=[1, 4])
    state = {"os": {"center": [1.0], "time": [1.0, 2.0], "hazard": [0.5, 1.5]}}
    said = tasks.predict(np.array([[1.0]]), state)[0]
    mean = (1 + np.exp(-0.5) + 2 * np.exp(-1.5)) / 4
    np.testing.assert_allclose(said, [1 - mean, np.exp(-0.5), np.exp(-1.5)])
    assert tasks.columns == ("risk", "survival_1", "survival_4")


def test_risk_orders_bags_as_the_output_does_and_shifts_do_not_matter():
    tasks = make(**SETTINGS["cox"])
    target, output = tasks.encode(table()), np.random.default_rng(0).normal(size=(60, 1))
    said = tasks.predict(output, tasks.fit_state(output, target))
    shifted = tasks.predict(output + 500, tasks.fit_state(output + 500, target))
    np.testing.assert_array_equal(np.argsort(said[:, 0]), np.argsort(output[:, 0]))
    np.testing.assert_allclose(said, shifted, rtol=1e-9)
    assert concordance_index(said[:, 0], *target.T) == concordance_index(output[:, 0], *target.T)


def test_a_perfect_fit_is_calibrated():
    """With the true log risks, mean predicted survival is the survival that is observed."""
    rng = np.random.default_rng(4)
    log_risk = rng.normal(size=3000)
    time = rng.exponential(10 * np.exp(-log_risk))
    rows = cohort(*((f"{value:.6f}", 1) for value in time))
    tasks = make(rows, **SETTINGS["cox"], horizons=[3, 10, 20])
    said = tasks.predict(log_risk[:, None], tasks.fit_state(log_risk[:, None], tasks.encode(rows)))
    np.testing.assert_allclose(said[:, 1:].mean(0), [(time > horizon).mean() for horizon in (3, 10, 20)], atol=0.01)
    assert 1 - said[:, 0].mean() == pytest.approx(np.minimum(time, 20).mean() / 20, abs=0.01)


def discrete(intervals=3, **more):
    """Events at 1..6 and one censored at 9: three intervals end at 2, 4 and 6."""
    rows = cohort(*((time, 1) for time in range(1, 7)), (9, 0))
    return make(rows, **{**SETTINGS["discrete"], "intervals": intervals, **more})


def plain_discrete(output, time, event, ends):
    """Interval by interval."""
    loss, start = 0.0, 0.0
    for logit, end in zip(output, ends, strict=True):
        if event and time <= end:
            return loss - np.log(expit(logit))
        if not event and time <= (start + end) / 2:
            return loss
        loss -= np.log(1 - expit(logit))
        start = end
    return loss


def test_intervals_hold_equal_numbers_of_events_of_the_training_part():
    tasks = discrete()
    assert tasks.main.ends == (2, 4, 6)
    part = tasks.for_part(np.array([[10.0, 1], [20, 1], [30, 1], [99, 0]]))
    assert part.main.ends == (10, 20, 30)
    assert part.fit_state(np.zeros((1, 3)), np.zeros((1, 2))) == {"os": {"ends": [10, 20, 30]}}
    assert part.outputs == tasks.outputs == 3


@pytest.mark.parametrize("time", [0, 1, 1.5, 2, 2.9, 3, 3.1, 4, 5.5, 6, 7, 50])
@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize("intervals", [3, 9])
def test_the_discrete_loss_is_the_likelihood_interval_by_interval(time, event, intervals):
    tasks = discrete(intervals)
    output = np.random.default_rng(0).normal(size=(1, intervals))
    loss = tasks.loss(torch.from_numpy(output), torch.tensor([[time, event]], dtype=torch.float64), ones([0]))
    assert loss.item() == pytest.approx(plain_discrete(output[0], time, event, tasks.main.ends))


def test_discrete_survival_is_the_product_of_passing():
    tasks = discrete(horizons=[2, 3, 6, 8])
    output = np.array([[0.3, -1.0, 2.0]])
    said = tasks.predict(output, {"os": {"ends": [2.0, 4.0, 6.0]}})[0]
    passing = 1 - expit(output[0])
    ends = np.cumprod(passing)
    np.testing.assert_allclose(said[1:], [ends[0], ends[0] * passing[1] ** 0.5, ends[2], ends[2]])

    def survival(at):
        return float(np.exp(np.interp(at, [0, 2, 4, 6], np.log([1.0, *ends]))))

    mean = quad(survival, 0, 8, points=[2, 4, 6])[0] / 8
    assert said[0] == pytest.approx(1 - mean)


def test_equal_event_times_leave_intervals_empty_not_the_head_narrower():
    rows = cohort((5, 1), (5, 1), (5, 1), (7, 0), (3, 0))
    tasks = make(rows, **SETTINGS["discrete"])
    assert tasks.main.ends == (5, 5, 5)
    target = torch.from_numpy(tasks.encode(rows))
    output = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    tasks.loss(output, target, ones(target)).backward()
    assert torch.isfinite(output.grad).all()
    assert np.isfinite(tasks.predict(np.zeros((1, 3)), tasks.fit_state(np.zeros((1, 3)), target.numpy()))).all()


def test_horizons_are_quartiles_of_the_event_times_unless_given():
    assert discrete().main.horizons == (2.25, 3.5, 4.75)
    assert discrete(horizons=[5, 2.5, 5]).columns == ("risk", "survival_2.5", "survival_5")


def test_strata_are_event_and_quarter_of_time():
    task = discrete().main
    assert [task.stratum(np.array(row)) for row in ([1.0, 1], [9.0, 0])] == ["event, quarter 1", "censored, quarter 4"]


def test_a_bag_that_lacks_time_or_event_takes_no_part():
    tasks = make(**SETTINGS["cox"])
    rows = [{"months": "3", "died": ""}, {"months": "", "died": "1"}, {"months": "3", "died": "1.0"}]
    np.testing.assert_array_equal(tasks.encode(rows), [[np.nan, np.nan], [np.nan, np.nan], [3, 1]])
