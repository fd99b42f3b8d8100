"""What a result has to beat: colour alone, the amount of tissue alone, an encoder that saw no data, labels without meaning.

Legend: B bags, D feature length, O outputs, T targets, P prediction columns, N tiles of a bag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from pathfm.mil.ensemble import FoldPlaces, tested_places
from pathfm.mil.passes import one_thread
from pathfm.mil.tasks import TaskSet
from pathfm.mil.tasks.contract import Bank
from pathfm.stats.metrics import auroc
from pathfm.stats.seeds import derive_seed

COLOUR = "colour histogram"
COUNT = "tile count"
UNTRAINED = "untrained encoder"
SHUFFLED = "shuffled labels"
STEPS = 200
"""L-BFGS iterations; these small convex fits need far fewer."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Linear:
    """A linear model of standardised values: outputs = (value - mean) / scale @ weight + bias."""

    mean_D: Floats
    scale_D: Floats
    weight_DO: Floats
    bias_O: Floats

    def __call__(self, value_BD: Floats) -> Floats:
        """Outputs [B, O]."""
        outputs: Floats = (value_BD - self.mean_D) / self.scale_D @ self.weight_DO + self.bias_O
        return outputs


@one_thread()
def fit_linear(value_FD: Floats, target_FT: Floats, tasks: TaskSet) -> Linear:
    """The linear model with the smallest balanced loss of the tasks plus half the squared weights (ridge of strength one)."""
    mean_D, scale_D = value_FD.mean(axis=0), value_FD.std(axis=0)
    scale_D = np.where(scale_D > 1e-9, scale_D, 1.0)
    value = torch.from_numpy((value_FD - mean_D) / scale_D)
    target, weight = torch.from_numpy(target_FT), torch.from_numpy(tasks.balance(target_FT))
    everyone = torch.arange(len(value))
    weight_DO = torch.zeros(value.shape[1], tasks.outputs, dtype=torch.float64, requires_grad=True)
    bias_O = torch.zeros(tasks.outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_DO, bias_O], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        output_FO = value @ weight_DO + bias_O
        loss = tasks.loss(output_FO, target, weight, Bank(output_FO.detach(), target, everyone))
        loss = loss * len(value) + weight_DO.square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Linear(mean_D, scale_D, weight_DO.detach().numpy(), bias_O.detach().numpy())


def cross_fit(
    value_BD: Floats, target_BT: Floats, tasks: TaskSet, folds: Sequence[FoldPlaces]
) -> tuple[Floats, tuple[Linear, ...]]:
    """Out-of-fold predictions [tested, P] of a linear model, and the model of each fold.

    A fold learns from its training and validation parts: nothing here is stopped early.
    """
    said: dict[int, list[Floats]] = {}
    models = []
    for fold in folds:
        learn, test = sorted(fold.train + fold.validation), list(fold.test)
        part = tasks.for_part(target_BT[learn])
        model = fit_linear(value_BD[learn], target_BT[learn], part)
        states = part.fit_state(model(value_BD[learn]), target_BT[learn])
        models.append(model)
        if test:
            for place, row in zip(test, tasks.predict(model(value_BD[test]), states), strict=True):
                said.setdefault(place, []).append(row)
    return np.stack([np.mean(said[place], axis=0) for place in tested_places(folds)]), tuple(models)


