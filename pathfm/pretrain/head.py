"""The projection head of DINO (Caron et al. 2021) as DINOv2 codes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathfm.pretrain_settings import PretrainSettings


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows have direction ``weight_v`` and length ``weight_g`` (Salimans & Kingma 2016)."""

    def __init__(self, inputs: int, outputs: int, *, train_length: bool = True) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach().clone())
        self.weight_g = nn.Parameter(torch.ones(outputs, 1), requires_grad=train_length)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return functional.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DinoHead(nn.Module):
    """Three linear layers with GELU, a bottleneck of unit length, then prototypes: of unit length, or a plain linear layer.

    Parameter names are those of the public DINOv2 code, so that its heads load.
    """

    def __init__(self, inputs: int, settings: PretrainSettings) -> None:
        super().__init__()
        hidden, bottleneck = settings.head_hidden, settings.head_bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer: nn.Module
        if settings.prototype_norm == "none":
            self.last_layer = nn.Linear(bottleneck, settings.prototypes, bias=False)
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)
        else:
            self.last_layer = WeightNormLinear(
                bottleneck, settings.prototypes, train_length=settings.prototype_norm == "trained"
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> logits [N, prototypes]."""
        return self.last_layer(functional.normalize(self.mlp(x), dim=-1, eps=1e-12))  # type: ignore[no-any-return]
