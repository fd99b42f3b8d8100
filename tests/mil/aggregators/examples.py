"""Networks and bags of random tiles that the tests of aggregators share."""

from typing import NamedTuple

import torch

from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled
from pathfm.mil.aggregators.registry import AGGREGATORS
from pathfm.mil.network import NetworkSpec, build_network

DIM, OUTPUTS = 6, 3
OWN = f"{__name__}:OwnMean"
FUNCTION = f"python:{__name__}:own_vector"
NAMES = (*AGGREGATORS, OWN, FUNCTION)
"""All of the registry, a user's own class, and a user's own slide encoder."""
ATTENTION = {
    "abmil": 1, "abmil-plain": 1, "clam-sb": 1, "dtfd": 1, "clam-mb": OUTPUTS, "class-queries": OUTPUTS, "dsmil": OUTPUTS,
}  # fmt: skip
"""Maps of the aggregators that have any."""


class Bag(NamedTuple):
    tile_NH: torch.Tensor
    xy_N2: torch.Tensor


class OwnMean(Aggregator):
    """What a user might write: features as they are, one option, one argument of the settings."""

    projected = False

    def __init__(self, width, outputs, heads, power=1.0):
        super().__init__()
        self.power = power / heads
        self.head = torch.nn.Linear(width, outputs)

    def forward(self, packed):
        slide_BH = torch.stack([part.mean(0) * self.power for part in packed.tile_NH.split(list(packed.lengths))])
        return Pooled(self.head(slide_BH), slide_BH)


def own_vector(features_ND, coords_N2, tile_side_level0):
    """A slide encoder that uses features, places and the side of a tile."""
    return (features_ND * (coords_N2[:, :1] / tile_side_level0 + 1)).mean(axis=0)


def network(name, dim=DIM, outputs=OUTPUTS, dropout=0.0, seed=0, **changes):
    shape = {"hidden": 16, "attention": 8, **changes}
    built = build_network(NetworkSpec(dim, outputs, name, dropout=dropout, **shape))
    draw = torch.Generator().manual_seed(seed)
    built.draw_weights(draw)
    for parameter in built.parameters():  # biases too, so that none is left out of a test
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return built.eval()


def bag(tiles, seed=1, dim=DIM, columns=9):
    """Tiles at different places of a grid with holes, in random order."""
    draw = torch.Generator().manual_seed(seed)
    place = torch.randperm(2 * tiles, generator=draw)[:tiles]
    return Bag(torch.randn(tiles, dim, generator=draw), torch.stack([place % columns, place // columns], dim=1).float() + 0.25)


def pack(*bags, **more):
    tiles, places = zip(*bags, strict=True)
    return Packed(torch.cat(tiles), tuple(len(tile_LH) for tile_LH in tiles), torch.cat(places), **more)


def close(one, two, atol=1e-5):
    torch.testing.assert_close(one, two, atol=atol, rtol=1e-5)