def count_baseline(
    count_B: Sequence[int], target_BT: Floats, tasks: TaskSet, folds: Sequence[FoldPlaces]
) -> tuple[Floats, dict[str, str]]:
    """Predictions [tested, P] from the number of tiles alone, and by task of two classes which way it was read.

    Of two classes the number itself is the score: a direction fitted per fold would come out reversed in the test part of a
    balanced cohort and push a useless control far below one half. It is read in the one way, the same in all folds, that suits
    it better on the judged bags: positives may have fewer tiles as well as more. That favours the control, never the model that
    has to beat it, and its AUROC is not below one half. Other tasks have a linear model, which finds the direction itself.
    """
    size_B = np.log1p(np.asarray(count_B, dtype=np.float64))
    prediction_BP, _ = cross_fit(size_B[:, None], target_BT, tasks, folds)
    more_B, direction = _more_tiles(size_B, folds), {}
    truth_BT = target_BT[list(tested_places(folds))]
    for task in tasks.tasks:
        if task.kind != "binary":
            continue
        at = tasks.slice_of(task)
        target_B = truth_BT[:, at.targets][:, 0]
        known, is_positive = np.isfinite(target_B), target_B == task.positive
        is_both = 0 < is_positive[known].sum() < known.sum()
        fewer = is_both and auroc(more_B[known], is_positive[known]) < 0.5
        score_B = 1 - more_B if fewer else more_B
        prediction_BP[:, at.columns.start + task.positive] = score_B
        prediction_BP[:, at.columns.start + 1 - task.positive] = 1 - score_B
        direction[task.name] = f"{'fewer' if fewer else 'more'} tiles, more {task.classes[task.positive]}"
    return prediction_BP, direction


def _more_tiles(size_B: Floats, folds: Sequence[FoldPlaces]) -> Floats:
    """How large each judged bag is beside those of the fold's learning part, from 0 to 1; the mean where it is tested often."""
    said: dict[int, list[Floats]] = {}
    for fold in folds:
        learn = size_B[sorted(fold.train + fold.validation)]
        for place in fold.test:
            said.setdefault(place, []).append(expit((size_B[place] - learn.mean()) / (learn.std() or 1.0)))
    return np.array([np.mean(said[place]) for place in tested_places(folds)])


def tile_score(model: Linear, tile_ND: Floats, tasks: TaskSet) -> Floats:
    """How much each tile [N] speaks for the positive class of the main task, by a model that is linear in the bag's mean.

    Its decision on a bag is the mean of its decisions on the tiles.
    """
    output_NO = model(tile_ND)[:, tasks.slice_of(tasks.main).outputs]
    if tasks.main.positive < 0 or output_NO.shape[1] <= tasks.main.positive:
        return np.asarray(output_NO.mean(axis=1))
    chosen = output_NO[:, tasks.main.positive]
    return np.asarray(chosen - np.delete(output_NO, tasks.main.positive, axis=1).mean(axis=1))


def dealt_patients(stratum_of: Mapping[str, str], test_parts: Sequence[Sequence[str]], seed: int) -> dict[str, str]:
    """patient -> the patient whose labels are dealt to him, within each test part: labels without meaning.

    The parts keep their labels, because unbalanced folds alone push the AUROC of a useless model below one half. And the new
    labels are as unrelated to the true ones as numbers allow (every true class gets its share of every label): a blind
    permutation of forty patients agrees with the truth by chance often enough to make a good model look as if something leaked.
    """
    dealt: dict[str, str] = {}
    for number, part in enumerate(test_parts):
        rng = np.random.default_rng(derive_seed("shuffled labels", seed, number))
        place: dict[str, float] = {}
        for stratum in sorted({stratum_of[patient] for patient in part}):
            members = sorted(patient for patient in part if stratum_of[patient] == stratum)
            # The members of a class are spread evenly, in random order, over the line along which the labels are dealt.
            positions = (rng.permutation(len(members)) + rng.random()) / len(members)
            place.update(zip(members, positions.tolist(), strict=True))
        sources = sorted(part, key=lambda patient: (stratum_of[patient], patient))
        dealt.update(zip(sorted(part, key=lambda patient: (place[patient], patient)), sources, strict=True))
    return dealt


def permuted_patients(patients: Sequence[str], seed: int, number: int) -> dict[str, str]:
    """patient -> the patient whose labels he gets in permutation ``number``: blind, as a permutation test needs it."""
    ordered = sorted(patients)
    order = np.random.default_rng(derive_seed("permutation", seed, number)).permutation(len(ordered))
    return {patient: ordered[index] for patient, index in zip(ordered, order.tolist(), strict=True)}
