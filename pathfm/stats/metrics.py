"""How good predictions are against the truth: pure functions of arrays.

Every metric exists once, as a ``Statistic`` of weighted samples (``weighted_*``): with weights of one it is the metric itself,
and with the counts of resampled patients a whole bootstrap is a few products of arrays. Plain functions give the single number.

Legend: N samples, C classes, R rows of weights (resamples), K bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights of the samples [R, N], not negative -> the metric under each row of weights [R]; NaN where it is undefined (a class
without weight, a spread of zero)."""
Summary = Callable[[Floats], Floats]
"""Confusion matrices [R, C, C] (rows: truth, columns: prediction) -> a number of each [R]."""

MOST_BINS, LEAST_IN_BIN, LEAST_BINS = 10, 10, 3


def value_of(statistic: Statistic, count: int) -> float:
    """The metric of the samples themselves; NaN where it is undefined."""
    return float(statistic(np.ones((1, count)))[0])


def auroc(score_N: ArrayLike, positive_N: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half (Mann-Whitney).

    Raises:
        ValueError: only one class is present (the area is undefined, not 1), or a score is not finite.
    """
    score, positive = _checked(score_N, positive_N)
    count = int(positive.sum())
    rank_sum = rankdata(score)[positive].sum()
    return float((rank_sum - count * (count + 1) / 2) / (count * (len(score) - count)))


def macro_auroc(probability_NC: ArrayLike, label_N: ArrayLike) -> float:
    """Mean over classes of the one-versus-rest AUROC, each class counting the same."""
    probability, label = np.asarray(probability_NC, dtype=np.float64), np.asarray(label_N)
    return float(np.mean([auroc(probability[:, index], label == index) for index in range(probability.shape[1])]))


def average_precision(score_N: ArrayLike, positive_N: ArrayLike) -> float:
    """Area under the precision-recall curve by steps (average precision, AUPRC); tied scores are one threshold.

    Raises:
        ValueError: only one class is present, or a score is not finite.
    """
    score, positive = _checked(score_N, positive_N)
    return value_of(weighted_average_precision(score, positive), len(score))


def balanced_accuracy(predicted_N: ArrayLike, label_N: ArrayLike) -> float:
    """Mean over the classes present in ``label_N`` of the share that is predicted right."""
    predicted, label = np.asarray(predicted_N), np.asarray(label_N)
    hits = np.bincount(label, weights=predicted == label)
    totals = np.bincount(label)
    present = totals > 0
    return float(np.mean(hits[present] / totals[present]))


def brier(probability_NC: ArrayLike, label_N: ArrayLike) -> float:
    """Mean squared distance of the probabilities from the truth (Brier 1950).

    Two classes: of the second one's probability alone, in [0, 1]. More: summed over the classes, in [0, 2].
    """
    return float(np.mean(squared_distances(probability_NC, label_N)))


def calibration_error(confidence_N: ArrayLike, right_N: ArrayLike, bins: int | None = None) -> float:
    """Expected calibration error: mean over the samples of how far confidence and share of hits of their bin are apart.

    Bins hold equal numbers of samples (``equal_mass_bins``): less biased than equal width (Roelofs et al. 2022).
    """
    confidence = np.asarray(confidence_N, dtype=np.float64)
    return value_of(weighted_calibration_error(confidence, right_N, bins), len(confidence))


def roc_curve(score_N: ArrayLike, positive_N: ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rates at every distinct threshold, from (0, 0) to (1, 1); tied scores move together."""
    score, positive = _checked(score_N, positive_N)
    order = np.argsort(-score, kind="stable")
    score, positive = score[order], positive[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    true = np.cumsum(positive)[last_of_tie] / positive.sum()
    false = np.cumsum(~positive)[last_of_tie] / (~positive).sum()
    return np.append(0.0, false), np.append(0.0, true)


def squared_distances(probability_NC: ArrayLike, label_N: ArrayLike) -> Floats:
    """The terms [N] of the Brier score."""
    probability = np.asarray(probability_NC, dtype=np.float64)
    truth = np.asarray(label_N)[:, None] == np.arange(probability.shape[1])
    terms: Floats = (probability - truth) ** 2
    return terms[:, 1] if probability.shape[1] == 2 else terms.sum(axis=1)


def equal_mass_bins(value_N: ArrayLike, bins: int | None = None) -> NDArray[np.intp]:
    """The bin [N] of each value: by rank, with equal values in one bin; some bins may stay empty.

    Without a number, there are ``MOST_BINS``, or fewer such that each holds ``LEAST_IN_BIN`` samples.
    """
    value = np.asarray(value_N, dtype=np.float64)
    bins = bins or max(1, min(MOST_BINS, len(value) // LEAST_IN_BIN))
    places: NDArray[np.intp] = ((rankdata(value, method="min") - 1) * bins // max(1, len(value))).astype(np.intp)
    return places


def filled_bins(value_N: ArrayLike) -> int:
    """How many bins of the calibration error hold somebody."""
    return len(np.unique(equal_mass_bins(value_N)))


def too_few_bins(confidence_N: ArrayLike) -> str:
    """Why a calibration error would say next to nothing, empty where it says something: in a single bin it compares two
    means, which every calibrator makes equal."""
    count = filled_bins(confidence_N) if len(np.asarray(confidence_N)) >= LEAST_IN_BIN else 0
    what = f"{count} bin{'s' * (count != 1)} of {LEAST_IN_BIN} or more with different probabilities, {LEAST_BINS} needed"
    return what if count < LEAST_BINS else ""


def weighted_auroc(score_N: ArrayLike, positive_N: ArrayLike) -> Statistic:
    """AUROC of weighted samples."""
    positive = np.asarray(positive_N, dtype=bool)
    return weighted_order(score_N, positive, ~positive)


def weighted_order(score_N: ArrayLike, above_N: ArrayLike, below_N: ArrayLike) -> Statistic:
    """The chance that a sample drawn by ``above_N`` scores above one drawn by ``below_N``, ties counting one half.

    Both are weights of their own, which multiply those of the resample: classes give the AUROC, and cases and controls
    weighted against censoring the time-dependent AUC.
    """
    order, starts = _ties(np.asarray(score_N, dtype=np.float64))
    above_sorted, below_sorted = (np.asarray(each, dtype=np.float64)[order] for each in (above_N, below_N))

    def statistic(weight_RN: Floats) -> Floats:
        weight = weight_RN[:, order]
        above = np.add.reduceat(weight * above_sorted, starts, axis=1)
        below = np.add.reduceat(weight * below_sorted, starts, axis=1)
        wins = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
        return _ratio(wins, above.sum(axis=1) * below.sum(axis=1))

    return statistic


def weighted_average_precision(score_N: ArrayLike, positive_N: ArrayLike) -> Statistic:
    """Average precision of weighted samples."""
    order, starts = _ties(-np.asarray(score_N, dtype=np.float64))
    positive = np.asarray(positive_N, dtype=np.float64)[order]

    def statistic(weight_RN: Floats) -> Floats:
        weight = weight_RN[:, order]
        found = np.add.reduceat(weight * positive, starts, axis=1)
        called = np.cumsum(np.add.reduceat(weight, starts, axis=1), axis=1)
        true = np.cumsum(found, axis=1)
        precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
        return _ratio((found * precision).sum(axis=1), found.sum(axis=1))

    return statistic


def weighted_confusion(predicted_N: ArrayLike, label_N: ArrayLike, classes: int, summary: Summary) -> Statistic:
    """A summary of the confusion matrix of weighted samples."""
    cell = np.asarray(label_N, dtype=np.intp) * classes + np.asarray(predicted_N, dtype=np.intp)
    member = (cell[:, None] == np.arange(classes * classes)).astype(np.float64)

    def statistic(weight_RN: Floats) -> Floats:
        # Whole numbers add up to the same in any order, so that a threaded product is as repeatable as a loop.
        return summary((weight_RN @ member).reshape(-1, classes, classes))

    return statistic


def mean_recall(confusion_RCC: Floats) -> Floats:
    """Balanced accuracy: mean over classes of the share predicted right; undefined when a class is absent."""
    diagonal = np.diagonal(confusion_RCC, axis1=1, axis2=2)
    recalls: Floats = _ratio(diagonal, confusion_RCC.sum(axis=2)).mean(axis=1)
    return recalls


def recall_of(number: int) -> Summary:
    """Sensitivity for one class: the share of it that is predicted as such."""
    return lambda confusion: _ratio(confusion[:, number, number], confusion[:, number].sum(axis=1))


def specificity_of(number: int) -> Summary:
    """The share of all other classes that is not predicted as this one."""

    def summary(confusion_RCC: Floats) -> Floats:
        others = np.delete(confusion_RCC, number, axis=1)
        total = others.sum(axis=(1, 2))
        return _ratio(total - others[:, :, number].sum(axis=1), total)

    return summary


def f1_of(numbers: Sequence[int]) -> Summary:
    """Mean over the named classes of F1, the harmonic mean of precision and recall; undefined when a class is absent."""
    chosen = list(numbers)

    def summary(confusion_RCC: Floats) -> Floats:
        right = np.diagonal(confusion_RCC, axis1=1, axis2=2)[:, chosen]
        truth, called = confusion_RCC.sum(axis=2)[:, chosen], confusion_RCC.sum(axis=1)[:, chosen]
        return np.where((truth > 0).all(axis=1), _ratio(2 * right, truth + called).mean(axis=1), np.nan)

    return summary


def quadratic_kappa(confusion_RCC: Floats) -> Floats:
    """Cohen's kappa with quadratic weights (1968): 1 minus squared class distance over that expected by chance."""
    place = np.arange(confusion_RCC.shape[1])
    distance = (place[:, None] - place).astype(np.float64) ** 2
    chance = confusion_RCC.sum(axis=2)[:, :, None] * confusion_RCC.sum(axis=1)[:, None, :]
    observed = (confusion_RCC * distance).sum(axis=(1, 2)) * confusion_RCC.sum(axis=(1, 2))
    return 1.0 - _ratio(observed, (chance * distance).sum(axis=(1, 2)))


def weighted_mean(value_N: ArrayLike) -> Statistic:
    """Mean of a value per sample: Brier score, mean absolute error."""
    column = np.asarray(value_N, dtype=np.float64)[:, None]
    return lambda weight_RN: _ratio(_sums(weight_RN, column)[:, 0], weight_RN.sum(axis=1))


def weighted_calibration_error(confidence_N: ArrayLike, right_N: ArrayLike, bins: int | None = None) -> Statistic:
    """Expected calibration error of weighted samples; the bins are those of the samples without weights."""
    gap_NK = _gaps(confidence_N, right_N, bins)
    return lambda weight_RN: _ratio(np.abs(_sums(weight_RN, gap_NK)).sum(axis=1), weight_RN.sum(axis=1))


def weighted_calibration_drift(confidence_N: ArrayLike, right_N: ArrayLike, bins: int | None = None) -> Statistic:
    """How far weights move the gaps of the bins, added up: what the calibration error may be off by."""
    gap_NK = _gaps(confidence_N, right_N, bins)
    return lambda weight_RN: _ratio(np.abs(_sums(weight_RN - 1.0, gap_NK)).sum(axis=1), weight_RN.sum(axis=1))


def weighted_r2(predicted_N: ArrayLike, truth_N: ArrayLike) -> Statistic:
    """Coefficient of determination: 1 minus squared error over the squared spread of the truth."""
    predicted, truth = (np.asarray(each, dtype=np.float64) for each in (predicted_N, truth_N))
    centred = truth - truth.mean()  # close to zero, so that the difference of sums below loses no digits
    columns = np.stack([(truth - predicted) ** 2, centred, centred**2], axis=1)

    def statistic(weight_RN: Floats) -> Floats:
        error, first, second = _sums(weight_RN, columns).T
        return 1.0 - _ratio(error, _spread(second, first, weight_RN.sum(axis=1)))

    return statistic


def weighted_pearson(predicted_N: ArrayLike, truth_N: ArrayLike) -> Statistic:
    """Pearson's correlation of prediction and truth."""
    x, y = (np.asarray(each, dtype=np.float64) for each in (predicted_N, truth_N))
    x, y = x - x.mean(), y - y.mean()
    columns = np.stack([x, y, x * x, y * y, x * y], axis=1)

    def statistic(weight_RN: Floats) -> Floats:
        total = weight_RN.sum(axis=1)
        sum_x, sum_y, sum_xx, sum_yy, sum_xy = _sums(weight_RN, columns).T
        size = np.sqrt(_spread(sum_xx, sum_x, total) * _spread(sum_yy, sum_y, total))
        return np.clip(_ratio(sum_xy - sum_x * sum_y / np.maximum(total, 1e-300), size), -1.0, 1.0)

    return statistic


def weighted_concordance(risk_N: ArrayLike, time_N: ArrayLike, event_N: ArrayLike) -> Statistic:
    """Harrell's C: among pairs whose order in time is known, the share in which the one with the earlier event has the higher
    risk, ties counting one half. Of two equal times, an event is earlier than a censoring."""
    risk, time = (np.asarray(each, dtype=np.float64) for each in (risk_N, time_N))
    event = np.asarray(event_N).astype(bool)
    cases = np.flatnonzero(event)

    def statistic(weight_RN: Floats) -> Floats:
        wins, pairs = np.zeros(len(weight_RN)), np.zeros(len(weight_RN))
        for block in np.array_split(cases, max(1, len(cases) * len(risk) // 2**22)):
            later = (time[:, None] > time[block]) | ((time[:, None] == time[block]) & ~event[:, None])
            won = later * ((risk[:, None] < risk[block]) + (risk[:, None] == risk[block]) / 2)
            # Halves and whole numbers: exact in any order of adding.
            wins += ((weight_RN @ won) * weight_RN[:, block]).sum(axis=1)
            pairs += ((weight_RN @ later.astype(np.float64)) * weight_RN[:, block]).sum(axis=1)
        return _ratio(wins, pairs)

    return statistic


def weighted_macro(statistics: Sequence[Statistic]) -> Statistic:
    """Mean of several statistics, each counting the same; undefined where one is."""
    return lambda weight_RN: np.mean([statistic(weight_RN) for statistic in statistics], axis=0)


def _gaps(confidence_N: ArrayLike, right_N: ArrayLike, bins: int | None) -> Floats:
    """Confidence minus truth of each sample, in the column of its bin [N, K]."""
    confidence = np.asarray(confidence_N, dtype=np.float64)
    bin_N = equal_mass_bins(confidence, bins)
    gaps: Floats = (confidence - np.asarray(right_N, dtype=np.float64))[:, None] * (bin_N[:, None] == np.unique(bin_N))
    return gaps


def _ties(value_N: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The order of rising values, and where in it each distinct value starts."""
    order = np.argsort(value_N, kind="stable")
    return order, np.flatnonzero(np.append(len(order) > 0, np.diff(value_N[order]) != 0))


def _sums(weight_RN: Floats, columns_NK: Floats) -> Floats:
    """Weighted sums [R, K]; not by BLAS, whose order of adding depends on the number of threads."""
    sums: Floats = np.einsum("rn,kn->rk", weight_RN, np.ascontiguousarray(columns_NK.T))
    return sums


def _spread(second: Floats, first: Floats, total: Floats) -> Floats:
    """Sum of squares about the mean; zero where only rounding is left."""
    spread = second - first**2 / np.maximum(total, 1e-300)
    return np.where(spread > 1e-12 * second, spread, 0.0)


def _ratio(above: Floats, below: Floats) -> Floats:
    quotient: Floats = np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)
    return quotient


def finite(value_N: ArrayLike, what: str) -> Floats:
    """The values as float64.

    Raises:
        ValueError: one is NaN or infinite: sorted among the others it would count as something.
    """
    value = np.asarray(value_N, dtype=np.float64)
    if not np.isfinite(value).all():
        raise ValueError(f"{what} must be finite")
    return value


def _checked(score_N: ArrayLike, positive_N: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    score, positive = np.asarray(score_N, dtype=np.float64), np.asarray(positive_N, dtype=bool)
    if positive.all() or not positive.any():
        raise ValueError("AUROC needs samples of both classes")
    if not np.isfinite(score).all():
        raise ValueError("AUROC needs finite scores")
    return score, positive
