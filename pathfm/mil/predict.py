"""New slides through all networks of a bundle, one bag at a time, and what the locked thresholds make of it.

Legend: M members, P prediction columns of all tasks, C classes, D feature length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pathfm.errors import PathfmError, SlideError, StoreError
from pathfm.faults import crash_point
from pathfm.log import track
from pathfm.mil.aggregators.registry import aggregator_identity
from pathfm.mil.bags import Bag, Bags
from pathfm.mil.bundle import Bundle, BundleError, check_encoder
from pathfm.mil.ensemble import Member
from pathfm.mil.explain import Explained, tile_scores
from pathfm.mil.feature_cache import FeatureCache, SlideFacts
from pathfm.mil.fit import Answer, ask, one_thread
from pathfm.mil.network import build_network, spec_from_record
from pathfm.mil.roster import Absence, Unit, make_units
from pathfm.mil.tasks import tasks_from_record
from pathfm.mil.tasks.contract import Task
from pathfm.mil.trust import Decision, Trust, trust_from_record
from pathfm.store.cohort import Cohort

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """What the ensemble says of one bag, or on average of several.

    Attributes:
        tiles: in the bag.
        said_MP: what each member says.
        distance: from the training bags, by task name, of tasks with locked thresholds.
        decisions: by task name, of those tasks.
    """

    tiles: int
    said_MP: Floats
    distance: Mapping[str, float | None] = field(default_factory=dict)
    decisions: Mapping[str, Decision] = field(default_factory=dict)

    @property
    def prediction_P(self) -> Floats:
        """Mean of the members."""
        return np.asarray(self.said_MP.mean(axis=0))


Look = Callable[[str, Explained, SlideFacts], None]
"""Is shown each slide: its id, where the networks looked, and what is known of its features."""


class Attended(NamedTuple):
    """Mean attention of the members, and the same before the softmax; None where not every member has it."""

    attention_NQ: Floats | None
    logit_NQ: Floats | None


@dataclass
class Answers:
    """What became of the slides.

    Attributes:
        slides: what is said of each slide alone.
        units: what is said of each unit (of the bundle's level), by place in ``order``.
        order: the units.
        failed: slide_id -> why nothing is said of it.
    """

    slides: dict[str, Verdict] = field(default_factory=dict)
    units: list[Verdict] = field(default_factory=list)
    order: tuple[Unit, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)

    def of_patients(self, ensemble: Ensemble) -> dict[str, Verdict]:
        """What is said of each patient: of all slides together if that is the bundle's level, else the mean over its units."""
        found: dict[str, list[Verdict]] = {}
        for unit, verdict in zip(self.order, self.units, strict=True):
            found.setdefault(unit.patient_id, []).append(verdict)
        return {patient: verdicts[0] if len(verdicts) == 1 else ensemble.mean(verdicts) for patient, verdicts in found.items()}


class Ensemble:
    """All networks of a bundle, ready to be asked.

    Args:
        bundle: opened.
        device: where networks run.

    Raises:
        BundleError: its networks, tasks or thresholds cannot be made of what it says.
    """

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self.bundle, self.device = bundle, device
        try:
            self.tasks = tasks_from_record(bundle.facts["tasks"])
            self.trust: dict[str, Trust] = {name: trust_from_record(said) for name, said in bundle.facts["trust"].items()}
            names = {task.name for task in self.tasks.tasks}
            if self.trust.keys() - names:
                raise ValueError(f"thresholds of {', '.join(sorted(self.trust.keys() - names))}")
        except (KeyError, TypeError, ValueError, StoreError) as error:
            what = f"its tasks or thresholds are not understood ({error})"
            raise BundleError(what, where=str(bundle.folder), fix=f"use pathfm {bundle.facts.get('code')}") from error
        self.members = [_member(bundle, name, device) for name in bundle.member_names]

    @property
    def decided_by(self) -> int:
        """The prediction column whose spread over the members is told: of the main task's positive class, else its first."""
        return int(self.tasks.slice_of(self.tasks.main).columns.start) + max(self.tasks.main.positive, 0)

    def task(self, name: str) -> Task:
        """A task by its name."""
        return next(task for task in self.tasks.tasks if task.name == name)

    def ask(self, bag: Bag, mean_ND: Floats) -> tuple[Verdict, list[Answer]]:
        """What all members say of a bag, one after another.

        Args:
            bag: of a slide or a unit.
            mean_ND: mean features of its slides, or of the whole.

        Raises:
            SlideError: the bag has no tiles.
        """
        if not len(bag.feature_ND):
            raise SlideError("no tiles, so nothing can be said of it")
        answers = [ask(member.network, bag, self.device) for member in self.members]
        said = [
            self.tasks.predict(answer.output_O[None], member.states)[0]
            for answer, member in zip(answers, self.members, strict=True)
        ]
        distance = {name: trust.distance(mean_ND) for name, trust in self.trust.items()}
        return self._decided(Verdict(len(bag.feature_ND), np.stack(said), distance)), answers

    def explain(self, bag: Bag, answers: Sequence[Answer]) -> Explained:
        """Where the networks looked when they gave these answers."""
        said = Attended(_mean([answer.attention_NQ for answer in answers]), _mean([answer.logit_NQ for answer in answers]))
        return tile_scores(said, self.members, bag, self.tasks, self.device)

    def mean(self, verdicts: Sequence[Verdict]) -> Verdict:
        """The mean of what is said of several bags; as far from the training as the farthest of them."""
        said_MP = np.mean([verdict.said_MP for verdict in verdicts], axis=0)
        found = {name: [verdict.distance[name] for verdict in verdicts] for name in self.trust}
        distance = {name: max((each for each in values if each is not None), default=None) for name, values in found.items()}
        return self._decided(Verdict(sum(verdict.tiles for verdict in verdicts), said_MP, distance), len(verdicts) > 1)

    def _decided(self, verdict: Verdict, several: bool = False) -> Verdict:
        """The decisions of all tasks; none about the mean of several bags where thresholds are those of single ones."""
        decisions = {
            name: Decision((), "", (), ("decided slide by slide",), verdict.distance[name])
            if several and trust.unit == "bag"
            else trust.decide(verdict.prediction_P[self.tasks.slice_of(self.task(name)).columns], verdict.distance[name])
            for name, trust in self.trust.items()
        }
        return Verdict(verdict.tiles, verdict.said_MP, verdict.distance, decisions)


def predict(
    ensemble: Ensemble,
    paths: Mapping[str, Path],
    cohort: Cohort,
    patients: Mapping[str, str],
    cache: FeatureCache,
    look: Look | None = None,
) -> Answers:
    """Asks about every slide alone, and about every unit of several slides; one that cannot be used does not stop the others.

    Args:
        ensemble: of a bundle.
        paths: feature files by slide_id.
        cohort: whose rows say what belongs together.
        patients: slide_id -> patient.
        cache: for the features.
        look: is shown each slide.
    """
    answers = Answers()
    with one_thread():
        for slide_id in track(sorted(paths), "predict", len(paths)):
            try:
                _ask_slide(ensemble, slide_id, paths[slide_id], cache, answers, look)
            except (StoreError, SlideError) as error:
                answers.failed[slide_id] = error.reason
        absent = {row.slide_id: Absence("failed", "") for row in cohort.rows if row.slide_id not in answers.slides}
        answers.order = make_units(cohort, patients, absent, ensemble.bundle.settings)
        for unit in answers.order:
            answers.units.append(_ask_unit(ensemble, unit, cache, answers))
    return answers


def _ask_slide(ensemble: Ensemble, slide_id: str, path: Path, cache: FeatureCache, answers: Answers, look: Look | None) -> None:
    facts = cache.add(slide_id, path)
    check_encoder(ensemble.bundle, facts.encoder, facts.dim, path.name)
    bag = Bags(cache, [(slide_id,)]).read(0)
    verdict, said = ensemble.ask(bag, facts.mean_D)
    if look:
        look(slide_id, ensemble.explain(bag, said), facts)
    answers.slides[slide_id] = verdict
    crash_point("mil.predict.slide")


def _ask_unit(ensemble: Ensemble, unit: Unit, cache: FeatureCache, answers: Answers) -> Verdict:
    if len(unit.slide_ids) == 1:
        return answers.slides[unit.slide_ids[0]]
    bags = Bags(cache, [unit.slide_ids])
    return ensemble.ask(bags.read(0), bags.mean(0))[0]


def _member(bundle: Bundle, name: str, device: torch.device) -> Member:
    weights, facts = bundle.read_member(name)
    try:
        network = build_network(spec_from_record(facts["network"]))
        network.load_state_dict(weights)
        if aggregator_identity(network.aggregator) != (facts.get("aggregator_code") or ""):
            raise ValueError("the code or the weights of its aggregator are not those that were locked")
    except (KeyError, TypeError, ValueError, RuntimeError, PathfmError) as error:
        what = f"{name} is no network that this pathfm knows ({str(error).splitlines()[0][:200]})"
        raise BundleError(what, where=str(bundle.folder), fix=f"use pathfm {bundle.facts.get('code')}") from error
    return Member(network.eval().requires_grad_(requires_grad=False).to(device), facts["states"], facts)


def _mean(values: Sequence[Floats | None]) -> Floats | None:
    known = [value for value in values if value is not None]
    return np.asarray(np.mean(known, axis=0)) if len(known) == len(values) else None
