"""Folds times members: every network is kept on disk as it is finished, so that a killed run goes on where it was.

Legend: B bags, C classes, N tiles of a bag.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from pathfm.config import fingerprint
from pathfm.errors import StoreError
from pathfm.faults import crash_point
from pathfm.log import track
from pathfm.mil.aggregator import AttentionMil
from pathfm.mil.fit import CPU, Answer, Bags, EpochLoss, Fitted, ask, fit
from pathfm.stats.seeds import derive_seed
from pathfm.store.commit import commit_file, read_json, write_json
from pathfm.study import MilSettings

VERSION = 2
"""Raised whenever the same bags and settings give other weights."""


@dataclass(frozen=True)
class FoldPlaces:
    """A fold as places in the list of bags."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def tested_places(folds: Sequence[FoldPlaces]) -> tuple[int, ...]:
    """The bags that are in a test part, in their order: the rows of every out-of-fold answer."""
    return tuple(sorted(place for fold in folds for place in fold.test))


@dataclass(frozen=True)
class Experiment:
    """One model of the study: what it learns from and what its networks are recorded with.

    Attributes:
        name: as in ``metrics.json``.
        folder: where the networks are kept (``fold-K/member-M.*`` below it).
        bags: all bags with the class each is to have.
        digest_B: content hash of each bag.
        settings: of the stage.
        facts: what a network must be recorded with to be used again (classes, encoder, ...).
        fingerprint: of everything upstream.
        device: where networks run.
        workers: networks trained at the same time; has no part in what comes out.
    """

    name: str
    folder: Path
    bags: Bags
    digest_B: tuple[str, ...]
    settings: MilSettings
    facts: Mapping[str, Any]
    fingerprint: str
    device: torch.device = CPU
    workers: int = 1

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.facts["classes"])


@dataclass(frozen=True)
class CurvePoint:
    """One epoch of one network."""

    fold: int
    member: int
    epoch: int
    loss: EpochLoss


@dataclass(frozen=True)
class OutOfFold:
    """What networks that never met a bag say of it: the mean of the members of its fold, per bag of the test parts.

    Attributes:
        probability_BC: class probabilities.
        attention: [N] per bag, sums to 1.
        attention_logit: [N] per bag.
        curves: all networks, all epochs.
    """

    probability_BC: NDArray[np.float64]
    attention: tuple[NDArray[np.float64], ...]
    attention_logit: tuple[NDArray[np.float64], ...]
    curves: tuple[CurvePoint, ...]


