"""What every aggregator is given and gives: tiles of bags packed end to end in, one vector per bag (and query) out.

Legend: N tiles of all bags together, B bags, K pseudo-bags, H width, Q queries, O outputs of the network.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathfm.errors import SlideError


class Packed(NamedTuple):
    """Tiles of bags, packed end to end: no padding, so nothing to mask.

    Attributes:
        tile_NH: what the tiles are, bag after bag.
        lengths: tiles of each bag; their sum is N.
        xy_N2: where they lie, float32, in tile sides from the corner of their slide (slides of one bag lie side by side).
        class_B: class numbers for losses that need them, in training only; -1 where unknown.
        noise: source of all chance, in training only; without it nothing is random.
    """

    tile_NH: Tensor
    lengths: tuple[int, ...]
    xy_N2: Tensor
    class_B: Tensor | None = None
    noise: torch.Generator | None = None


class Side(NamedTuple):
    """Outputs besides those of the bags, judged in training by the same loss: of instances, or of pseudo-bags.

    Attributes:
        output_KO: like the outputs of a bag.
        bag_K: the bag each belongs to, whose target it has.
        weight: of their loss.
    """

    output_KO: Tensor
    bag_K: Tensor
    weight: float


class Pooled(NamedTuple):
    """What an aggregator makes of bags.

    Attributes:
        output_BO: outputs of the heads.
        slide_BH: one vector per bag (of class-wise aggregators: all of them, one after another).
        attention_NQ: weight of each tile, summing to 1 over the tiles of a bag for each query: Q is 1, or O where every output
            has its own. None: the aggregator has no attention of its own, and gradient x input stands in.
        logit_NQ: the same before the softmax.
        side: further outputs that are judged in training.
        weight: of the loss of ``output_BO`` beside the others.
        extra: a further loss (a scalar, weighted already), in training only.
    """

    output_BO: Tensor
    slide_BH: Tensor
    attention_NQ: Tensor | None = None
    logit_NQ: Tensor | None = None
    side: tuple[Side, ...] = ()
    weight: float = 1.0
    extra: Tensor | None = None


class Aggregator(nn.Module):
    """Base of all aggregators.

    A subclass declares what holds for it, and the contract tests hold it to that:

    Attributes:
        projected: it is given the network's projection of width ``hidden`` (else the features themselves, as their encoder made
            them: what was trained on such features wants nothing else).
        uses_positions: ``xy_N2`` has a part in the result; the order of the tiles never has.
        duplicates: what the same tile twice does: ``"weight"`` (counts twice, so a bag given twice over is the same bag),
            or ``"change"`` (may change the result otherwise).
        half_precision: it may compute in bfloat16 on a CPU too, as all its products over tiles are those of ``products`` (which
            see). Others are given float32 there, without autocast.
    """

    projected: bool = True
    uses_positions: bool = False
    duplicates: str = "weight"
    half_precision: bool = False

    def draw_weights(self, generator: torch.Generator) -> None:
        """Fresh weights from a CPU generator, so that every device starts the same; no global state is touched.

        Matrices and kernels: Xavier uniform; scales of norms: 1; biases: 0.
        """
        draw_weights(self, generator)

    @abstractmethod
    def forward(self, packed: Packed) -> Pooled:
        """Pools bags; the neighbours of a bag have no part in it. The network has seen to it that every bag has tiles."""


def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Fresh weights for everything in a module, see ``Aggregator.draw_weights``."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.constant_(parameter, float(name == "weight"))


def check_lengths(lengths: Sequence[int], tiles: int) -> None:
    """Bags must have tiles, and their lengths must add up.

    Raises:
        SlideError: a bag has no tiles.
        ValueError: the lengths do not add up to N.
    """
    if sum(lengths) != tiles:
        raise ValueError(f"bag lengths add up to {sum(lengths)}, but there are {tiles} tiles")
    empty = [index for index, length in enumerate(lengths) if length < 1]
    if empty or not lengths:
        raise SlideError("a bag without tiles cannot be classified", where=f"bag {empty[0] if empty else 0} of {len(lengths)}")
