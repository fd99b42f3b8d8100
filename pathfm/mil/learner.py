"""How the networks of one fold learn from bags as they are shown.

Validation takes no pass of its own: what a network was at the end of an epoch is asked while the next epoch is shown.

Legend: N tiles, D feature length, H width, T targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.errors import TrainingError
from pathfm.mil.augment import Batch, augment, is_active
from pathfm.mil.bags import Bags
from pathfm.mil.batches import Collector, draw_copies
from pathfm.mil.member import Fitted, FoldTargets, Member
from pathfm.mil.network import Network, spec_of
from pathfm.mil.passes import Shown
from pathfm.mil.projection import Stretch, project_together
from pathfm.mil.tasks import TaskSet
from pathfm.mil_settings import MilSettings
from pathfm.stats.seeds import derive_seed


@dataclass(frozen=True)
class FoldJob:
    """A fold to train. Whoever is to be tested is not in it, so cannot have a say.

    Attributes:
        number: of the fold.
        train: places of its training bags.
        validation: places of the bags by which training is stopped.
        seeds: one per member.
    """

    number: int
    train: tuple[int, ...]
    validation: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Course:
    """What all folds share.

    Attributes:
        bags: their features are only read by whoever shows them.
        target_BT: of all bags.
        tasks: what is learned.
        settings: how.
        device: where networks are.
        dtype: precision of arithmetic; weights and losses are float32.
    """

    bags: Bags
    target_BT: NDArray[np.float64]
    tasks: TaskSet
    settings: MilSettings
    device: torch.device
    dtype: torch.dtype


class FoldLearner:
    """All members of a fold; a ``Viewer`` of passes.

    Its passes: one to ask the fresh networks (only for losses over the whole fold), one per epoch, one for the last validation,
    one to ask the best networks (again only for such losses).

    Raises:
        TrainingError: there is nothing to learn from, or nothing to stop by.
    """

    def __init__(self, job: FoldJob, course: Course) -> None:
        for part, places in (("training", job.train), ("validation", job.validation)):
            if not places:
                raise TrainingError(f"there are no {part} bags", where=f"fold {job.number}", fix="use fewer folds")
        self.job, self.settings = job, course.settings
        self.is_over = False
        self._index = {place: index for index, place in enumerate(job.train)}
        self._held = frozenset(job.validation)
        train_FT, held_VT = (course.target_BT[list(places)] for places in (job.train, job.validation))
        self._targets = FoldTargets(course.tasks, train_FT, held_VT, self.settings.balance, course.device)
        spec = spec_of(self.settings, course.bags.dim, course.tasks.outputs)
        self.members = [Member(seed, spec, self._targets, self.settings, course.dtype) for seed in job.seeds]
        mean_D, scale_D = course.bags.statistics(job.train)
        for member in self.members:
            member.standardise(mean_D, scale_D)
        self._train_loss = dict.fromkeys(range(len(self.members)), math.nan)
        self._steps = 0
        self._epoch = -1 if course.tasks.whole_fold else 0
        self._collector = self._new_collector()

    def needs(self, place: int) -> bool:
        """Whether the next pass should show this bag."""
        return (self._learns and place in self._index) or self.needs_whole(place)

    def needs_whole(self, place: int) -> bool:
        """Whether a network will be asked about this bag."""
        return (self._asks_train and place in self._index) or (self._asks_held and place in self._held)

    def see(self, shown: Shown) -> None:
        """Learns from a training bag, or asks about a bag."""
        if self._learns and shown.place in self._index:
            for batch in self._collector.add(self._index[shown.place], shown.drawn):
                self._step(batch)
        else:
            assert shown.whole is not None
            self._ask(shown.place, shown.whole())

    def end_pass(self) -> None:
        """The pass is over: the last batch is learned, the epoch before is judged, this one is kept to be judged.

        Raises:
            TrainingError: a loss is not finite.
        """
        if self._asks_train:
            for member in self.members:
                member.bank_FO = member.answers(self.job.train)
            self.is_over = self._epoch >= 0
        else:
            if self._learns:
                for batch in self._collector.rest():
                    self._step(batch)
            for number in self._open:
                self._end_epoch(number)
            self.is_over = not self._open and not self._targets.tasks.whole_fold
        self._epoch += 1
        self._collector = self._new_collector()

    def fitted(self) -> list[Fitted]:
        """The members at their best."""
        return [member.fitted() for member in self.members]

    @property
    def _open(self) -> list[int]:
        return [number for number, member in enumerate(self.members) if member.is_open]

    @property
    def _learns(self) -> bool:
        return bool(self._open) and 0 <= self._epoch < self.settings.epochs

    @property
    def _asks_held(self) -> bool:
        return bool(self._open) and self._epoch > 0

    @property
    def _asks_train(self) -> bool:
        return self._epoch < 0 or not self._open

    def _new_collector(self) -> Collector:
        """Batches for the next epoch: all bags once, unless rare classes (of the main task) are to be drawn more often."""
        if self.settings.balance != "sampling":
            return Collector(self.settings.batch_bags)
        seed = derive_seed("mil copies", self.settings.seed, self.job.number, self._epoch)
        chance = torch.Generator().manual_seed(seed)
        return Collector(self.settings.batch_bags, draw_copies(self._targets.balance_FK[:, 0], chance), chance)

    def _step(self, batch: Batch) -> None:
        """All open members learn from a batch; they share the first layer's product unless each sees other features."""
        # Half a cosine from the first step to the last there could be.
        last = self.settings.epochs * -(-len(self.job.train) // self.settings.batch_bags)
        rate = self.settings.lr * (1 + math.cos(math.pi * self._steps / last)) / 2
        self._steps += 1
        members = [self.members[number] for number in self._open]
        if not is_active(self.settings.augment):
            _learn(members, batch, rate)
            return
        for member in members:
            of = member.network
            _learn([member], augment(batch, self.settings.augment, of.mean_D, of.scale_D, member.draw), rate)

    def _ask(self, place: int, pieces: Iterable[Stretch]) -> None:
        members = [member for member in self.members if member.is_open or not self._open]
        with torch.inference_mode():
            snapshots = [member.snapshot for member in members]
            shown = [(piece.xy_N2, *_parts(_first_layer(snapshots, [piece]), snapshots)) for piece in pieces]
            places, *parts = zip(*shown, strict=True)
            for member, pieces_of in zip(members, parts, strict=True):
                member.ask(place, torch.cat(pieces_of), torch.cat(places))

    def _end_epoch(self, number: int) -> None:
        """Judges the epoch before; unless that was the last of this member, keeps the present one to be judged."""
        member = self.members[number]
        try:
            if self._epoch > 0:
                member.judge(self._epoch - 1, self._train_loss[number], member.answers(self.job.validation))
            if member.is_open and self._learns:
                self._train_loss[number] = member.end_epoch(self._epoch)
            else:
                member.close()
        except TrainingError as error:
            raise TrainingError(error.what, where=f"fold {self.job.number}, member {number}", fix=error.fix) from error


def _learn(members: Sequence[Member], batch: Batch, rate: float) -> None:
    """One step; what lies behind the first layer is done member by member, so that memory is needed for one alone."""
    networks = [member.network for member in members]
    tile_NK = _first_layer(networks, batch.stretches)
    # What a member has done with is overwritten by its gradient.
    for member, part_NH in zip(members, _parts(tile_NK.detach(), networks), strict=True):
        leaf_NH = part_NH.detach().requires_grad_(tile_NK.requires_grad)
        member.loss(leaf_NH, batch).backward()  # type: ignore[no-untyped-call]
        if leaf_NH.grad is not None:
            part_NH.copy_(leaf_NH.grad)
    if tile_NK.requires_grad:
        tile_NK.backward(tile_NK.detach())  # type: ignore[no-untyped-call]
    for member in members:
        member.step(rate)


def _first_layer(networks: Sequence[Network], stretches: Sequence[Stretch]) -> Tensor:
    """What comes out of the first layers, side by side, or, where these are the networks' own affair, features as they are."""
    if networks[0].project is None:
        return torch.cat([stretch.features() for stretch in stretches])
    return project_together(networks, stretches)


def _parts(tile_NK: Tensor, networks: Sequence[Network]) -> tuple[Tensor, ...]:
    """What of ``_first_layer`` is for each network."""
    if networks[0].project is None:
        return (tile_NK,) * len(networks)
    return torch.split(tile_NK, [network.spec.hidden for network in networks], dim=1)
