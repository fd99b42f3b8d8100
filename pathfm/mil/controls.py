"""What a result has to beat: colour alone, the amount of tissue alone, an encoder that saw no data, labels without meaning.

Legend: B bags, D feature length, C classes, N tiles of a bag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from pathfm.mil.ensemble import FoldPlaces, tested_places
from pathfm.stats.seeds import derive_seed

COLOUR = "colour histogram"
COUNT = "tile count"
UNTRAINED = "untrained encoder"
SHUFFLED = "shuffled labels"

Floats = NDArray[np.float64]


class Baseline(NamedTuple):
    """Out-of-fold answers of a baseline, per bag of the test parts.

    Attributes:
        probability_BC: class probabilities of every bag.
        tile_score: [N] per bag, decision of the regression on the tile.
    """

    probability_BC: Floats
    tile_score: tuple[Floats, ...]


def count_baseline(count_B: Sequence[int], label_B: Sequence[int], folds: Sequence[FoldPlaces], positive: int) -> Floats:
    """Probabilities [B, C] from the number of tiles alone.

    With two classes the number itself is the score (more tiles, more positive), scaled by the fold's learning part: a fitted
    direction would come out reversed in the test part of a balanced cohort and push a useless control far below one half. An
    AUROC below one half then says that positives have fewer tiles. With more classes a logistic regression is fitted.
    """
    size_B1 = np.log1p(np.asarray(count_B, dtype=np.float64))[:, None]
    if len(set(label_B)) > 2:
        return _cross_fit(size_B1, label_B, folds)[0][list(tested_places(folds))]
    probability_BC = np.zeros((len(label_B), 2))
    for fold in folds:
        scaler = StandardScaler().fit(size_B1[sorted(fold.train + fold.validation)])
        for place in fold.test:
            more = float(expit(scaler.transform(size_B1[[place]])[0, 0]))
            probability_BC[place, [positive, 1 - positive]] = more, 1 - more
    return probability_BC[list(tested_places(folds))]


def colour_baseline(bags: Sequence[Floats], label_B: Sequence[int], folds: Sequence[FoldPlaces], positive: int) -> Baseline:
    """Mean histogram of each bag [N, D] to a class, and tiles scored by the same regression.

    The regression is linear in the mean histogram, so its decision on a bag is the mean of its decisions on the tiles: those
    (for the positive class, from the fold's own regression) are the tile scores.
    """
    bag_BD = np.stack([bag.mean(axis=0) for bag in bags])
    probability_BC, models = _cross_fit(bag_BD, label_B, folds)
    fold_of = {place: number for number, fold in enumerate(folds) for place in fold.test}
    tested = tested_places(folds)
    scores = tuple(_tile_score(models[fold_of[place]], bags[place], positive) for place in tested)
    return Baseline(probability_BC[list(tested)], scores)


def shuffled_labels(stratum_of: Mapping[str, str], test_parts: Sequence[Sequence[str]], seed: int) -> dict[str, str]:
    """Labels dealt out anew among the patients of each test part: every true class gets its share of every label.

    The parts keep their labels, because unbalanced folds alone push the AUROC of a useless model below one half. And the new
    labels are as unrelated to the true ones as numbers allow: a blind permutation of forty patients agrees with the truth by
    chance often enough to make a good model look as if something leaked.
    """
    shuffled: dict[str, str] = {}
    for number, part in enumerate(test_parts):
        rng = np.random.default_rng(derive_seed("shuffled labels", seed, number))
        place: dict[str, float] = {}
        for stratum in sorted({stratum_of[patient] for patient in part}):
            members = sorted(patient for patient in part if stratum_of[patient] == stratum)
            # The members of a class are spread evenly, in random order, over the line along which the labels are dealt.
            positions = (rng.permutation(len(members)) + rng.random()) / len(members)
            place.update(zip(members, positions.tolist(), strict=True))
        labels = sorted(stratum_of[patient] for patient in part)
        shuffled.update(zip(sorted(part, key=lambda patient: (place[patient], patient)), labels, strict=True))
    return shuffled


def _cross_fit(bag_BD: Floats, label_B: Sequence[int], folds: Sequence[FoldPlaces]) -> tuple[Floats, list[Pipeline]]:
    label = np.asarray(label_B)
    probability_BC = np.zeros((len(label), int(label.max()) + 1))
    models = []
    for fold in folds:
        learn, test = sorted(fold.train + fold.validation), list(fold.test)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, class_weight="balanced", max_iter=5000))
        model.fit(bag_BD[learn], label[learn])
        if test:
            probability_BC[np.ix_(test, model.classes_)] = model.predict_proba(bag_BD[test])
        models.append(model)
    return probability_BC, models


def _tile_score(model: Pipeline, tile_ND: Floats, positive: int) -> Floats:
    decision: Floats = model.decision_function(tile_ND)
    if decision.ndim == 1:
        return decision if positive == 1 else -decision
    return decision[:, list(model.classes_).index(positive)]
