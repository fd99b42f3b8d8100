"""One network of a fold while it learns, and what it shares with the fold's other members.

Legend: B bags of a batch, F bags of the training part, V of the validation part, N tiles, D feature length, H width, O outputs,
T targets, K tasks, R judged rows (each bag of a batch once; twice when bags are mixed), X outputs that belong to bags.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.errors import TrainingError
from pathfm.mil.aggregators.contract import Packed, Pooled
from pathfm.mil.augment import Batch
from pathfm.mil.network import Network, NetworkSpec, build_network
from pathfm.mil.tasks import TaskSet
from pathfm.mil.tasks.contract import Bank, State
from pathfm.mil_settings import MilSettings
from pathfm.stats.seeds import derive_seed

ONE_CLASS = ("binary", "multiclass", "ordinal")
"""Kinds of tasks whose target is one class number."""


class EpochLoss(NamedTuple):
    """Loss of one network: mean over the epoch's batches, and on the inner validation part after it."""

    train: float
    validation: float


@dataclass(frozen=True)
class Fitted:
    """A network at its best epoch (on the CPU, in eval mode), and the losses of every epoch.

    Attributes:
        network: trained.
        best_epoch: the one whose weights it has, from 0.
        curve: losses by epoch.
        states: what tasks fitted on the training part besides the network, by task name.
    """

    network: Network
    best_epoch: int
    curve: tuple[EpochLoss, ...]
    states: Mapping[str, State]


class FoldTargets:
    """What a fold's networks are judged by.

    Attributes:
        tasks: as they are learned from this training part.
        train_FT: targets of the training part.
        train_FK: weights of its bags.
        held_VT: targets of the validation part.
        held_VK: weights of its bags, for which every class counts the same unless nothing is balanced.
        balance_FK: weights with which every class of the training part would count the same.
        noted_FT: ``train_FT`` as it was given.
    """

    def __init__(
        self, tasks: TaskSet, train_FT: NDArray[np.float64], held_VT: NDArray[np.float64], balance: str, device: torch.device
    ) -> None:
        self.noted_FT = train_FT
        self.tasks = tasks.for_part(train_FT)
        self.balance_FK = self.tasks.balance(train_FT)
        ones_FK, ones_VK = (np.ones((len(part), len(tasks.tasks))) for part in (train_FT, held_VT))
        train_FK = self.balance_FK if balance == "weights" else ones_FK
        held_VK = ones_VK if balance == "none" else self.tasks.balance(held_VT)
        self.train_FT, self.train_FK, self.held_VT, self.held_VK = (
            torch.from_numpy(values).float().to(device) for values in (train_FT, train_FK, held_VT, held_VK)
        )

    def class_B(self, index_B: Sequence[int]) -> Tensor | None:
        """Class number of training bags in the main task; -1 where unknown, None where it has no such numbers."""
        if self.tasks.main.kind not in ONE_CLASS:
            return None
        value_B = self.train_FT[list(index_B), 0]
        return torch.where(value_B.isnan(), -1, value_B).long()


