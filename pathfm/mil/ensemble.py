"""Folds times members: every network is kept on disk as it is finished, so that a killed run goes on where it was.

Legend: B bags, O outputs, P prediction columns, T targets, N tiles of a bag, Q queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from pathfm.config import fingerprint
from pathfm.errors import PathfmError, StoreError
from pathfm.faults import crash_point
from pathfm.log import track
from pathfm.mil.aggregators.registry import aggregator_identity
from pathfm.mil.bags import Bags
from pathfm.mil.fit import Answer, EpochLoss, Fitted, FoldJob, Machine, ask, fit_folds, training_dtype
from pathfm.mil.network import Network, build_network, spec_from_record
from pathfm.mil.passes import one_thread, worker_threads
from pathfm.mil.tasks import TaskSet
from pathfm.mil_settings import MilSettings
from pathfm.stats.seeds import derive_seed
from pathfm.store.commit import commit_file, read_json, write_json

VERSION = 6
"""Raised whenever the same bags and settings give other weights or other numbers."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FoldPlaces:
    """A fold as places in the list of bags."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def tested_places(folds: Sequence[FoldPlaces]) -> tuple[int, ...]:
    """The bags that are in a test part, in their order: the rows of every out-of-fold answer."""
    return tuple(sorted({place for fold in folds for place in fold.test}))


@dataclass(frozen=True)
class Experiment:
    """One model of the study: what it learns from and what its networks are recorded with.

    Attributes:
        name: as in ``metrics.json``.
        mil_dir: folder of the stage.
        place: where in it the networks are kept (``fold-K/member-M.*`` below); chance comes from this name.
        bags: all bags.
        target_BT: what each is to have.
        tasks: what is predicted.
        settings: of the stage, by fold: nested cross-validation may have chosen some.
        facts: what a network must be recorded with to be used again (encoder, level, ...).
        members: networks per fold.
        machine: where networks run, in how many threads; has no part in what comes out.
    """

    name: str
    mil_dir: Path
    place: str
    bags: Bags
    target_BT: Floats
    tasks: TaskSet
    settings: tuple[MilSettings, ...]
    facts: Mapping[str, Any]
    members: int
    machine: Machine

    @property
    def folder(self) -> Path:
        """Where the networks are kept."""
        return self.mil_dir / self.place

    def precision(self, fold: int) -> str:
        """Arithmetic of the training of a fold, as it comes out on this machine."""
        return str(training_dtype(self.settings[fold], self.machine.device, self.bags.lengths)).removeprefix("torch.")


class CurvePoint(NamedTuple):
    """One epoch of one network."""

    fold: int
    member: int
    epoch: int
    loss: EpochLoss


class Mean(NamedTuple):
    """What the networks of a bag say on average.

    Attributes:
        prediction_P: prediction columns of all tasks.
        attention_NQ: attention of the tiles; None where the aggregator has none of its own.
        logit_NQ: the same before the softmax.
    """

    prediction_P: Floats
    attention_NQ: Floats | None
    logit_NQ: Floats | None


class Member(NamedTuple):
    """A finished network, what its tasks fitted besides, and the facts beside it."""

    network: Network
    states: Mapping[str, Any]
    facts: Mapping[str, Any]


class Said(NamedTuple):
    """What one network of a fold answered."""

    fold: int
    member: Member
    answer: Answer


@dataclass(frozen=True)
class OutOfFold:
    """What networks that never met a bag say of it, per bag of the test parts: the mean of all members of its folds.

    Attributes:
        prediction_BP: prediction columns of all tasks.
        curves: all networks, all epochs.
        by_fold: prediction columns of the test bags of each fold, in their order.
    """

    prediction_BP: Floats
    curves: tuple[CurvePoint, ...]
    by_fold: tuple[Floats, ...]


Look = Callable[[int, Mean, Sequence[Member]], None]
"""Is shown each tested bag: its place, the mean answer, and the networks that gave it."""


def out_of_fold(experiment: Experiment, folds: Sequence[FoldPlaces], look: Look | None = None) -> OutOfFold:
    """Train (or find kept) all networks and ask each about its own test bags only.

    ``look`` is called in the order of the bags, one at a time, so that nothing of all tiles needs to be kept.
    """
    prune(experiment.folder, len(folds), experiment.members)
    train_missing(experiment, folds)
    members = [
        [load_member(member_path(experiment.folder, number, member)) for member in range(experiment.members)]
        for number in range(len(folds))
    ]
    for member in (member for fold in members for member in fold):
        member.network.to(experiment.machine.device)
    rows: list[Floats] = []
    said: dict[tuple[int, int], Floats] = {}
    for place, asked in _asked(experiment, members, folds):
        prediction_MP = np.stack([_predict(experiment.tasks, answer, member) for _, member, answer in asked])
        for fold in {fold for fold, _, _ in asked}:
            said[fold, place] = prediction_MP[[fold == number for number, _, _ in asked]].mean(axis=0)
        rows.append(prediction_MP.mean(axis=0))
        if look:
            look(place, Mean(rows[-1], *_mean_attention([answer for *_, answer in asked])), [member for _, member, _ in asked])
    curves = tuple(
        CurvePoint(number, index, epoch, EpochLoss(*losses))
        for number, fold in enumerate(members)
        for index, member in enumerate(fold)
        for epoch, losses in enumerate(member.facts["curve"])
    )
    by_fold = tuple(np.array([said[number, place] for place in fold.test]) for number, fold in enumerate(folds))
    return OutOfFold(np.stack(rows), curves, by_fold)


def train_missing(experiment: Experiment, folds: Sequence[FoldPlaces]) -> None:
    """Trains the folds that are not kept whole; folds with the same settings go through their bags together."""
    groups: dict[str, tuple[MilSettings, list[FoldJob]]] = {}
    wanted = {}
    for number, fold in enumerate(folds):
        wanted[number] = _wanted(experiment, fold, number)
        kept = all(_is_kept(member_path(experiment.folder, number, m), wanted[number]) for m in range(experiment.members))
        if not kept:
            seeds = tuple(
                derive_seed("mil", experiment.settings[number].seed, experiment.place, number, member)
                for member in range(experiment.members)
            )
            settings = experiment.settings[number]
            jobs = groups.setdefault(fingerprint(learning(settings)), (settings, []))[1]
            jobs.append(FoldJob(number, fold.train, fold.validation, seeds))

    def keep(job: FoldJob, fitted: Sequence[Fitted]) -> None:
        for member, network in enumerate(fitted):
            about = {"fold": job.number, "member": member, "precision": experiment.precision(job.number)}
            facts = {**experiment.facts, "fingerprint": wanted[job.number], **about}
            _keep(member_path(experiment.folder, job.number, member), network, facts, experiment.tasks)

    for settings, jobs in groups.values():
        fit_folds(experiment.bags, experiment.target_BT, experiment.tasks, jobs, settings, keep, experiment.machine)


def prune(folder: Path, folds: int, members: int) -> None:
    """Delete networks that earlier settings left behind."""
    wanted = {member_path(folder, fold, member) for fold in range(folds) for member in range(members)}
    for path in sorted(folder.glob("fold-*/member-*.safetensors")):
        if path not in wanted:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink()


def member_path(folder: Path, fold: int, member: int) -> Path:
    """Where a network is kept; ``.json`` beside it says what it is, and is written last."""
    return folder / f"fold-{fold}" / f"member-{member}.safetensors"


def load_member(path: Path) -> Member:
    """A kept network in eval mode on the CPU.

    Raises:
        StoreError: absent, damaged, or weights and facts do not belong together.
    """
    facts = read_json(path.with_suffix(".json"))
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise StoreError("the weights are not those that were saved", where=str(path), fix="run `pathfm mil` again")
        network = build_network(spec_from_record(facts["network"]))
        network.load_state_dict(load(data))
        if aggregator_identity(network.aggregator) != (facts.get("aggregator_code") or ""):
            raise StoreError("the aggregator's code or weights have changed", where=str(path), fix="run `pathfm mil` again")
        return Member(network.eval(), facts["states"], facts)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"not a usable network ({error})", where=str(path), fix="run `pathfm mil` again") from error


def _asked(
    experiment: Experiment, members: Sequence[Sequence[Member]], folds: Sequence[FoldPlaces]
) -> Iterator[tuple[int, list[Said]]]:
    """Each tested bag, in order, with what all networks say that never met it; few are begun ahead, and none is kept."""

    def work(place: int) -> list[Said]:
        bag, device = experiment.bags.read(place), experiment.machine.device
        numbers = [number for number, fold in enumerate(folds) if place in fold.test]
        return [Said(number, member, ask(member.network, bag, device)) for number in numbers for member in members[number]]

    tested, workers = tested_places(folds), experiment.machine.workers
    with one_thread(), worker_threads(workers) as pool:
        waiting = [pool.submit(work, place) for place in tested[: 2 * workers]]
        for index, place in enumerate(track(tested, f"mil: {experiment.name}, asked", len(tested))):
            yield place, waiting.pop(0).result()
            if index + 2 * workers < len(tested):
                waiting.append(pool.submit(work, tested[index + 2 * workers]))


def _predict(tasks: TaskSet, answer: Answer, member: Member) -> Floats:
    row_P: Floats = tasks.predict(answer.output_O[None], member.states)[0]
    return row_P


def _mean_attention(answers: Sequence[Answer]) -> tuple[Floats | None, Floats | None]:
    attention = [answer.attention_NQ for answer in answers if answer.attention_NQ is not None]
    logit = [answer.logit_NQ for answer in answers if answer.logit_NQ is not None]
    return (np.mean(attention, axis=0) if attention else None), (np.mean(logit, axis=0) if logit else None)


def learning(settings: MilSettings) -> dict[str, Any]:
    """The settings that decide what is learned from given bags, JSON-ready."""
    return settings.model_dump(mode="json", exclude={"numbers", "split", "search", "controls", "features"})


def _wanted(experiment: Experiment, fold: FoldPlaces, number: int) -> str:
    """What the networks of a fold depend on."""
    learned = fold.train + fold.validation
    return fingerprint(
        {"version": VERSION, "place": experiment.place, "fold": number, "parts": [list(fold.train), list(fold.validation)]},
        {"bags": len(experiment.bags), "precision": experiment.precision(number)},
        learning(experiment.settings[number]),
        {"members": experiment.members, "tasks": experiment.tasks.record(), "encoder": experiment.facts["encoder"]},
        [experiment.bags.digest(place) for place in learned],
        experiment.target_BT[list(learned)].tobytes().hex(),
    )


def _is_kept(path: Path, wanted: str) -> bool:
    try:
        return load_member(path).facts.get("fingerprint") == wanted
    except PathfmError:
        return False


def _keep(path: Path, fitted: Fitted, facts: Mapping[str, Any], tasks: TaskSet) -> None:
    state = fitted.network.state_dict()
    data = save({name: state[name].detach().cpu().contiguous() for name in sorted(state)})
    crash_point("mil.member.before_commit")
    with commit_file(path) as temporary:
        temporary.write_bytes(data)
    record = {
        **facts,
        "network": fitted.network.spec.record(),
        "aggregator_code": aggregator_identity(fitted.network.aggregator),
        "tasks": tasks.record(),
        "states": fitted.states,
        "best_epoch": fitted.best_epoch,
        "curve": [list(losses) for losses in fitted.curve],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(path.with_suffix(".json"), record)
