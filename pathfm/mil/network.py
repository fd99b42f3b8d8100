"""A whole network: standardise, project, pool, and the heads in one output.

Legend: N tiles of all bags together, B bags, D feature length, H width, O outputs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear

from pathfm.errors import UsageError
from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled, check_lengths, draw_weights
from pathfm.mil.aggregators.registry import SETTINGS, check_options, find_aggregator
from pathfm.mil_settings import Choice, MilSettings


@dataclass(frozen=True)
class NetworkSpec:
    """All that makes the shape of a network; plain values, so that a bundle can hold it.

    Attributes:
        dim: length of a feature.
        outputs: outputs of all tasks.
        aggregator: a name that ``find_aggregator`` knows.
        options: of the aggregator alone.
        hidden: width of the projection.
        attention: width of the attention.
        heads: of the attention.
        dropout: share of the projection's outputs that is dropped in training, taken to 1/256.
    """

    dim: int
    outputs: int
    aggregator: str = "abmil"
    options: Mapping[str, Choice] = field(default_factory=dict)
    hidden: int = 128
    attention: int = 64
    heads: int = 1
    dropout: float = 0.0

    def record(self) -> dict[str, Any]:
        """Plain values from which ``spec_from_record`` makes the same spec."""
        return asdict(self)


def spec_of(settings: MilSettings, dim: int, outputs: int) -> NetworkSpec:
    """The network that settings ask for."""
    return NetworkSpec(
        dim,
        outputs,
        settings.aggregator,
        dict(settings.options),
        settings.hidden,
        settings.attention,
        settings.heads,
        settings.dropout,
    )


def spec_from_record(record: Mapping[str, Any]) -> NetworkSpec:
    """The spec of a record.

    Raises:
        UsageError: the record lacks something, or has what is not known.
    """
    names = {part.name for part in fields(NetworkSpec)}
    if set(record) != names:
        wrong = ", ".join(sorted(set(record) ^ names))
        raise UsageError(f"not the record of a network: {wrong} missing or unknown", fix="use the version that wrote it")
    return NetworkSpec(**record)


class Network(nn.Module):
    """Standardise, project (linear, ReLU, dropout), pool.

    The standardisation (mean and scale of the training tiles) is part of the state, so that it cannot be forgotten or refitted.
    Weights are drawn from ``draw_weights``, all chance in training from ``packed.noise``: no global state is touched or used.

    Raises:
        UsageError: an aggregator or option that is not known.
    """

    mean_D: Tensor
    scale_D: Tensor

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        kind, arguments = find_aggregator(spec.aggregator)
        check_options(spec.aggregator, kind, spec.options, arguments)
        taken = inspect.signature(kind).parameters
        arguments |= {name: getattr(spec, name) for name in SETTINGS if name in taken} | dict(spec.options)
        self.register_buffer("mean_D", torch.zeros(spec.dim))
        self.register_buffer("scale_D", torch.ones(spec.dim))
        with torch.random.fork_rng(devices=[]):  # layers draw weights when they are made, from the global generator
            self.project = nn.Linear(spec.dim, spec.hidden) if kind.projected else None
            width = spec.hidden if kind.projected else spec.dim
            self.aggregator: Aggregator = kind(width=width, outputs=spec.outputs, **arguments)

    def draw_weights(self, generator: torch.Generator) -> None:
        """Fresh weights from a CPU generator, so that every device starts the same."""
        if self.project is not None:
            draw_weights(self.project, generator)
        self.aggregator.draw_weights(generator)

    def forward(self, packed: Packed) -> Pooled:
        """Pools bags of raw features (``packed.tile_NH`` is [N, D]).

        Raises:
            SlideError: a bag has no tiles.
        """
        return self.pool(self.embed(packed.tile_NH), packed)

    def embed(self, feature_ND: Tensor) -> Tensor:
        """The linear part of the projection [N, H]; the features as they are, where the aggregator wants them so."""
        if self.project is None:
            return feature_ND.float()
        return linear(_readable(feature_ND), *self.folded())

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight [H, D] and bias [H] of the projection with the standardisation in them, so that features stay untouched."""
        assert self.project is not None
        weight_HD = self.project.weight / self.scale_D
        # No matrix product: autocast would round it.
        return weight_HD, self.project.bias - (weight_HD * self.mean_D).sum(dim=1)

    def pool(self, embedded_NH: Tensor, packed: Packed) -> Pooled:
        """What ``forward`` makes of what ``embed`` gave; ``packed.tile_NH`` is not looked at.

        Raises:
            SlideError: a bag has no tiles.
        """
        check_lengths(packed.lengths, len(embedded_NH))
        if self.project is not None:
            embedded_NH = self._activate(embedded_NH, packed.noise)
        is_half = self.aggregator.half_precision or embedded_NH.device.type != "cpu"
        with contextlib.nullcontext() if is_half else torch.autocast("cpu", enabled=False):
            pooled: Pooled = self.aggregator(packed._replace(tile_NH=embedded_NH if is_half else embedded_NH.float()))
        return pooled

    def _activate(self, embedded_NH: Tensor, noise: torch.Generator | None) -> Tensor:
        dropped = min(round(256 * self.spec.dropout), 255) if self.training and noise is not None else 0
        if not dropped:
            return embedded_NH.relu()
        active_NH: Tensor = _ReluDropout.apply(embedded_NH, dropped, noise)
        return active_NH


def build_network(spec: NetworkSpec) -> Network:
    """A network whose weights are not yet drawn.

    Raises:
        UsageError: an aggregator or option that is not known.
    """
    return Network(spec)


def _readable(feature_ND: Tensor) -> Tensor:
    """In single precision, unless autocast is about to cast it anyway."""
    return feature_ND if torch.is_autocast_enabled(feature_ND.device.type) else feature_ND.float()


class _ReluDropout(torch.autograd.Function):
    """ReLU and dropout in one, from one random byte per value: on a CPU about a fifth of the cost of torch's dropout."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NH: Tensor, dropped: int, noise: torch.Generator) -> Tensor:
        """Of 256 values ``dropped`` become 0, the others are scaled up."""
        words = torch.empty(-(-x_NH.numel() // 8), dtype=torch.int64, device=x_NH.device)
        words.random_(-(2**63), None, generator=noise)
        byte_NH = words.view(torch.int8)[: x_NH.numel()].view(x_NH.shape)
        ctx.scale = 256 / (256 - dropped)  # type: ignore[attr-defined]
        # Keeps the first where the second is above the threshold; several times quicker than where() or a product with a mask.
        y_NH = torch.ops.aten.threshold_backward(x_NH.relu(), byte_NH.to(x_NH.dtype), dropped - 129)
        y_NH = y_NH.mul_(ctx.scale)  # type: ignore[attr-defined]
        ctx.save_for_backward(y_NH)
        return y_NH  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Where the output is positive, the gradient scaled up."""
        (y_NH,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.ops.aten.threshold_backward(gradients[0], y_NH, 0).mul_(ctx.scale), None, None  # type: ignore[attr-defined]
