"""Cells and lots, against plain slow versions."""

import torch
from torch.nn.functional import conv2d

from pathfm.mil.aggregators.positions import SparseConvolution, cell_means, cells, lot
from tests.mil.aggregators.examples import bag, close


def _dense(cell_CH, kernel_PH, xy_C2):
    """The same convolution on the whole grid, padded with zeros."""
    place_C2 = xy_C2.floor().long()
    grid = torch.zeros(cell_CH.shape[1], int(place_C2[:, 1].max()) + 1, int(place_C2[:, 0].max()) + 1, dtype=cell_CH.dtype)
    grid[:, place_C2[:, 1], place_C2[:, 0]] = cell_CH.T
    kernel = kernel_PH.T.reshape(-1, 1, 7, 7)
    return conv2d(grid[None], kernel, padding=3, groups=len(grid))[0][:, place_C2[:, 1], place_C2[:, 0]].T


def _sorted_cells(tiles):
    xy_N2 = bag(tiles).xy_N2
    return xy_N2[(xy_N2[:, 1] * 1000 + xy_N2[:, 0]).argsort()]


def test_convolution_of_cells_is_that_of_a_grid_with_zeros():
    draw = torch.Generator().manual_seed(0)
    xy_C2 = _sorted_cells(40)
    cell_CH, kernel_PH = (torch.randn(rows, 5, dtype=torch.float64, generator=draw) for rows in (40, 49))
    place = cells(xy_C2, torch.zeros(len(xy_C2), dtype=torch.long), 3)
    assert place.cell_N.tolist() == list(range(40))
    close(SparseConvolution.apply(cell_CH, kernel_PH, place.neighbour_PC), _dense(cell_CH, kernel_PH, xy_C2))


def test_gradients_of_the_convolution():
    draw = torch.Generator().manual_seed(0)
    place = cells(_sorted_cells(12), torch.zeros(12, dtype=torch.long), 3)
    inputs = [torch.randn(rows, 2, dtype=torch.float64, generator=draw).requires_grad_() for rows in (12, 49)]
    assert torch.autograd.gradcheck(lambda cell, kernel: SparseConvolution.apply(cell, kernel, place.neighbour_PC), inputs)


def test_cells_of_another_bag_are_no_neighbours():
    xy_N2 = torch.tensor([[2.0, 2.0], [3.0, 2.0], [3.0, 2.0], [2.0, 5.0]])
    place = cells(xy_N2, torch.tensor([0, 0, 1, 2]), 3)
    assert place.cell_N.tolist() == [0, 1, 2, 3]
    assert (place.neighbour_PC < 4).sum(dim=0).tolist() == [2, 2, 1, 1]


def test_cells_far_apart_cost_nothing():
    xy_N2 = torch.tensor([[0.0, 0.0], [1e6, 1e6], [1.0, 0.0], [1e6, 0.0]])
    place = cells(xy_N2, torch.zeros(len(xy_N2), dtype=torch.long), 3)
    assert len(place.count_C) == 4
    neighbours = (place.neighbour_PC < 4).sum(dim=0)
    assert neighbours[place.cell_N].tolist() == [2, 1, 2, 1]  # itself, and what lies beside it


def test_corners_that_were_rounded_stay_in_their_cell():
    side = 224 / 0.9987  # level-0 px
    corner_px = torch.tensor([[round(column * side), round(row * side)] for row in range(30) for column in range(30)])
    assert len(cells(corner_px / side, torch.zeros(900, dtype=torch.long), 3).count_C) == 900


def test_tiles_of_one_cell_are_averaged():
    xy_N2 = torch.tensor([[0.0, 0.0], [0.5, 0.0], [3.0, 0.0]])
    place = cells(xy_N2, torch.zeros(len(xy_N2), dtype=torch.long), 3)
    close(cell_means(torch.tensor([[1.0], [3.0], [5.0]]), place), torch.tensor([[2.0], [5.0]]))


def test_lots_look_random_and_are_functions_of_the_place():
    column, row = torch.meshgrid(torch.arange(200.0), torch.arange(200.0), indexing="ij")
    xy_N2 = torch.stack([column.flatten(), row.flatten()], dim=1)
    lots = lot(xy_N2)
    assert len(lots.unique()) == len(xy_N2)
    assert lots.min() >= 0
    assert torch.equal(lot(xy_N2.flip(0)), lots.flip(0))
    for parts in (2, 4, 7):
        shares = (lots % parts).bincount().double() / len(lots)
        assert (shares - 1 / parts).abs().max() < 0.01
    # Neighbours are in the same part no more often than by chance.
    part = (lots % 4).view(200, 200)
    assert abs(float((part[1:] == part[:-1]).double().mean()) - 0.25) < 0.01