class Member:
    """A network, its optimizer, and the best that it has been.

    What it was at the end of the last epoch (``snapshot``) is asked while it learns on.
    """

    def __init__(self, seed: int, spec: NetworkSpec, targets: FoldTargets, settings: MilSettings, dtype: torch.dtype) -> None:
        self.network = build_network(spec)
        self.network.draw_weights(torch.Generator().manual_seed(seed))
        self.draw = torch.Generator().manual_seed(derive_seed("mil augment", seed))
        self.targets, self.patience = targets, settings.patience
        self.device, self.dtype = targets.train_FT.device, dtype
        self.noise = torch.Generator(self.device).manual_seed(derive_seed("mil noise", seed))
        self.network.to(self.device).train()
        self.snapshot = copy.deepcopy(self.network).eval()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.bank_FO = torch.zeros(len(targets.train_FT), spec.outputs, device=self.device)
        self.curve: list[EpochLoss] = []
        self.best, self.best_epoch, self.is_open = math.inf, 0, True
        self._losses: list[Tensor] = []
        self._said: dict[int, Tensor] = {}

    def standardise(self, mean_D: Tensor, scale_D: Tensor) -> None:
        """Takes over the mean and scale of the training tiles."""
        for network in (self.network, self.snapshot):
            network.mean_D.copy_(mean_D)
            network.scale_D.copy_(scale_D)

    def loss(self, tile_NH: Tensor, batch: Batch) -> Tensor:
        """The loss of a batch, from what comes out of the first layer; noted for the curve, as are the outputs for the bank."""
        bags = len(batch.lengths)
        xy_N2 = torch.cat([stretch.xy_N2 for stretch in batch.stretches])
        packed = Packed(tile_NH, batch.lengths, xy_N2, self.targets.class_B(batch.place_R[:bags]), self.noise)
        pooled = self._pool(self.network, packed)
        output_BO = pooled.output_BO.float()
        loss = pooled.weight * self._judge(output_BO, torch.arange(bags, device=self.device), batch)
        for side in pooled.side:
            loss = loss + side.weight * self._judge(side.output_KO.float(), side.bag_K, batch)
        if pooled.extra is not None:
            loss = loss + pooled.extra.float()
        self.bank_FO[list(batch.place_R[:bags])] = output_BO.detach()
        self._losses.append(loss.detach())
        return loss

    def step(self, rate: float) -> None:
        """Changes the weights by the gradients that are there, and forgets these."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ask(self, place: int, tile_NH: Tensor, xy_N2: Tensor) -> None:
        """Notes what the snapshot says of a bag, from what comes out of its first layer."""
        pooled = self._pool(self.snapshot, Packed(tile_NH, (len(tile_NH),), xy_N2))
        self._said[place] = pooled.output_BO[0].float()

    def answers(self, places: Sequence[int]) -> Tensor:
        """What was noted of bags [.., O]; it is forgotten."""
        return torch.stack([self._said.pop(place) for place in places]).clone()

    def end_epoch(self, epoch: int) -> float:
        """The mean training loss of an epoch; what the network is now will be asked."""
        loss = float(torch.stack(self._losses).mean())
        self._losses = []
        _check_finite(loss, epoch)
        self.snapshot.load_state_dict(self.network.state_dict())
        return loss

    def judge(self, epoch: int, train_loss: float, output_VO: Tensor) -> None:
        """Validation of the snapshot: the best is kept, and who has not got better for long is closed."""
        with torch.no_grad():
            loss = float(self.targets.tasks.loss(output_VO, self.targets.held_VT, self.targets.held_VK))
        _check_finite(loss, epoch)
        self.curve.append(EpochLoss(train_loss, loss))
        if loss < self.best:
            self.best, self.best_epoch = loss, epoch
            self._best_state = {name: value.clone() for name, value in self.snapshot.state_dict().items()}
        self.is_open = epoch - self.best_epoch < self.patience

    def close(self) -> None:
        """Learns no more: the snapshot is now the best network there was."""
        self.is_open = False
        self.snapshot.load_state_dict(self._best_state)

    def fitted(self) -> Fitted:
        """The result; ``bank_FO`` holds what tasks need to know of the training part."""
        states = self.targets.tasks.fit_state(self.bank_FO.double().cpu().numpy(), self.targets.noted_FT)
        return Fitted(copy.deepcopy(self.snapshot).cpu(), self.best_epoch, tuple(self.curve), states)

    def _pool(self, network: Network, packed: Packed) -> Pooled:
        # The cache of casts is shared by threads, and how sums over shared weights are rounded would depend on who empties it.
        is_half = self.dtype is not torch.float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_half, cache_enabled=False):
            return network.pool(packed.tile_NH, packed)

    def _judge(self, output_XO: Tensor, bag_X: Tensor, batch: Batch) -> Tensor:
        """The loss of outputs that belong to bags: by the bags' targets, and by those of what was mixed into them."""
        targets, times = self.targets, len(batch.place_R) // len(batch.lengths)
        index_R, share_R = (
            torch.tensor(values, device=self.device).view(times, -1)[:, bag_X].flatten()
            for values in (batch.place_R, batch.share_R)
        )
        weight_RK = targets.train_FK[index_R] * (times * share_R[:, None])
        bank = Bank(self.bank_FO, targets.train_FT, index_R) if targets.tasks.whole_fold else None
        return targets.tasks.loss(output_XO.repeat(times, 1), targets.train_FT[index_R], weight_RK, bank)


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is not finite in epoch {epoch}", fix="lower mil.lr")
