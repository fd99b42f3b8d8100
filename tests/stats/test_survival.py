import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.stats.survival import breslow, censoring_curve, kaplan_meier
from tests.stats.plain_survival import concordance_index, time_dependent_auc

# Remission of leukaemia under 6-mercaptopurine, in weeks (Freireich et al. 1963), and the published Kaplan-Meier curve.
TREATED = (6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35)
RELAPSE = (1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0)
PUBLISHED = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}


@st.composite
def cohorts(draw, most=25):
    """Few distinct times and risks, so that ties are the rule."""
    count = draw(st.integers(2, most))
    column = {"min_size": count, "max_size": count}
    time = draw(st.lists(st.integers(0, 8), **column))
    event = draw(st.lists(st.booleans(), **column))
    risk = draw(st.lists(st.integers(-3, 3), **column))
    return np.array(risk, dtype=float), np.array(time, dtype=float), np.array(event)


def plain_concordance(risk, time, event):
    right = pairs = 0
    for i in range(len(risk)):
        for j in range(len(risk)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                right += 1 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0
    return right / pairs if pairs else None


def plain_followed(time, event, until):
    """Chance of not being censored before ``until``: events at a time come before censoring at it."""
    share = 1.0
    for at in sorted(set(time[~event].tolist())):
        if at < until:
            risk = sum(1 for t, e in zip(time, event, strict=True) if t > at or (t == at and not e))
            lost = sum(1 for t, e in zip(time, event, strict=True) if t == at and not e)
            share *= 1 - lost / risk
    return share


def plain_auc(risk, time, event, horizon):
    above = below = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            if event[i] and time[i] <= horizon < time[j]:
                weight = 1 / plain_followed(time, event, time[i])
                below += weight
                above += weight * (1 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0)
    return above / below if below else None


def test_the_kaplan_meier_curve_is_the_published_one():
    curve = kaplan_meier(TREATED, RELAPSE)
    assert dict(zip(curve.time_T.tolist(), curve.value_T.round(3).tolist(), strict=True)) == PUBLISHED
    assert curve.at([0, 5.9, 6, 12, 40]).round(3).tolist() == [1, 1, 0.857, 0.753, 0.448]
    assert curve.at(6, before=True) == 1


@given(cohorts())
def test_kaplan_meier_is_the_product_of_its_steps(cohort):
    _, time, event = cohort
    for until in range(9):
        share = 1.0
        for at in sorted(set(time[event].tolist())):
            share *= 1 - ((time == at) & event).sum() / (time >= at).sum() if at <= until else 1
        assert kaplan_meier(time, event).at(until) == pytest.approx(share)
        assert censoring_curve(time, event).at(until, before=True) == pytest.approx(plain_followed(time, event, until))


def test_without_censoring_the_curve_is_the_share_still_there():
    time = np.array([1.0, 2, 2, 5])
    curve = kaplan_meier(time, np.ones(4))
    assert curve.at([0, 1, 2, 5]).tolist() == [1, 0.75, 0.25, 0]


def test_breslow_by_hand():
    """Risks 1, 2, 4; events at 1 (all at risk) and at 3 (the last one)."""
    curve = breslow(np.log([1.0, 2, 4]), [1, 2, 3], [1, 0, 1])
    assert curve.time_T.tolist() == [1, 3]
    np.testing.assert_allclose(curve.value_T, [1 / 7, 1 / 7 + 1 / 4])
    np.testing.assert_allclose(curve.at([0.5, 1, 2.5, 9]), [0, 1 / 7, 1 / 7, 1 / 7 + 1 / 4])


@given(cohorts())
def test_breslow_is_events_over_summed_risks(cohort):
    risk, time, event = cohort
    hazard = [((time == at) & event).sum() / np.exp(risk[time >= at]).sum() for at in sorted(set(time[event].tolist()))]
    np.testing.assert_allclose(breslow(risk, time, event).value_T, np.cumsum(hazard))


def test_equal_risks_give_nelson_aalen_and_a_shift_only_scales():
    plain = breslow(np.zeros(21), TREATED, RELAPSE)
    assert plain.value_T[0] == pytest.approx(3 / 21)
    np.testing.assert_allclose(breslow(np.full(21, 600.0), TREATED, RELAPSE).value_T, plain.value_T * np.exp(-600))


@given(cohorts())
def test_the_c_index_is_that_of_all_pairs(cohort):
    expected = plain_concordance(*cohort)
    if expected is None:
        with pytest.raises(ValueError, match="C-index needs"):
            concordance_index(*cohort)
    else:
        assert concordance_index(*cohort) == pytest.approx(expected, abs=1e-12)


def test_the_c_index_by_hand():
    """Pairs with an order: 1-2, 1-3, 1-4, 3-4; the risks have 1-2, 1-4 and 3-4 right, and 1-3 equal."""
    assert concordance_index([3, 1, 3, 2], [1, 2, 3, 4], [1, 0, 1, 0]) == 3.5 / 4
    assert concordance_index([2, 1], [5, 5], [1, 0]) == 1  # censored at the time of the event: followed longer


@given(cohorts(), st.integers(0, 8))
def test_the_time_dependent_auc_is_that_of_all_pairs(cohort, horizon):
    expected = plain_auc(*cohort, horizon)
    if expected is None:
        with pytest.raises(ValueError, match="the AUC at"):
            time_dependent_auc(*cohort, horizon)
    else:
        assert time_dependent_auc(*cohort, horizon) == pytest.approx(expected, abs=1e-12)


def test_the_time_dependent_auc_by_hand():
    """Events at 1 and 3; one of two others is lost at 2, when three were followed: the event at 3 counts for 1 / (2 / 3)."""
    risk, time, event = [1, 9, 4, 2], [1, 2, 3, 6], [1, 0, 1, 0]
    assert time_dependent_auc(risk, time, event, 4) == pytest.approx(1.5 / 2.5)


def test_without_censoring_the_time_dependent_auc_is_the_auroc():
    from pathfm.stats.metrics import auroc

    rng = np.random.default_rng(1)
    time, risk = rng.exponential(size=80), rng.normal(size=80).round(1)
    assert time_dependent_auc(risk, time, np.ones(80), 0.7) == pytest.approx(auroc(risk, time <= 0.7))


def test_weighting_undoes_censoring():
    """A cohort half of which is lost at random has the same expected AUC as the whole one."""
    rng = np.random.default_rng(2)
    risk = rng.normal(size=20_000)
    time, lost = rng.exponential(np.exp(-risk)), rng.exponential(1.0, size=20_000)
    whole = time_dependent_auc(risk, time, np.ones(20_000), 1.0)
    seen = time_dependent_auc(risk, np.minimum(time, lost), time <= lost, 1.0)
    assert seen == pytest.approx(whole, abs=0.01)


@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_patients_plays_no_role(cohort, random):
    order = list(range(len(cohort[0])))
    random.shuffle(order)
    shuffled = [column[order] for column in cohort]
    if plain_concordance(*cohort) is not None:
        assert concordance_index(*cohort) == concordance_index(*shuffled)
    if plain_auc(*cohort, 4) is not None:
        assert time_dependent_auc(*cohort, 4) == pytest.approx(time_dependent_auc(*shuffled, 4), abs=1e-12)
    np.testing.assert_array_equal(kaplan_meier(*cohort[1:]).value_T, kaplan_meier(*shuffled[1:]).value_T)


@pytest.mark.parametrize("function", [concordance_index, breslow])
def test_what_is_not_finite_is_refused(function):
    with pytest.raises(ValueError, match="risks"):
        function([np.nan, 1], [1, 2], [1, 1])
    with pytest.raises(ValueError, match="times"):
        function([0, 1], [np.nan, 2], [1, 1])
    with pytest.raises(ValueError, match="times"):
        function([0, 1], [-1, 2], [1, 1])
