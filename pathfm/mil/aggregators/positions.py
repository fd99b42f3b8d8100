"""What is made of the places of tiles: cells of a grid, and a lot that is drawn by place. Never the order they are stored in.

Legend: N tiles, C occupied cells, H width, P places of a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

SLACK = 0.05
"""Corners are whole pixels while sides need not be: a tile this little [tile sides] before a line of the grid is behind it."""


def lot(xy_N2: Tensor) -> Tensor:
    """A number [N] (int64, from 0 to 2^62) for each tile that looks random and is a function of its place alone.

    Places are taken to 1/16 of a tile side; the mixing is that of splitmix64, in wrapping integers, equal on all devices.
    """
    place_N2 = (xy_N2.double() * 16).round().long()
    mixed_N = place_N2[:, 0] * -7046029254386353131 + place_N2[:, 1] * -4658895280553007687
    mixed_N = (mixed_N ^ (mixed_N >> 30)) * -4658895280553007687
    mixed_N = (mixed_N ^ (mixed_N >> 27)) * -7723592293110705685
    return (mixed_N ^ (mixed_N >> 31)) & (2**62 - 1)


class Cells(NamedTuple):
    """The occupied cells of a grid with cells of one tile side, bag after bag, row after row.

    Attributes:
        cell_N: the cell of each tile.
        count_C: tiles of each cell.
        neighbour_PC: for each place of a kernel, row after row, the cell that lies there; C where there is none.
    """

    cell_N: Tensor
    count_C: Tensor
    neighbour_PC: Tensor


def cells(xy_N2: Tensor, bag_N: Tensor, radius: int) -> Cells:
    """The cells of the tiles, bag after bag, and their neighbours up to ``radius`` away in the same bag."""
    place_N2 = torch.floor(xy_N2.double() + SLACK).long()
    place_N2 = place_N2 - place_N2.amin(dim=0) + radius
    stride, rows = (place_N2.amax(dim=0) + radius + 1).tolist()
    key_N = (bag_N * rows + place_N2[:, 1]) * stride + place_N2[:, 0]
    key_C, cell_N, count_C = torch.unique(key_N, return_inverse=True, return_counts=True)
    step_R = torch.arange(-radius, radius + 1, device=xy_N2.device)
    wanted_PC = (step_R[:, None] * stride + step_R).reshape(-1, 1) + key_C
    found_PC = torch.searchsorted(key_C, wanted_PC).clamp_max(len(key_C) - 1)
    return Cells(cell_N, count_C, torch.where(key_C[found_PC] == wanted_PC, found_PC, len(key_C)))


def cell_means(tile_NH: Tensor, place: Cells) -> Tensor:
    """The mean [C, H] of the tiles of each cell (sums that repeat exactly, on a GPU too)."""
    sum_CH = tile_NH.new_zeros(len(place.count_C), tile_NH.shape[1])
    return sum_CH.index_put((place.cell_N,), tile_NH, accumulate=True) / place.count_C[:, None]


class SparseConvolution(torch.autograd.Function):
    """Depth-wise convolution of occupied cells: what is empty is 0 and costs nothing, however far the cells lie apart."""

    @staticmethod
    def forward(ctx: FunctionCtx, cell_CH: Tensor, kernel_PH: Tensor, neighbour_PC: Tensor) -> Tensor:
        """Sum over the places of the kernel of weight x neighbour."""
        ctx.save_for_backward(cell_CH, kernel_PH, neighbour_PC)
        return _gathered(cell_CH, kernel_PH, neighbour_PC)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """The same sum with the kernel turned round, and the gradient of each place of the kernel."""
        cell_CH, kernel_PH, neighbour_PC = ctx.saved_tensors  # type: ignore[attr-defined]
        (gradient_CH,) = gradients
        padded_CH = torch.cat([cell_CH, cell_CH.new_zeros(1, cell_CH.shape[1])])
        kernel_gradient_PH = torch.stack([(padded_CH[place_C] * gradient_CH).sum(dim=0) for place_C in neighbour_PC])
        return _gathered(gradient_CH, kernel_PH.flip(0), neighbour_PC), kernel_gradient_PH, None


def _gathered(cell_CH: Tensor, kernel_PH: Tensor, neighbour_PC: Tensor) -> Tensor:
    padded_CH = torch.cat([cell_CH, cell_CH.new_zeros(1, cell_CH.shape[1])])
    sum_CH = torch.zeros_like(cell_CH)
    for place_C, weight_H in zip(neighbour_PC, kernel_PH, strict=True):
        sum_CH.addcmul_(padded_CH[place_C], weight_H)
    return sum_CH
