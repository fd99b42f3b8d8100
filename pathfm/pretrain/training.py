"""The training loop: Lightning turns the crank, every value comes from the step number."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pathfm.faults import crash_point
from pathfm.log import track
from pathfm.pretrain.colour import apply_colour
from pathfm.pretrain.data import Batch
from pathfm.pretrain.method import DinoV2, Inputs, Terms
from pathfm.pretrain.metrics import MetricsLog
from pathfm.pretrain.optim import Schedules, StepValues, build_optimizer, clip_gradients, set_values, submodules
from pathfm.pretrain.state import Checkpoint, restore_optimizer, save_checkpoint

LIGHTNING_CHATTER = (
    "GPU available but not used",  # the CPU may be chosen on purpose
    r"Found \d+ module\(s\) in eval mode",  # the teacher is
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
)
"""Warnings that say nothing about a run."""


class Training(LightningModule):
    """One pretraining run from a step to its end.

    Args:
        method: networks and losses, with the checkpoint's weights if there is a checkpoint.
        folder: the encoder folder.
        checkpoint_path: where checkpoints go.
        fingerprint: written into them.
        resume: the checkpoint to go on from.
    """

    def __init__(
        self, method: DinoV2, folder: Path, checkpoint_path: Path, fingerprint: str, resume: Checkpoint | None = None
    ) -> None:
        super().__init__()
        self.method = method
        self.next_step = resume.step if resume else 0
        self._checkpoint_path, self._fingerprint, self._resume = checkpoint_path, fingerprint, resume
        self._schedules = Schedules(method.settings)
        self._values: StepValues = self._schedules(self.next_step)
        self._terms: Tensor | None = None
        self._norms: Tensor | None = None
        norms = [f"grad_norm_{name}" for name in submodules(method.student)]
        self._log = MetricsLog(
            folder,
            [*Terms._fields, *norms],
            StepValues._fields[:-1],
            images_per_step=method.settings.batch_size,
            start=self.next_step,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with the checkpoint's moments."""
        optimizer = build_optimizer(self.method.student, self.method.settings)
        if self._resume:
            restore_optimizer(optimizer, self._resume.optimizer)
            self._resume = None
        return optimizer

    def on_train_batch_start(self, batch: Inputs, batch_idx: int) -> None:
        """Sets what depends on the step; the seed too, so that stochastic depth repeats after a resume."""
        self._values = self._schedules(self.next_step)
        set_values(self.optimizers().optimizer, self._values)  # type: ignore[union-attr]
        torch.manual_seed(self.method.settings.seed * 1_000_003 + self.next_step)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Inputs:
        """Colours are applied here: on the device, and before autocast could round them."""
        return Inputs(
            apply_colour(batch.global_crops, batch.global_colour),
            apply_colour(batch.local_crops, batch.local_colour),
            batch.masks_CP,
            batch.masked_M,
            batch.weight_M,
        )

    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        """The loss of a step."""
        terms: Terms = self.method(batch, self._values.teacher_temperature)
        self._terms = torch.stack([term.detach().float() for term in terms])
        return terms.loss

    def configure_gradient_clipping(self, *_: object, **__: object) -> None:
        """Clips per sub-module and keeps the norms."""
        self._norms = torch.stack(clip_gradients(self.method.student, self.method.settings.clip_norm)).float()

    def on_train_batch_end(self, outputs: object, batch: Inputs, batch_idx: int) -> None:
        """Teacher, metrics, checkpoint."""
        assert self._terms is not None and self._norms is not None
        self.method.update_teacher(self._values.ema)
        self._log.add(self.next_step, torch.cat([self._terms, self._norms]), self._values[:-1])
        self.next_step += 1
        crash_point("pretrain.step")
        settings = self.method.settings
        if self.next_step % settings.checkpoint_every == 0 or self.next_step == settings.steps:
            self._log.sync()
            optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
            save_checkpoint(self._checkpoint_path, self._fingerprint, self.next_step, self.method, optimizer)

    def close(self) -> None:
        """Closes the metrics files."""
        self._log.close()


class _Tracked:
    """Batches with a progress line. Not a DataLoader in Lightning's eyes, which leaves it alone."""

    def __init__(self, batches: Iterable[Batch], total: int) -> None:
        self._batches, self._total = batches, total

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Batch]:
        return track(self._batches, "pretrain", self._total)


def fit(training: Training, batches: Iterable[Batch], device: torch.device) -> None:
    """Trains to the last step.

    Raises:
        TrainingError: a loss term or gradient norm is not finite.
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    settings = training.method.settings
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    handler = signal.getsignal(signal.SIGINT)
    steps = settings.steps - training.next_step
    try:
        with warnings.catch_warnings(), _attention_for(device):
            for message in LIGHTNING_CHATTER:
                warnings.filterwarnings("ignore", message)
            _trainer(device, settings.precision, steps).fit(training, _Tracked(batches, steps))
    except SystemExit as error:
        # Lightning ends the process on Ctrl-C; a caller must be able to clean up and to choose the exit code.
        if error.code != 1:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error
    finally:
        training.close()


def _attention_for(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU plain matrix products: as fast as the fused kernel in fp32, and twice as fast a step in bf16."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _trainer(device: torch.device, precision: str, steps: int) -> Trainer:
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=steps,
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
