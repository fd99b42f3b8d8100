"""What processes that train together tell each other about their rows. Without a process group there is one, and it has all.

Shapes: N rows of one process, D features.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _in_group() else 1


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same on each. Carries no gradient."""
    return _reduced(value, dist.ReduceOp.SUM) if _in_group() else value


def max_over_processes(value: Tensor) -> Tensor:
    """The elementwise largest of a tensor over all processes. Carries no gradient."""
    return _reduced(value, dist.ReduceOp.MAX) if _in_group() else value


def gather_rows(rows_ND: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes in the order of the processes, and the number of the first row of this one.

    Every process must hold equally many. Gradients flow back to the process that a row came from, summed over all that used
    it; since processes average their gradients afterwards (DDP, FSDP), the mean of their losses is what is differentiated.
    """
    if not _in_group():
        return rows_ND, 0
    return _GatherRows.apply(rows_ND), dist.get_rank() * len(rows_ND)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows_ND: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_ND, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_ND.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _reduced(gradient, dist.ReduceOp.SUM).chunk(dist.get_world_size())[dist.get_rank()]


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """Reduced out of place: the caller's tensor stays its own."""
    everywhere = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(everywhere, op=operation)
    return everywhere
