"""Matrix products over tiles, in few shapes whatever the lengths of the bags.

For a product in bfloat16 on a CPU, oneDNN builds a kernel for every number of rows that it meets, and keeps it for good: about
a megabyte and two milliseconds each. There, products are made in blocks of a few sizes, of which the last is filled up with
zeros. In single precision and on other devices they are made in one piece.

A thread may have helpers that make some of its blocks. Blocks are the same and are added up in the same order without them.

Legend: N tiles, K length of a tile's vector, J outputs, Q queries.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK_ROWS = (1024, 256, 64)
"""Rows of a block: the largest of which three quarters are there, so that blocks are few and little is filled up."""

WORTH_HELP = 2**26
"""Products of two numbers in a block (about half a millisecond) from which handing it to another thread pays."""
_own = threading.local()
Made = TypeVar("Made")


@contextmanager
def helpers(count: int) -> Iterator[None]:
    """So many more threads, of one core each, make blocks for this one; changes no result."""
    if not count:
        yield
        return
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as crew:
        _own.crew, _own.count = crew, count
        try:
            yield
        finally:
            del _own.crew, _own.count


class TileLinear(nn.Linear):
    """A linear layer over tiles."""

    def forward(self, x_NK: Tensor) -> Tensor:
        """[N, J], see ``linear``."""
        return linear(x_NK, self.weight, self.bias)


def linear(x_NK: Tensor, weight_JK: Tensor, bias_J: Tensor | None = None) -> Tensor:
    """x weight^T + bias [N, J], in the precision of autocast; gradients are added up in float32."""
    if not _wants_blocks(x_NK):
        return functional.linear(x_NK, weight_JK, bias_J)
    y_NJ: Tensor = _Linear.apply(x_NK, weight_JK, bias_J)
    return y_NJ


def weighted_sums(weight_NQ: Tensor, x_NK: Tensor) -> Tensor:
    """weight^T x [Q, K], in the precision of autocast; in blocks, these are added up in float32, which the result then is."""
    if not _wants_blocks(x_NK):
        return weight_NQ.T @ x_NK
    sum_QK: Tensor = _WeightedSums.apply(weight_NQ, x_NK)
    return sum_QK


def rows_product(x_NK: Tensor, weight_KJ: Tensor, bias_J: Tensor | None = None, out_NJ: Tensor | None = None) -> Tensor:
    """x weight + bias [N, J], all of one precision; not for autograd."""
    made_NJ = x_NK.new_empty(len(x_NK), weight_KJ.shape[1]) if out_NJ is None else out_NJ

    def make(start: int, rows: int) -> None:
        part_NJ = made_NJ[start : start + rows]
        if len(part_NJ) == rows:
            block_product(x_NK[start : start + rows], weight_KJ, bias_J, part_NJ)
        else:
            part_NJ.copy_(block_product(_filled(x_NK[start:], rows), weight_KJ, bias_J)[: len(part_NJ)])

    for _ in _in_turn(make, _blocks(x_NK), weight_KJ.numel()):
        pass
    return made_NJ


def summed_product(a_NJ: Tensor, b_NK: Tensor) -> Tensor:
    """a^T b [J, K] of two of one precision, float32; not for autograd."""
    sum_JK = torch.zeros(a_NJ.shape[1], b_NK.shape[1], device=a_NJ.device)

    def make(start: int, rows: int) -> Tensor:
        a_MJ, b_MK = (_filled(value[start : start + rows], rows) for value in (a_NJ, b_NK))
        return block_product(a_MJ.T, b_MK)

    for part_JK in _in_turn(make, _blocks(a_NJ), sum_JK.numel()):
        sum_JK += part_JK
    return sum_JK


def block_product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The one place where matrices meet: a b + bias."""
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _wants_blocks(x: Tensor) -> bool:
    is_half = torch.is_autocast_enabled("cpu") or x.dtype is torch.bfloat16
    return x.device.type == "cpu" and is_half


def _blocks(x_NK: Tensor) -> Iterator[tuple[int, int]]:
    """Start and rows of each block; the last may end after N."""
    start, count = 0, len(x_NK)
    if x_NK.device.type != "cpu" or x_NK.dtype is not torch.bfloat16:
        yield 0, count
        return
    for rows in BLOCK_ROWS:
        while 4 * (count - start) >= 3 * rows:
            yield start, rows
            start += rows
    if start < count:
        yield start, BLOCK_ROWS[-1]


def _in_turn(make: Callable[[int, int], Made], blocks: Iterable[tuple[int, int]], width: int) -> Iterator[Made]:
    """What is made of each block, in order; helpers make those that cost more than handing them over."""
    count, blocks = getattr(_own, "count", 0), iter(blocks)
    is_inference = torch.is_inference_mode_enabled()

    def elsewhere(start: int, rows: int) -> Made:
        with torch.inference_mode(is_inference), torch.no_grad():  # a thread has modes of its own
            return make(start, rows)

    for start, rows in blocks:
        more = list(islice(blocks, count)) if rows * width >= WORTH_HELP else []
        others = [_own.crew.submit(elsewhere, *block) for block in more]
        yield make(start, rows)
        yield from (other.result() for other in others)


def _filled(x_MK: Tensor, rows: int) -> Tensor:
    """With rows of zeros at the end, so that there are so many."""
    if len(x_MK) == rows:
        return x_MK
    filled = x_MK.new_zeros(rows, x_MK.shape[1])
    filled[: len(x_MK)] = x_MK
    return filled


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_JK: Tensor, bias_J: Tensor | None) -> Tensor:  # noqa: ANN401
        half_NK, half_JK = x_NK.bfloat16(), weight_JK.bfloat16()
        ctx.save_for_backward(half_NK, half_JK)
        ctx.dtype = x_NK.dtype
        return rows_product(half_NK, half_JK.T, None if bias_J is None else bias_J.bfloat16())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (x_NK, weight_JK), y_NJ = ctx.saved_tensors, gradients[0].bfloat16()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            rows_product(y_NJ, weight_JK).to(ctx.dtype) if needs_x else None,
            summed_product(y_NJ, x_NK) if needs_weight else None,
            y_NJ.sum(0).float() if needs_bias else None,
        )


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_NQ: Tensor, x_NK: Tensor) -> Tensor:  # noqa: ANN401
        half_NQ, half_NK = weight_NQ.bfloat16(), x_NK.bfloat16()
        ctx.save_for_backward(half_NQ, half_NK)
        ctx.dtypes = weight_NQ.dtype, x_NK.dtype
        return summed_product(half_NQ, half_NK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (weight_NQ, x_NK), sum_QK = ctx.saved_tensors, gradients[0].bfloat16()
        needs_weight, needs_x = ctx.needs_input_grad
        return (
            rows_product(x_NK, sum_QK.T).to(ctx.dtypes[0]) if needs_weight else None,
            rows_product(weight_NQ, sum_QK).to(ctx.dtypes[1]) if needs_x else None,
        )