def out_of_fold(experiment: Experiment, folds: Sequence[FoldPlaces]) -> OutOfFold:
    """Train (or find kept) all networks and ask each about its own test bags only."""
    members = experiment.settings.ensemble
    prune(experiment.folder, len(folds), members)
    said: dict[int, list[Answer]] = {}
    curves: list[CurvePoint] = []
    jobs = [(number, member) for number in range(len(folds)) for member in range(members)]

    def work(job: tuple[int, int]) -> tuple[Fitted, list[Answer]]:
        fitted = kept_or_fitted(experiment, folds[job[0]], *job)
        return fitted, ask(fitted.model, experiment.bags.part(folds[job[0]].test).bags)

    with one_thread(), ThreadPoolExecutor(experiment.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = track(pool.map(work, jobs), f"mil: {experiment.name}", len(jobs))
        for (number, member), (fitted, answers) in zip(jobs, done, strict=True):
            curves += [CurvePoint(number, member, epoch, loss) for epoch, loss in enumerate(fitted.curve)]
            for place, answer in zip(folds[number].test, answers, strict=True):
                said.setdefault(place, []).append(answer)
    means = [_mean(said[place]) for place in tested_places(folds)]
    return OutOfFold(
        np.stack([answer.probability_C for answer in means]),
        tuple(answer.attention_N for answer in means),
        tuple(answer.attention_logit_N for answer in means),
        tuple(curves),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of the tensor library: sums are then made in one order, whatever ``compute.threads`` says.

    Cores are used by training several networks at the same time instead.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prune(folder: Path, folds: int, members: int) -> None:
    """Delete networks that earlier settings left behind: ``predict`` asks all that lie there."""
    wanted = {member_path(folder, fold, member) for fold in range(folds) for member in range(members)}
    for path in sorted(folder.glob("fold-*/member-*.safetensors")):
        if path not in wanted:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink()


def member_path(folder: Path, fold: int, member: int) -> Path:
    """Where a network is kept; ``.json`` beside it says what it is, and is written last."""
    return folder / f"fold-{fold}" / f"member-{member}.safetensors"


def kept_or_fitted(experiment: Experiment, fold: FoldPlaces, number: int, member: int) -> Fitted:
    """The network of a fold and member: from disk if its fingerprint is the wanted one, else trained and kept."""
    path = member_path(experiment.folder, number, member)
    learned = fold.train + fold.validation
    wanted = fingerprint(
        {"version": VERSION, "name": experiment.name, "upstream": experiment.fingerprint, "fold": number, "member": member},
        experiment.settings,
        dict(experiment.facts),
        [experiment.digest_B[place] for place in learned],
        [experiment.bags.label_B[place] for place in learned],
        len(fold.train),
    )
    kept = _kept(path, wanted)
    if kept:
        model, facts = kept
        return Fitted(model.to(experiment.device), facts["best_epoch"], tuple(EpochLoss(*losses) for losses in facts["curve"]))
    bags, seed = experiment.bags, derive_seed("mil", experiment.settings.seed, experiment.name, number, member)
    fitted = fit(
        bags.part(fold.train), bags.part(fold.validation), experiment.classes, experiment.settings, seed, experiment.device
    )
    _keep(path, fitted, {**experiment.facts, "fingerprint": wanted, "fold": number, "member": member})
    return fitted


def load_member(path: Path) -> tuple[AttentionMil, dict[str, Any]]:
    """A kept network in eval mode on the CPU, and the facts beside it.

    Raises:
        StoreError: absent, damaged, or weights and facts do not belong together.
    """
    facts = read_json(path.with_suffix(".json"))
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise StoreError("the weights are not those that were saved", where=str(path), fix="run `pathfm mil` again")
        shape = facts["network"]
        model = AttentionMil(shape["dim"], shape["hidden"], shape["attention"], len(facts["classes"]), shape["dropout"])
        model.load_state_dict(load(data))
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"not a usable network ({error})", where=str(path), fix="run `pathfm mil` again") from error
    return model.eval(), facts


def _kept(path: Path, wanted: str) -> tuple[AttentionMil, dict[str, Any]] | None:
    try:
        model, facts = load_member(path)
    except StoreError:
        return None
    return (model, facts) if facts.get("fingerprint") == wanted else None


def _keep(path: Path, fitted: Fitted, facts: Mapping[str, Any]) -> None:
    model = fitted.model
    data = save({name: value.cpu().contiguous() for name, value in sorted(model.state_dict().items())})
    network = {
        "dim": model.project.in_features,
        "hidden": model.project.out_features,
        "attention": model.pool.score.in_features,
        "dropout": model.dropout,
    }
    crash_point("mil.member.before_commit")
    with commit_file(path) as temporary:
        temporary.write_bytes(data)
    curve = [list(losses) for losses in fitted.curve]
    digest = hashlib.sha256(data).hexdigest()
    write_json(
        path.with_suffix(".json"),
        {**facts, "network": network, "best_epoch": fitted.best_epoch, "curve": curve, "sha256": digest},
    )


def _mean(answers: Sequence[Answer]) -> Answer:
    return Answer(
        np.mean([answer.probability_C for answer in answers], axis=0),
        np.mean([answer.attention_N for answer in answers], axis=0),
        np.mean([answer.attention_logit_N for answer in answers], axis=0),
    )
