"""Values that change with the step. Each is a pure function of the step, so a resumed run needs no memory of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from pathfm.geometry import scale_length
from pathfm.pretrain_settings import PretrainSettings

REFERENCE_BATCH = 1024


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


@dataclass(frozen=True)
class WarmupStableDecay:
    """A linear warm-up from 0, a constant, and a straight line to ``final`` over the last ``decay`` steps (WSD)."""

    base: float
    final: float
    total: int
    warmup: int
    decay: int

    def __call__(self, step: int) -> float:
        """The value at a step, counted from 0."""
        if step < self.warmup:
            return linear(step, 0.0, self.base, self.warmup)
        decaying = step - (self.total - self.decay)
        return self.base if decaying < 0 else linear(decaying, self.base, self.final, self.decay)


def linear(step: int, start: float, end: float, steps: int) -> float:
    """A straight line from ``start`` at step 0 to ``end`` at the last of ``steps`` steps, and ``end`` after that."""
    if step >= steps - 1:
        return end
    return start + (end - start) * step / (steps - 1)


class StepValues(NamedTuple):
    """Everything that changes with the step."""

    step: int
    lr: float
    last_layer_lr: float
    weight_decay: float
    ema: float
    teacher_temperature: float
    local_weight: float
    gram_weight: float


class Schedules:
    """Values per step from the settings; a pure function of the step (and of the factor that a roll-back puts on the rate)."""

    def __init__(self, settings: PretrainSettings, lr_factor: float = 1.0) -> None:
        peak, low = lr_factor * settings.lr * math.sqrt(settings.batch_size / REFERENCE_BATCH), settings.lr_min
        decay = scale_length(settings.steps, settings.decay_share)
        self._settings = settings
        self._lr = (
            Cosine(peak, low, settings.steps, warmup=settings.warmup_steps)
            if settings.schedule == "cosine"
            else WarmupStableDecay(peak, low, settings.steps, settings.warmup_steps, decay)
        )
        self._weight_decay = Cosine(*settings.weight_decay, settings.steps)
        self._ema = Cosine(*settings.ema, settings.steps)
        self._gram_start = phase_start(settings.gram.start, settings.steps)
        self._high_resolution_start = phase_start(settings.high_resolution.start, settings.steps)

    def __call__(self, step: int) -> StepValues:
        """The values at a step, counted from 0."""
        settings, anchored = self._settings, step >= self._gram_start
        lr = self._lr(step) * (settings.high_resolution.lr_factor if step >= self._high_resolution_start else 1.0)
        return StepValues(
            step=step,
            lr=lr,
            last_layer_lr=0.0 if step < settings.freeze_last_layer_steps else lr,
            weight_decay=self._weight_decay(step),
            ema=self._ema(step),
            teacher_temperature=linear(step, *settings.teacher_temperature, settings.teacher_warmup_steps),
            local_weight=settings.gram.local_weight if anchored else 1.0,
            gram_weight=settings.gram.weight if anchored else 0.0,
        )

    def refreshes_anchor(self, step: int) -> bool:
        """Whether the Gram anchor becomes the present teacher before this step."""
        since, gram = step - self._gram_start, self._settings.gram
        return since >= 0 and since % gram.refresh_steps == 0 and since // gram.refresh_steps <= gram.max_refreshes


def phase_start(share: float, steps: int) -> int:
    """First step of a phase that begins after a share of the steps; a share of 1 is never reached."""
    return scale_length(steps, share) if share < 1 else steps + 1
