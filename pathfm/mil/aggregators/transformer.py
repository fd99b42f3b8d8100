"""Transformers for long bags: a plain one, and a Perceiver whose latents read the tiles.

Legend: T tokens of one bag, S tokens that are attended to, L tiles of one bag, B bags, H width, Z latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pathfm.errors import UsageError
from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled
from pathfm.mil.aggregators.positions import lot
from pathfm.mil.aggregators.segments import by_bag


class Attention(nn.Module):
    """Multi-head attention of tokens to others, without the matrix of all pairs."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UsageError(f"mil.hidden ({width}) must be a multiple of mil.heads ({heads})", where="mil.heads")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, token_TH: Tensor, source_SH: Tensor) -> Tensor:
        """What tokens [T, H] gather from sources [S, H]."""
        parts = (self.query(token_TH), *self.key_value(source_SH).chunk(2, dim=1))
        query, key, value = (part.unflatten(1, (self.heads, -1)).transpose(0, 1).unsqueeze(0) for part in parts)
        gathered = scaled_dot_product_attention(query, key, value)
        merged_TH: Tensor = self.merge(gathered.squeeze(0).transpose(0, 1).flatten(1))
        return merged_TH


class Layer(nn.Module):
    """Attention and a two-layer network, each behind a layer norm and added to what came in (Vaswani 2017, pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, token_TH: Tensor, key_S: Tensor | None = None) -> Tensor:
        """Tokens -> tokens. The first token attends to all; the others to those at ``key_S``, if given, else to all."""
        norm_TH = self.norm(token_TH)
        if key_S is None:
            gathered_TH = self.attention(norm_TH, norm_TH)
        else:
            first_1H = self.attention(norm_TH[:1], norm_TH)
            gathered_TH = torch.cat([first_1H, self.attention(norm_TH[1:], norm_TH[key_S])])
        token_TH = token_TH + gathered_TH
        mixed_TH: Tensor = self.mix(token_TH)
        return token_TH + mixed_TH


class Transformer(Aggregator):
    """Self-attention among the tiles and a class token, which is what the head sees. No positions are encoded.

    In a bag of more than ``max_keys`` tiles, tiles attend to so many of them only, drawn by their place (never by their order):
    the mean over a sample instead of all, at a cost that grows with N and not with its square. The class token attends to
    every tile.
    """

    uses_positions = True
    duplicates = "change"

    def __init__(self, width: int, outputs: int, heads: int = 1, layers: int = 2, max_keys: int = 2048) -> None:
        super().__init__()
        if layers < 1 or max_keys < 1:
            raise UsageError("layers and max_keys must be 1 or more", where="mil.options")
        self.max_keys = max_keys
        self.token_1H = nn.Parameter(torch.zeros(1, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        bags = zip(by_bag(packed.tile_NH, packed.lengths), by_bag(packed.xy_N2, packed.lengths), strict=True)
        slide_BH = self.norm(torch.stack([self._read(tile_LH, xy_L2) for tile_LH, xy_L2 in bags]))
        return Pooled(self.head(slide_BH), slide_BH)

    def _read(self, tile_LH: Tensor, xy_L2: Tensor) -> Tensor:
        """The class token [H] of one bag."""
        key_S = self._keys(xy_L2)
        token_TH = torch.cat([self.token_1H.to(tile_LH.dtype), tile_LH])
        for layer in self.layers:
            token_TH = layer(token_TH, key_S)
        return token_TH[0]

    def _keys(self, xy_L2: Tensor) -> Tensor | None:
        """Numbers of the tokens that tiles attend to: those with the lowest lots, and all that share the last place."""
        if len(xy_L2) <= self.max_keys:
            return None
        lot_L = lot(xy_L2)
        chosen_S = (lot_L <= lot_L.kthvalue(self.max_keys).values).nonzero().squeeze(1)
        return torch.cat([chosen_S.new_zeros(1), chosen_S + 1])


class Perceiver(Aggregator):
    """Latents that read all tiles and then each other, layer after layer (Jaegle et al. 2021, arXiv 2103.03206).

    The cost grows with N. The head sees the mean of the latents.
    """

    def __init__(self, width: int, outputs: int, heads: int = 1, layers: int = 2, latents: int = 16) -> None:
        super().__init__()
        if layers < 1 or latents < 1:
            raise UsageError("layers and latents must be 1 or more", where="mil.options")
        self.latent_ZH = nn.Parameter(torch.zeros(latents, width))
        self.norm_tiles = nn.LayerNorm(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.readers = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        tiles = by_bag(self.norm_tiles(packed.tile_NH), packed.lengths)
        slide_BH = self.norm(torch.stack([self._read(tile_LH) for tile_LH in tiles]))
        return Pooled(self.head(slide_BH), slide_BH)

    def _read(self, tile_LH: Tensor) -> Tensor:
        """The mean [H] of the latents of one bag."""
        latent_ZH: Tensor = self.latent_ZH
        for norm, reader, layer in zip(self.norms, self.readers, self.layers, strict=True):
            latent_ZH = layer(latent_ZH + reader(norm(latent_ZH), tile_LH))
        return latent_ZH.mean(dim=0)
