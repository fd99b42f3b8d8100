"""CLAM (Lu et al. 2021, Nature Biomedical Engineering 5): attention whose extremes are also classified, tile by tile.

Legend: N tiles of all bags together, B bags, L tiles of one bag, H width, C classes, K tiles chosen, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pathfm.errors import UsageError
from pathfm.mil.aggregators.attention import Abmil, ClassQueries
from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled
from pathfm.mil.aggregators.segments import by_bag


class Instances(nn.Module):
    """Two-way classifiers of tiles, one per class: is this tile evidence for the class?

    Of a slide of class c, the tiles with the most attention are evidence for c and those with the least are not. With
    ``subtyping`` (classes exclude each other) the tiles with the most attention are evidence for no other class.

    Args:
        width: of a tile.
        outputs: of the network. One class more is made room for, since some tasks have an output less than classes.
        tiles: how many at either end; never more than half of the bag, so that none is on both sides.
        subtyping: see above.
    """

    def __init__(self, width: int, outputs: int, tiles: int, subtyping: bool) -> None:
        super().__init__()
        if tiles < 1:
            raise UsageError("instance_tiles must be 1 or more", where="mil.options")
        self.outputs, self.tiles, self.subtyping = outputs, tiles, subtyping
        self.head = nn.Linear(width, 2 * (outputs + 1))

    def forward(self, packed: Packed, attention_NQ: Tensor) -> Tensor | None:
        """Mean loss of the bags whose class is known and that have two tiles or more; None: there are none."""
        if packed.class_B is None:
            return None
        parts = (by_bag(packed.tile_NH, packed.lengths), by_bag(attention_NQ.detach(), packed.lengths), packed.class_B.tolist())
        bags = [bag for bag in zip(*parts, strict=True) if 0 <= bag[2] <= self.outputs and len(bag[0]) > 1]
        losses = [self._loss(tile_LH, attention_LQ, number) for tile_LH, attention_LQ, number in bags]
        return torch.stack(losses).mean() if losses else None

    def _loss(self, tile_LH: Tensor, attention_LQ: Tensor, number: int) -> Tensor:
        count = min(self.tiles, len(tile_LH) // 2)
        loss = tile_LH.new_zeros(())
        classes = sorted({number, *range(self.outputs)}) if self.subtyping else [number]
        for other in classes:
            attention_L = attention_LQ[:, min(other, attention_LQ.shape[1] - 1)]
            chosen_K = attention_L.topk(count).indices
            if other == number:
                chosen_K = torch.cat([chosen_K, attention_L.topk(count, largest=False).indices])
            is_evidence_K = torch.arange(len(chosen_K), device=chosen_K.device) < (count if other == number else 0)
            with torch.autocast(tile_LH.device.type, enabled=False):  # few tiles, and not always as many
                logit_K2 = self.head(tile_LH[chosen_K].float()).unflatten(1, (-1, 2))[:, other]
            loss = loss + cross_entropy(logit_K2, is_evidence_K.long())
        return loss / len(classes)

    def judge(self, pooled: Pooled, packed: Packed, weight: float) -> Pooled:
        """The same, with this loss for ``weight`` of the whole; in training only."""
        loss = self(packed, pooled.attention_NQ) if self.training else None
        return pooled if loss is None else pooled._replace(weight=1 - weight, extra=weight * loss)


class _Clam(Aggregator):
    """Attention pooling, and the instance loss (``instance_weight`` of the whole)."""

    def __init__(
        self,
        width: int,
        outputs: int,
        attention: int = 64,
        instance_tiles: int = 8,
        instance_weight: float = 0.3,
        subtyping: bool = False,
    ) -> None:
        super().__init__(width, outputs, attention)
        self.instance_weight = _share(instance_weight)
        self.instances = Instances(width, outputs, instance_tiles, subtyping)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        pooled = super().forward(packed)  # type: ignore[safe-super]  # of the aggregator named beside this class
        return self.instances.judge(pooled, packed, self.instance_weight)


class ClamSb(_Clam, Abmil):
    """One attention map per slide."""


class ClamMb(_Clam, ClassQueries):
    """One attention map per output; the instance loss goes by the map of each class."""


def _share(weight: float) -> float:
    if not 0 <= weight < 1:
        raise UsageError(f"instance_weight is {weight}, not from 0 to less than 1", where="mil.options")
    return weight
