"""Training of one network, and how a network is asked: in eval mode, without gradients, always.

Legend: B bags, N tiles of a bag, D feature length, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pathfm.errors import TrainingError
from pathfm.mil.aggregator import AttentionMil
from pathfm.mil.bags import tile_statistics
from pathfm.study import MilSettings

CPU = torch.device("cpu")
ASK_TILES = 65_536
"""Tiles per forward pass when a network is asked (a larger bag goes alone)."""


@dataclass(frozen=True)
class Bags:
    """Bags [N, D] with the class number of each."""

    bags: tuple[Tensor, ...]
    label_B: tuple[int, ...]

    def part(self, indices: Sequence[int]) -> Bags:
        """The bags at these places."""
        return Bags(tuple(self.bags[index] for index in indices), tuple(self.label_B[index] for index in indices))


class EpochLoss(NamedTuple):
    """Class-weighted cross-entropy: mean over the epoch's batches, and on the inner validation part after it."""

    train: float
    validation: float


@dataclass(frozen=True)
class Fitted:
    """The network at its best epoch (in eval mode), and the losses of every epoch."""

    model: AttentionMil
    best_epoch: int
    curve: tuple[EpochLoss, ...]


@dataclass(frozen=True)
class Answer:
    """What a network says of one bag.

    Attributes:
        probability_C: sums to 1.
        attention_N: sums to 1 over the tiles of the bag.
        attention_logit_N: attention before the softmax.
    """

    probability_C: NDArray[np.float64]
    attention_N: NDArray[np.float64]
    attention_logit_N: NDArray[np.float64]


def build(dim: int, classes: int, settings: MilSettings) -> AttentionMil:
    """The network of the settings, its weights not yet drawn."""
    return AttentionMil(dim, settings.hidden, settings.attention, classes, settings.dropout)


def fit(train: Bags, validation: Bags, classes: int, settings: MilSettings, seed: int, device: torch.device = CPU) -> Fitted:
    """Train one network; the epoch with the lowest loss on ``validation`` is kept.

    AdamW, cosine learning rate, cross-entropy weighted so that every class counts the same. Bags stay where they are and go to
    the device batch by batch; all chance comes from ``seed``. Whoever is to be tested is not an argument, so cannot have a say.

    Raises:
        TrainingError: a loss is not finite.
    """
    draw = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    model = build(train.bags[0].shape[1], classes, settings)
    model.draw_weights(draw)
    mean_D, deviation_D = tile_statistics(train.bags)
    model.mean_D.copy_(mean_D)
    model.scale_D.copy_(deviation_D)
    model.to(device)
    weight_C = _class_weights(train.label_B, classes).to(device)
    rates = _cosine(settings.lr, settings.epochs * math.ceil(len(train.bags) / settings.batch_bags))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    best, best_epoch, state = math.inf, 0, {}
    curve: list[EpochLoss] = []
    for epoch in range(settings.epochs):
        losses = [
            _step(model, optimizer, next(rates), _loss(model, batch, weight_C, noise))
            for batch in _batches(train, settings, draw)
        ]
        curve.append(EpochLoss(sum(losses) / len(losses), evaluate_loss(model, validation, weight_C)))
        if not all(map(math.isfinite, curve[-1])):
            raise TrainingError(f"the loss is not finite in epoch {epoch}", where="mil", fix="lower mil.lr")
        if curve[-1].validation < best:
            best, best_epoch = curve[-1].validation, epoch
            state = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(state)
    return Fitted(model.eval(), best_epoch, tuple(curve))


def evaluate_loss(model: AttentionMil, held: Bags, weight_C: Tensor) -> float:
    """Class-weighted cross-entropy of bags the network does not learn from."""
    model.eval()
    with torch.inference_mode():
        logit_BC = torch.cat([model(*_packed(model, chunk)).logit_BC for chunk in _chunks(held.bags)])
        label_B = torch.tensor(held.label_B, device=logit_BC.device)
        return float(cross_entropy(logit_BC, label_B, weight=weight_C))


def ask(model: AttentionMil, bags: Sequence[Tensor]) -> list[Answer]:
    """What the network says of each bag [N, D]; the bag's neighbours have no part in it."""
    model.eval()
    answers: list[Answer] = []
    with torch.inference_mode():
        for chunk in _chunks(bags):
            verdict = model(*_packed(model, chunk))
            lengths = [len(bag) for bag in chunk]
            attention = verdict.attention_N.double().cpu().split(lengths)
            logit = verdict.attention_logit_N.double().cpu().split(lengths)
            probability_BC = verdict.logit_BC.double().softmax(1).cpu()
            answers += [
                Answer(*(part.numpy() for part in parts)) for parts in zip(probability_BC, attention, logit, strict=True)
            ]
    return answers


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, loss: Tensor) -> float:
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def _loss(model: AttentionMil, batch: Bags, weight_C: Tensor, noise: torch.Generator) -> Tensor:
    model.train()
    logit_BC = model(*_packed(model, batch.bags), noise).logit_BC
    return cross_entropy(logit_BC, torch.tensor(batch.label_B, device=logit_BC.device), weight=weight_C)


def _batches(train: Bags, settings: MilSettings, draw: torch.Generator) -> Iterator[Bags]:
    """Shuffled batches; from bags larger than ``max_bag_tiles`` other tiles are drawn every epoch."""
    order = torch.randperm(len(train.bags), generator=draw).tolist()
    for start in range(0, len(order), settings.batch_bags):
        batch = train.part(order[start : start + settings.batch_bags])
        yield Bags(tuple(_draw_tiles(bag, settings.max_bag_tiles, draw) for bag in batch.bags), batch.label_B)


def _draw_tiles(bag: Tensor, most: int | None, draw: torch.Generator) -> Tensor:
    if most is None or len(bag) <= most:
        return bag
    return bag[torch.randperm(len(bag), generator=draw)[:most]]


def _packed(model: AttentionMil, bags: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    return torch.cat(list(bags)).to(model.mean_D.device).float(), [len(bag) for bag in bags]


def _chunks(bags: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    chunk: list[Tensor] = []
    for bag in bags:
        if chunk and sum(map(len, chunk)) + len(bag) > ASK_TILES:
            yield chunk
            chunk = []
        chunk.append(bag)
    if chunk:
        yield chunk


def _class_weights(label_B: Sequence[int], classes: int) -> Tensor:
    count_C = torch.bincount(torch.tensor(label_B), minlength=classes)
    return len(label_B) / (classes * count_C.clamp_min(1).float())


def _cosine(lr: float, steps: int) -> Iterator[float]:
    return (lr * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps))
