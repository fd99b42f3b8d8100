"""Values that change with the step. Each is a pure function of the step, so a resumed run needs no memory of them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cosine:
    """Frozen at 0, then a linear warm-up, then a cosine from ``base`` to ``final``, which it keeps.

    Attributes:
        base: value after the warm-up.
        final: value from step ``total`` on.
        total: steps of the whole schedule.
        warmup: steps of the warm-up; its last one reaches ``base``.
        start: value at the first step of the warm-up.
        freeze: steps at 0 before it.
    """

    base: float
    final: float
    total: int
    warmup: int = 0
    start: float = 0.0
    freeze: int = 0

    def __call__(self, step: int) -> float:
        """The value at a step, counted from 0."""
        if step >= self.total:
            return self.final
        if step < self.freeze:
            return 0.0
        step -= self.freeze
        if step < self.warmup:
            return linear(step, self.start, self.base, self.warmup)
        step -= self.warmup
        length = self.total - self.warmup - self.freeze
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * step / length))


def linear(step: int, start: float, end: float, steps: int) -> float:
    """A straight line from ``start`` at step 0 to ``end`` at the last of ``steps`` steps, and ``end`` after that."""
    if step >= steps - 1:
        return end
    return start + (end - start) * step / (steps - 1)
