"""The main model and its rivals, all on the same splits: controls, shuffled labels, fewer patients to learn from.

Legend: B judged bags, P prediction columns, T target columns, N tiles of a bag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pathfm.compute import pick_device, usable_cores
from pathfm.mil.bags import Bags
from pathfm.mil.controls import (
    COLOUR,
    COUNT,
    SHUFFLED,
    UNTRAINED,
    count_baseline,
    cross_fit,
    dealt_patients,
    permuted_patients,
    tile_score,
)
from pathfm.mil.ensemble import CurvePoint, Experiment, Look, Mean, Member, OutOfFold, out_of_fold
from pathfm.mil.explain import tile_scores
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.fit import Machine
from pathfm.mil.inputs import MilInputs, read_control
from pathfm.mil.outputs import TileScores
from pathfm.mil.plan import Plan, fold_places
from pathfm.mil_settings import MilSettings
from pathfm.stats.folds import thinned_fold

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """A model's out-of-fold answers beside the truth it is held to, and what its tiles say.

    Attributes:
        name: as in ``metrics.json``.
        prediction_BP: of all tasks.
        target_BT: targets of the judged bags (shuffled ones for the shuffled control).
        by_fold: predictions of each fold's own test part.
        tiles: tile scores of slides with truth; None where the model has none.
        seen_share: share of these patients whom the encoder it rests on has seen; above 0, the numbers are transductive.
        curves: losses of its networks.
        direction: by task name, which way a score was read that has no direction of its own.
    """

    name: str
    prediction_BP: Floats
    target_BT: Floats
    by_fold: tuple[Floats, ...] = ()
    tiles: TileScores | None = None
    seen_share: float = 0.0
    curves: tuple[CurvePoint, ...] = field(default=(), repr=False)
    direction: Mapping[str, str] = field(default_factory=dict)


class Models:
    """Trains the models of a study.

    Args:
        plan: who is compared with whom.
        inputs: where everything lies.
        chosen: settings by fold, as nested cross-validation chose them.
    """

    def __init__(self, plan: Plan, inputs: MilInputs, chosen: Sequence[MilSettings]) -> None:
        self.plan, self.inputs, self.chosen = plan, inputs, tuple(chosen)
        self.tested = list(plan.tested)

    def main(self, look: Look, tiles: TileScores) -> Judged:
        """The model of the study; ``look`` sees every judged bag."""
        found = out_of_fold(self.experiment(self.inputs.main_name, "models"), self.plan.places, look)
        return replace(self._judged(self.inputs.main_name, found), tiles=tiles, seen_share=self._seen_share())

    def shuffled(self) -> Judged:
        """The main model on labels dealt out anew."""
        parts = [fold.test for fold in self.plan.splits.folds]
        dealt = dealt_patients(self.plan.strata, _partition(parts, sorted(self.plan.strata)), self.plan.settings.seed)
        target_BT = self._moved(dealt)
        experiment = replace(self.experiment(SHUFFLED, "controls/shuffled"), target_BT=target_BT)
        judged = self._judged(SHUFFLED, out_of_fold(experiment, self.plan.places))
        return replace(judged, target_BT=target_BT[self.tested], seen_share=self._seen_share())

    def permuted(self, number: int) -> Judged:
        """One blind permutation of the labels, with one network per fold."""
        patients = sorted(self.plan.strata)
        target_BT = self._moved(permuted_patients(patients, self.plan.settings.seed, number))
        experiment = self.experiment(f"permutation {number}", f"controls/permutation-{number}")
        experiment = replace(experiment, target_BT=target_BT, members=1)
        judged = self._judged(experiment.name, out_of_fold(experiment, self.plan.places))
        return replace(judged, target_BT=target_BT[self.tested])

    def with_fraction(self, fraction: float) -> tuple[Judged, float]:
        """The main model with a part of the patients to learn from, and how many these are on average over the folds.

        Smaller parts lie within larger ones, and every stratum keeps its share.
        """
        name, seed = f"{fraction:.0%} of the training patients", self.plan.settings.seed
        folds = [thinned_fold(fold, self.plan.strata, fraction, seed) for fold in self.plan.splits.folds]
        left_out = self.plan.seen.left_out()
        places = [fold_places(fold, self.plan.units, left_out) for fold in folds]
        experiment = self.experiment(name, f"controls/fraction-{fraction:g}")
        count = float(np.mean([len(fold.train) + len(fold.validation) for fold in folds]))
        return self._judged(name, out_of_fold(experiment, places)), count

    def count(self) -> Judged:
        """The number of tiles alone."""
        plan = self.plan
        prediction_BP, direction = count_baseline(plan.bags.lengths, plan.target_BT, plan.tasks, plan.places)
        return replace(self._judged(COUNT, prediction_BP), direction=direction)

    def colour(self, cache: FeatureCache) -> Judged:
        """A linear model of the bag's mean colour histogram; its decision on a tile is the tile's score."""
        bags = self._control_bags("colour", cache)
        mean_BD = np.stack([bags.mean(place) for place in range(len(bags))])
        prediction_BP, models = cross_fit(mean_BD, self.plan.target_BT, self.plan.tasks, self.plan.places)
        tiles = TileScores(self.plan)
        for place in self.tested:
            if not tiles.wants(place):
                continue
            tile_ND = bags.read(place).feature_ND.double().numpy()
            own = [model for model, fold in zip(models, self.plan.places, strict=True) if place in fold.test]
            tiles.add(place, np.mean([tile_score(model, tile_ND, self.plan.tasks) for model in own], axis=0))
        return replace(self._judged(COLOUR, prediction_BP), tiles=tiles)

    def untrained(self, cache: FeatureCache) -> Judged:
        """The same networks on features of an encoder that saw no data."""
        tiles, bags = TileScores(self.plan), self._control_bags("untrained", cache)
        experiment = self.experiment(UNTRAINED, "controls/untrained", bags)

        def look(place: int, mean: Mean, members: Sequence[Member]) -> None:
            if tiles.wants(place):
                found = tile_scores(mean, members, bags.read(place), self.plan.tasks, experiment.machine.device)
                tiles.add(place, found.value_NC[:, found.main])

        share = self.plan.seen.initial_share(self.plan.judged_patients)
        judged = self._judged(UNTRAINED, out_of_fold(experiment, self.plan.places, look))
        return replace(judged, tiles=tiles, seen_share=share)

    def experiment(self, name: str, place: str, bags: Bags | None = None) -> Experiment:
        """What one model learns from, and where its networks are kept."""
        found = experiment_of(self.plan, self.inputs, name, place, self.chosen)
        if bags is None:
            return replace(found, members=self.plan.settings.ensemble)
        facts = {**found.facts, "encoder": dict(_encoder(self.plan, bags))}
        return replace(found, bags=bags, facts=facts, members=self.plan.settings.ensemble)

    def _control_bags(self, role: str, cache: FeatureCache) -> Bags:
        read_control(self.inputs, role, self.plan.gathered.slides, cache)
        return Bags(cache, [unit.slide_ids for unit in self.plan.units])

    def _judged(self, name: str, found: OutOfFold | Floats) -> Judged:
        target_BT = self.plan.target_BT[self.tested]
        if isinstance(found, OutOfFold):
            return Judged(name, found.prediction_BP, target_BT, found.by_fold, curves=found.curves)
        return Judged(name, found, target_BT)

    def _seen_share(self) -> float:
        return self.plan.seen.share(self.plan.judged_patients)

    def _moved(self, source_of: Mapping[str, str]) -> Floats:
        """Targets of all units when every patient has those of another one."""
        first: dict[str, int] = {}
        strata = self.plan.strata
        columns = self.plan.tasks.slice_of(self.plan.tasks.main).targets
        for place, unit in enumerate(self.plan.units):
            # Of a patient whose units differ, one that is what the patient counts as.
            if self.plan.tasks.main.stratum(self.plan.target_BT[place][columns]) == strata[unit.patient_id]:
                first.setdefault(unit.patient_id, place)
        return self.plan.target_BT[[first[source_of[unit.patient_id]] for unit in self.plan.units]]


def experiment_of(plan: Plan, inputs: MilInputs, name: str, place: str, settings: tuple[MilSettings, ...]) -> Experiment:
    """An experiment on the main features and the true labels, with one network per fold.

    Args:
        plan: of the study.
        inputs: where everything lies.
        name: of the model.
        place: where its networks are kept in the mil folder.
        settings: by fold.
    """
    facts = {
        "model": name,
        "label": plan.settings.label,
        "level": plan.settings.level,
        "encoder": dict(_encoder(plan, plan.bags)),
    }
    return Experiment(
        name=name,
        mil_dir=inputs.mil_dir,
        place=place,
        bags=plan.bags,
        target_BT=plan.target_BT,
        tasks=plan.tasks,
        settings=settings,
        facts=facts,
        members=1,
        machine=machine_of(plan),
    )


def _encoder(plan: Plan, bags: Bags) -> Mapping[str, str]:
    return bags.cache.facts[plan.units[0].slide_ids[0]].encoder


def machine_of(plan: Plan) -> Machine:
    """Where networks run: on a CPU as many folds at a time as there are workers."""
    device = pick_device(plan.study.compute)
    return Machine(device, (plan.study.compute.workers or usable_cores()) if device.type == "cpu" else 1)


def _partition(parts: Sequence[Sequence[str]], everyone: Sequence[str]) -> list[Sequence[str]]:
    """The test parts and the rest, if no patient is tested twice; else everyone as one part."""
    tested = [patient for part in parts for patient in part]
    if len(set(tested)) < len(tested):
        return [everyone]
    rest = sorted(set(everyone).difference(tested))
    return [*parts, rest] if rest else list(parts)
