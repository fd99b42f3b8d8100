"""TransMIL (Shao et al. 2021, arXiv 2106.00908): Nystrom attention, and positions by convolution on the grid of the tiles.

A tile's place comes from its coordinates, never from the order of storage. Nothing is padded or repeated to fill a square.

Legend: T tokens of one bag (a class token first), L its tiles, C its occupied cells, M landmarks, B bags, H width, P places of
the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pathfm.errors import UsageError
from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled
from pathfm.mil.aggregators.positions import SparseConvolution, cell_means, cells
from pathfm.mil.aggregators.segments import bag_numbers, by_bag

RADIUS = 3
"""Of the kernel of 7 x 7 cells."""
PINV_STEPS = 6
"""Steps of the iteration for the pseudo-inverse, as in the paper."""


class NystromAttention(nn.Module):
    """Self-attention through landmarks, the means of groups of tokens (Xiong et al. 2021, arXiv 2102.03902)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UsageError(f"mil.hidden ({width}) must be a multiple of mil.heads ({heads})", where="mil.heads")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width)

    def forward(self, token_TH: Tensor, member_MT: Tensor) -> Tensor:
        """What each token gathers; ``member_MT`` makes landmarks of tokens (rows sum to 1)."""
        parts = self.project(self.norm(token_TH)).chunk(3, dim=1)
        # Of each head, in single precision: the pseudo-inverse is an iteration that rounding spoils.
        query, key, value = (part.float().unflatten(1, (self.heads, -1)).transpose(0, 1) for part in parts)
        with torch.autocast(token_TH.device.type, enabled=False):
            query = query / query.shape[2] ** 0.5
            query_marks, key_marks = member_MT @ query, member_MT @ key
            to_marks = (query @ key_marks.mT).softmax(dim=2)
            between = (query_marks @ key_marks.mT).softmax(dim=2)
            from_marks = (query_marks @ key.mT).softmax(dim=2)
            gathered = to_marks @ (_pseudo_inverse(between) @ (from_marks @ value))
        merged_TH: Tensor = self.merge(gathered.transpose(0, 1).flatten(1))
        return merged_TH


def _pseudo_inverse(matrix: Tensor) -> Tensor:
    """Moore-Penrose inverses of square matrices with positive entries, by the third-order iteration of Razavi et al. (2014)."""
    size = matrix.sum(dim=-1).amax(dim=-1) * matrix.sum(dim=-2).amax(dim=-1)
    inverse = matrix.mT / size[:, None, None]
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(PINV_STEPS):
        product = matrix @ inverse
        inverse = inverse @ (13 * unit - product @ (15 * unit - product @ (7 * unit - product))) / 4
    return inverse


class TransMil(Aggregator):
    """Attention, positions, attention; the head sees the class token.

    Positions are one depth-wise kernel of 7 x 7 cells (it contains the paper's 5 x 5 and 3 x 3), over the mean of the tiles of
    a cell; what is added is the same for all of them. Landmarks are means over runs of cells, row after row; the class token is
    one of its own. The paper's convolution along the stored sequence is left out: that order means nothing.
    """

    uses_positions = True
    duplicates = "change"

    def __init__(self, width: int, outputs: int, heads: int = 1, landmarks: int = 64) -> None:
        super().__init__()
        if landmarks < 1:
            raise UsageError("landmarks must be 1 or more", where="mil.options")
        self.landmarks = landmarks
        self.token_1H = nn.Parameter(torch.zeros(1, width))
        self.attention_1 = NystromAttention(width, heads)
        self.kernel_PH = nn.Parameter(torch.zeros((2 * RADIUS + 1) ** 2, width))
        self.attention_2 = NystromAttention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        place = cells(packed.xy_N2, bag_numbers(packed.lengths, packed.xy_N2.device), RADIUS)
        members = [self._landmarks(cell_L) for cell_L in by_bag(place.cell_N, packed.lengths)]
        tokens = [torch.cat([self.token_1H, tile_LH]) for tile_LH in by_bag(packed.tile_NH.float(), packed.lengths)]
        tokens = [token_TH + self.attention_1(token_TH, member_MT) for token_TH, member_MT in zip(tokens, members, strict=True)]
        tile_NH = torch.cat([token_TH[1:] for token_TH in tokens])
        around_CH = SparseConvolution.apply(cell_means(tile_NH, place), self.kernel_PH, place.neighbour_PC)
        tiles = by_bag(tile_NH + around_CH[place.cell_N], packed.lengths)
        tokens = [torch.cat([token_TH[:1], tile_LH]) for token_TH, tile_LH in zip(tokens, tiles, strict=True)]
        tokens = [token_TH + self.attention_2(token_TH, member_MT) for token_TH, member_MT in zip(tokens, members, strict=True)]
        slide_BH = self.norm(torch.stack([token_TH[0] for token_TH in tokens]))
        return Pooled(self.head(slide_BH), slide_BH)

    def _landmarks(self, cell_L: Tensor) -> Tensor:
        """Which tokens [M, T] of a bag a landmark is the mean of; the first is the class token."""
        rank_L = cell_L - cell_L.min()
        occupied = int(rank_L.max()) + 1
        groups = min(self.landmarks, occupied)
        group_T = torch.cat([rank_L.new_zeros(1), 1 + rank_L * groups // occupied])
        is_member_MT = group_T == torch.arange(groups + 1, device=group_T.device)[:, None]
        return is_member_MT / is_member_MT.sum(dim=1, keepdim=True)
