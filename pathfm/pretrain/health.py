"""The alarm of pretraining: it reads every step's numbers, tells faults from slow starts, and says what to change.

Training looks unhealthy at first: targets are uniform (entropy log K, divergence near 0) until images are told apart, which
takes hundreds of steps in small runs. So each fault is known by something that no healthy run shows at any time:

- **not finite**: a loss, a norm or a statistic of the teacher is NaN or infinite.
- **teacher too soft**: the teacher's temperature is not below the student's, and its targets are uniform: they cannot sharpen.
- **one prototype**: targets are sharp, but the same for all images: their mean is as sharp as each of them.
- **diverging**: the student runs away from its own average, or predicts worse than a uniform guess, or its gradients explode.
- **uniform collapse**: long after the warm-up targets are still uniform, and nothing moves.
- **rank collapse**: the effective rank of the teacher's features falls far below what it was.

Thresholds come from recorded runs, healthy and broken (``docs/pretrain-health.md``). A row shows a fault or does not; a
fault that lasts is an alarm. What is remembered is since which step each has lasted, and the ranks seen.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pathfm.pretrain.metrics import line
from pathfm.pretrain_settings import PretrainSettings
from pathfm.store.commit import commit_file

Row = Mapping[str, float]

HEALTH, ALARMS = "health", "alarms.csv"
ALARM_COLUMNS = ("step", "fault", "what", "fix")

UNMEASURED = ("ema_distance", "step")
"""Columns in which NaN means: not measured at this step."""

UNIFORM = 0.98
"""Targets whose entropy is above this share of log K are uniform."""
SHARP_NATS = 0.5
"""Targets are sharp when their entropy is so far below log K [nat]."""
ALIKE = 0.05
"""Targets are the same for all images when no more than this share of their sharpness is lost by averaging them."""
RUNAWAY, IGNORANT, LOST = 0.4, 0.1, 0.7
"""Relative distance |teacher - student| / |student| at which a student has run away that tells images apart by less than this
share of log K, and at which any has."""
WORSE_THAN_UNIFORM = 1.05
"""Cross-entropy, as a share of log K, above which a student is worse than a uniform guess."""
EXPLODED = 1000.0
"""Gradient norm, as a multiple of ``clip_norm``, that is no longer a large step but an explosion."""
SOFT_STEPS, ALIKE_STEPS, DIVERGING_STEPS, UNIFORM_STEPS = 50, 100, 40, 500
"""Steps that a state must last until it is an alarm, longer than healthy starts show it; the last at least, see below."""
PATIENCE = 0.05
"""Share of all steps for which uniform targets are waited for after the warm-up, if that is longer."""
GROWTH, FLOOR_NATS = 2.0, 1e-4
"""Uniform targets that tell images apart so many times better than before, from this on [nat], are on their way."""
RANK_SHARE, RANKS_KEPT, RANKS_NEEDED = 0.25, 5, 3
"""A fall of RankMe below this share of its plateau: the largest median of so many looks, once there are enough."""


class Alarm(NamedTuple):
    """A fault by name, the step at which it was certain, what was seen, and what to change."""

    fault: str
    step: int
    what: str
    fix: str


def record_alarm(folder: Path, alarm: Alarm, what: str) -> None:
    """Adds an alarm to ``folder/health/alarms.csv``, once; ``what`` may say more than the alarm itself."""
    path = folder / HEALTH / ALARMS
    rows: list[tuple[str, ...]] = [ALARM_COLUMNS]
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [tuple(row) for row in csv.reader(stream)]
    row = (str(alarm.step), alarm.fault, what, alarm.fix)
    if row not in rows:
        with commit_file(path) as temporary:
            temporary.write_text("".join(line(cells) for cells in (*rows, row)), encoding="utf-8")


class _Targets(NamedTuple):
    """What the targets of a step say. ``spread`` is the information of a target about its image, log(perplexity) - entropy."""

    entropy: float
    kl: float
    spread: float
    uniform: bool


class Watch:
    """Sees every row of the metrics and every look at the teacher, in order; equal rows give equal alarms.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: PretrainSettings) -> None:
        self._settings, self._log_k = settings, math.log(settings.prototypes)
        self._since: dict[str, int] = {}
        self._known_spread = 0.0
        self._ranks: list[float] = []
        self._plateau = 0.0

    def see(self, rows: Sequence[Row]) -> Alarm | None:
        """The first alarm that these rows raise, if any. Whoever goes on hears of the same fault after the same time again."""
        alarms = [self._see(row) for row in rows]
        return next((alarm for alarm in alarms if alarm), None)

    def look(self, step: int, found: Row) -> Alarm | None:
        """The alarm that a look at the teacher raises, if any; of ``found``, ``rankme`` and what is not finite count."""
        broken = _not_finite(step, found)
        if broken or "rankme" not in found:
            return broken
        rank, plateau = found["rankme"], self._plateau
        if step >= self._settings.warmup_steps:
            self._ranks = [*self._ranks, rank][-RANKS_KEPT:]
            if len(self._ranks) >= RANKS_NEEDED:
                self._plateau = max(plateau, statistics.median(self._ranks))
        if rank >= RANK_SHARE * plateau:
            return None
        return Alarm(
            "rank collapse",
            step,
            f"the teacher's features fill {rank:.1f} directions, and were at {plateau:.1f} before (RankMe)",
            "raise pretrain.kde_weight or pretrain.koleo_weight, or lower pretrain.lr",
        )

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered for a resume, as plain numbers."""
        return {
            "since": dict(self._since),
            "known_spread": self._known_spread,
            "ranks": list(self._ranks),
            "plateau": self._plateau,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict``."""
        self._since = {str(name): int(step) for name, step in state["since"].items()}
        self._known_spread, self._plateau = float(state["known_spread"]), float(state["plateau"])
        self._ranks = [float(rank) for rank in state["ranks"]]

    def _see(self, row: Row) -> Alarm | None:
        step = int(row["step"])
        alarms = [_not_finite(step, row)]
        if not alarms[0]:
            alarms = [self._exploding(step, row)]
            if "teacher_entropy" in row:  # a distilled student has a teacher without prototypes
                targets = self._targets(row)
                rules = (self._too_soft, self._running_away, self._misled, self._one_prototype, self._uniform)
                alarms += [rule(step, row, targets) for rule in rules]
        return next((alarm for alarm in alarms if alarm), None)

    def _targets(self, row: Row) -> _Targets:
        entropy = row["teacher_entropy"]
        perplexity = max(row["prototype_perplexity"] * self._settings.prototypes, 1.0)
        return _Targets(entropy, row["teacher_kl"], math.log(perplexity) - entropy, entropy >= UNIFORM * self._log_k)

    def _lasts(self, state: str, now: bool, step: int, steps: int) -> bool:
        """Whether a state has lasted so many steps, this one included; then it begins anew."""
        lasts = now and step - self._since.setdefault(state, step) >= steps - 1
        if lasts or not now:
            self._since.pop(state, None)
        return lasts

    def _too_soft(self, step: int, row: Row, targets: _Targets) -> Alarm | None:
        teacher, student = row["teacher_temperature"], self._settings.student_temperature
        if not self._lasts("too soft", targets.uniform and teacher >= student, step, SOFT_STEPS):
            return None
        return Alarm(
            "teacher too soft",
            step,
            f"with temperature {teacher:g} against the student's {student:g} the teacher's targets stay uniform "
            f"(entropy {targets.entropy:.2f}, log K {self._log_k:.2f})",
            "set pretrain.teacher_temperature well below pretrain.student_temperature; 0.04 to 0.07 against 0.1 is usual",
        )

    def _one_prototype(self, step: int, row: Row, targets: _Targets) -> Alarm | None:
        sharpness = self._log_k - targets.entropy
        alike = sharpness > SHARP_NATS and targets.spread < ALIKE * sharpness
        if not self._lasts("alike", alike, step, ALIKE_STEPS):
            return None
        fix = "use pretrain.centering sinkhorn, lower pretrain.lr, or take larger batches"
        if self._settings.centering == "none":
            fix = "pretrain.centering is none, and nothing keeps one prototype from winning: use softmax or sinkhorn"
        return Alarm(
            "one prototype",
            step,
            f"the teacher gives all images the same target (entropy {targets.entropy:.2f}, that of their mean "
            f"{targets.entropy + targets.spread:.2f}, log K {self._log_k:.2f})",
            fix,
        )

    def _running_away(self, step: int, row: Row, targets: _Targets) -> Alarm | None:
        distance = row.get("ema_distance", math.nan)
        if math.isnan(distance):  # not measured at this step
            return None
        away = distance > LOST or (distance > RUNAWAY and targets.spread < IGNORANT * self._log_k)
        if not self._lasts("away", away, step, DIVERGING_STEPS):
            return None
        return _diverging(step, f"the student is {distance:.0%} away from its own average (ema_distance)")

    def _misled(self, step: int, row: Row, targets: _Targets) -> Alarm | None:
        loss = targets.entropy + targets.kl
        if not self._lasts("misled", loss > WORSE_THAN_UNIFORM * self._log_k, step, DIVERGING_STEPS):
            return None
        what = f"the student predicts worse than a uniform guess (cross-entropy {loss:.2f}, log K {self._log_k:.2f})"
        return _diverging(step, what)

    def _exploding(self, step: int, row: Row) -> Alarm | None:
        norms = {name: value for name, value in row.items() if name.startswith("grad_norm_")}
        largest = max(norms, key=lambda name: norms[name], default="")
        exploded = norms.get(largest, 0.0) > EXPLODED * self._settings.clip_norm
        if not self._lasts("exploded", exploded, step, DIVERGING_STEPS):
            return None
        return _diverging(step, f"{largest} is {norms[largest]:.3g}, far above clip_norm {self._settings.clip_norm:g}")

    def _uniform(self, step: int, row: Row, targets: _Targets) -> Alarm | None:
        growing = targets.uniform and targets.spread > GROWTH * max(self._known_spread, FLOOR_NATS)
        if growing or not targets.uniform:
            self._known_spread = targets.spread if growing else 0.0
        stuck = targets.uniform and not growing and step >= self._settings.warmup_steps
        patience = max(UNIFORM_STEPS, int(PATIENCE * self._settings.steps))
        if not self._lasts("uniform", stuck, step, patience):
            return None
        return Alarm(
            "uniform collapse",
            step,
            f"the teacher gives all prototypes the same weight and tells no images apart (entropy {targets.entropy:.2f}, "
            f"log K {self._log_k:.2f}, divergence {targets.kl:.3f}), and that has not changed for {patience} steps",
            "lower pretrain.teacher_temperature, take larger batches or fewer prototypes, or raise pretrain.lr; "
            "in short runs set pretrain.layer_scale to 0",
        )


def _diverging(step: int, what: str) -> Alarm:
    return Alarm("diverging", step, what, "lower pretrain.lr ten times, and warm up longer (pretrain.warmup_steps)")


def _not_finite(step: int, numbers: Row) -> Alarm | None:
    broken = {name: value for name, value in numbers.items() if name not in UNMEASURED and not math.isfinite(value)}
    if not broken:
        return None
    if len(broken) > 1:
        broken.pop("loss", None)  # its terms say more
    return Alarm(
        "not finite",
        step,
        ", ".join(f"{name} is {value}" for name, value in broken.items()),
        "look at the tiles of this batch; or lower pretrain.lr, warm up longer, or use pretrain.precision fp32",
    )
