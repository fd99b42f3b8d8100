"""The training loop of one process. Every value comes from the step number; what a run must remember is in its checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor

from pathfm.errors import PreemptedError, TrainingError
from pathfm.faults import crash_point
from pathfm.log import get_log, track
from pathfm.models.vit import MaskedViT
from pathfm.pretrain.colour import NEUTRAL, apply_colour
from pathfm.pretrain.data import Batch, TileBatches, load_batches, next_batch
from pathfm.pretrain.diagnostics import relative_distance
from pathfm.pretrain.health import Alarm, Watch, record_alarm
from pathfm.pretrain.job import Job, whole
from pathfm.pretrain.method import Inputs, Objective
from pathfm.pretrain.metrics import FLUSH_EVERY, MetricsLog, Row
from pathfm.pretrain.optim import build_optimizer, clip_gradients, set_values, submodules
from pathfm.pretrain.processes import process_count, sum_over_processes
from pathfm.pretrain.schedule import Schedules, StepValues
from pathfm.pretrain.snapshot import Snapshot
from pathfm.pretrain.state import Checkpoint, load_checkpoint, newest_checkpoint, prune, save_checkpoint

ROLLBACK_LR_FACTOR = 0.5
CERTAIN_AFTER = 50
"""Steps for which a fault may have been there before the alarm."""
SHOWN_TILES = 4


class Unhealthy(Exception):
    """An alarm on its way to where it is decided what to do."""

    def __init__(self, alarm: Alarm, said: str) -> None:
        super().__init__(said)
        self.alarm, self.said = alarm, said


class Training:
    """A run from its newest checkpoint (or from the start) to its last step.

    Args:
        fabric: this process's place among those that train.
        job: what is to be done.
        objective: networks and losses, on the CPU, not yet spread over processes.
        batches: what this process trains on.
        export_best: what happens to a teacher that is the best so far by the probe, and its step.
    """

    def __init__(
        self,
        fabric: Fabric,
        job: Job,
        objective: Objective,
        batches: TileBatches,
        export_best: Callable[[MaskedViT, int], None],
    ) -> None:
        settings = job.settings
        self._fabric, self._job, self._settings, self.objective = fabric, job, settings, objective
        self._model = fabric.setup_module(objective)
        self._optimizer = build_optimizer(objective.student, len(objective.student.backbone.blocks), settings)
        self._stepped = cast("_FabricOptimizer", fabric.setup_optimizers(self._optimizer))
        self._batches, self._export_best = batches, export_best
        self._snapshot = Snapshot(job.folder, settings, job.fixed_tiles(), job.probe) if fabric.is_global_zero else None
        self._norms = [f"grad_norm_{name}" for name in submodules(objective.student)]
        self._stop = ""
        self._start(newest_checkpoint(job.checkpoints, job.fingerprint))

    def _start(self, checkpoint: Checkpoint | None) -> None:
        """Takes up the state of a checkpoint, or that of the beginning."""
        notes: dict[str, Any] = checkpoint.notes if checkpoint else {}
        self.step = checkpoint.step if checkpoint else 0
        if checkpoint:
            load_checkpoint(checkpoint, self.objective, self._optimizer)
        self._best: dict[str, float] | None = notes.get("best")
        self._lr_factor = float(notes.get("lr_factor", 1.0))
        self._schedules = Schedules(self._settings, self._lr_factor)
        self._watch = Watch(self._settings)
        if "watch" in notes:
            self._watch.load_state_dict(notes["watch"])
        if self._snapshot:
            self._snapshot.trim(self.step)
        self._log: MetricsLog | None = None

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            TrainingError: training is not healthy, and the settings do not let it go on.
            PreemptedError: SIGTERM or SIGUSR1 came; everything is saved.
        """
        with self._noticing_signals():
            while self.step < self._settings.steps:
                try:
                    self._advance()
                except Unhealthy as sick:
                    self._decide(sick)

    def _advance(self) -> None:
        """Steps until the end or an alarm."""
        job, settings, parts = self._job, self._settings, self._settings.accumulate
        first = self._fabric.is_global_zero
        names = [*self.objective.terms, *self._norms, "ema_distance", "replaced_tiles"]
        self._log = MetricsLog(
            job.folder if first else None, names, StepValues._fields[1:], images_per_step=settings.batch_size, start=self.step
        )
        numbers = range(self.step * parts, settings.steps * parts)
        loader = load_batches(self._batches, numbers, job.workers, pin=self._fabric.device.type == "cuda")
        batches: Iterator[Batch] = iter(track(loader, "pretrain", len(numbers)) if first else loader)
        with closing(self._log):
            if self.step == 0:
                self._look()
            while self.step < settings.steps:
                self._train(batches)
                self.step += 1
                crash_point("pretrain.step")
                self._after_step()

    def _train(self, batches: Iterator[Batch]) -> None:
        assert self._log is not None
        settings, parts = self._settings, self._settings.accumulate
        values = self._schedules(self.step)
        set_values(self._optimizer, values)
        if self._schedules.refreshes_anchor(self.step):
            self.objective.refresh_anchor()
        told: list[Tensor] = []
        waited_s, replaced = 0.0, 0
        for part in range(parts):
            asked = time.monotonic()
            batch = next_batch(batches)
            waited_s += time.monotonic() - asked
            replaced += batch.replaced
            # Stochastic depth is all that draws from this; it repeats after a resume.
            place = part * self._fabric.world_size + self._fabric.global_rank
            torch.manual_seed(((settings.seed * 1_000_003 + self.step) * 8_191 + place) % 2**63)
            inputs = prepare(self._fabric.to_device(batch), values)
            with self._fabric.no_backward_sync(self._model, enabled=part < parts - 1):
                with torch.autocast(self._fabric.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    terms = self._model(inputs, values)
                self._fabric.backward(terms["loss"] / parts)
            told.append(torch.stack([term.detach().float() for term in terms.values()]))
        norms = clip_gradients(self.objective.student, settings.clip_norm)
        self._stepped.step()
        self._stepped.zero_grad(set_to_none=True)
        self.objective.end_step(values.ema)
        means = sum_over_processes(torch.stack(told).mean(dim=0)) / process_count()
        damaged = sum_over_processes(means.new_tensor([float(replaced)]))
        numbers = torch.cat([means, torch.stack(norms).float(), self._ema_distance(), damaged])
        self._examine(self._log.add(self.step, numbers, values[1:], waited_s))

    def _ema_distance(self) -> Tensor:
        """How far the teacher is from the student; measured now and then, since it reads every weight."""
        objective = self.objective
        if (self.step + 1) % FLUSH_EVERY:
            return torch.full((1,), math.nan, device=self._fabric.device)
        return relative_distance(objective.teacher.parameters(), objective.student.parameters()).view(1)

    def _after_step(self) -> None:
        assert self._log is not None
        settings = self._settings
        last = self.step == settings.steps
        checkpoint_due = last or self.step % settings.checkpoint_every == 0
        look_due = last or self.step % settings.health.snapshot_steps == 0
        if checkpoint_due or look_due:
            self._examine(self._log.flush())
        better = look_due and self._look()
        stopping = self._asked_to_stop(checkpoint_due or self.step % FLUSH_EVERY == 0)
        if checkpoint_due or better or stopping:
            self._save()
        if stopping and not last:
            raise PreemptedError(
                f"stopped by {self._stop or 'another process'} at step {self.step} of {settings.steps}; everything is saved",
                where="pretrain",
                fix="run the same command again to go on",
            )

    def _examine(self, rows: list[Row]) -> None:
        """Looks for faults in what has been measured."""
        self._heed(self._watch.see(rows))

    def _heed(self, alarm: Alarm | None) -> None:
        """Writes an alarm down; unless the settings want to be warned only, it ends the steps."""
        if alarm is None:
            return
        what = alarm.what
        if alarm.fault == "not finite":
            tiles = ", ".join(f"{slide_id} {tile}" for slide_id, tile in self._batches.sources(alarm.step)[:SHOWN_TILES])
            what += f"; its batch begins with tiles {tiles}"
        if self._fabric.is_global_zero:
            record_alarm(self._job.folder, alarm, what)
        said = f"{alarm.fault} at step {alarm.step}: {what}"
        if self._settings.health.on_alarm != "warn" or alarm.fault == "not finite":
            raise Unhealthy(alarm, said)
        get_log(__name__).warning("pretrain: %s (%s)", said, alarm.fix)

    def _look(self) -> bool:
        """Looks at the teacher; true when it is the best so far by the probe."""
        teacher = whole(self.objective.teacher.backbone, self._settings)
        told: list[dict[str, float]] = [{}]
        if self._snapshot:
            told[0] = self._snapshot.take(teacher, self.step)
        found = self._fabric.broadcast(told, src=0)[0]
        if self._log and self._snapshot:
            self._log.show(self.step, found, self._snapshot.picture(self.step))
        self._heed(self._watch.look(self.step, found))
        score = found.get("probe_linear")
        if score is None or (self._best and score <= self._best["score"]):
            return False
        self._best = {"step": self.step, "score": score}
        if self._fabric.is_global_zero:
            self._export_best(teacher, self.step)
        return self.step > 0

    def _save(self) -> None:
        assert self._log is not None
        job = self._job
        self._examine(self._log.sync())
        notes = {"watch": self._watch.state_dict(), "lr_factor": self._lr_factor, "best": self._best}
        save_checkpoint(job.checkpoints, job.fingerprint, self.step, (self.objective, self._optimizer), notes)
        prune(job.checkpoints, self._settings.keep_checkpoints, int(self._best["step"]) if self._best else None)

    def _decide(self, sick: Unhealthy) -> None:
        """Stop, or go back."""
        job, alarm = self._job, sick.alarm
        # A fault is certain only some steps after it began.
        suspect = (alarm.step + 1 - CERTAIN_AFTER, alarm.step + 1)
        found = [newest_checkpoint(job.checkpoints, job.fingerprint, before=step) for step in suspect]
        healthy = found[0] or found[1]
        if self._settings.health.on_alarm != "rollback" or self._lr_factor < 1 or healthy is None:
            raise TrainingError(sick.said, where="pretrain", fix=alarm.fix)
        get_log(__name__).warning("pretrain: %s; going on from step %d with half the learning rate", sick.said, healthy.step)
        best = healthy.notes.get("best") or {}
        prune(job.checkpoints, self._settings.keep_checkpoints, best.get("step"), newest=healthy.step)
        self._start(healthy)
        self._lr_factor = ROLLBACK_LR_FACTOR
        self._schedules = Schedules(self._settings, self._lr_factor)

    def _asked_to_stop(self, all_can_be_asked: bool) -> bool:
        """Whether a signal has come to any process. Several processes ask each other only now and then."""
        if process_count() == 1:
            return bool(self._stop)
        if not all_can_be_asked:
            return False
        mine = torch.tensor(float(bool(self._stop)), device=self._fabric.device)
        return bool(sum_over_processes(mine) > 0)

    @contextmanager
    def _noticing_signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 are noted and acted upon after the step; more of them, also while saving, change nothing."""

        def note(number: int, _: object) -> None:
            self._stop = signal.Signals(number).name

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def prepare(batch: Batch, values: StepValues) -> Inputs:
    """Colours are applied here: on the device, before autocast could round them."""
    plain = batch.global_colour.new_tensor(NEUTRAL)
    return Inputs(
        apply_colour(batch.global_crops, batch.global_colour),
        apply_colour(batch.local_crops, batch.local_colour),
        batch.masks_CP,
        batch.masked_M,
        batch.weight_M,
        apply_colour(batch.global_crops, plain.expand_as(batch.global_colour)) if values.gram_weight else None,
    )
