"""A training step of DINOv2: ours against the official order of operations, on the same crops, from the same weights.

ViT-S/16, batch 8, 2 x 224 + 8 x 96 px, 65,536 prototypes, a shared head, KoLeo, stochastic depth .3, bf16, one thread. Random
pixels: the time of a step does not depend on them.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import Options, Spent, Table, spent
from benchmarks.official_step import Losses, OfficialStep
from pathfm.pretrain.encoder import build_objective
from pathfm.pretrain.masking import batch_masks
from pathfm.pretrain.method import Inputs, SelfDistillation
from pathfm.pretrain.optim import build_optimizer, clip_gradients, set_values
from pathfm.pretrain.schedule import Schedules, StepValues
from pathfm.pretrain_settings import PretrainSettings

TIMES, STEP = 7, 5
OFFICIAL, OURS = "official order of operations", "ours"


class OurStep:
    """A step as ``pathfm.pretrain.training`` takes it, less data and records."""

    def __init__(self, objective: SelfDistillation) -> None:
        self.objective, self.settings = objective, objective.settings
        self.optimizer = build_optimizer(objective.student, len(objective.student.backbone.blocks), self.settings)

    def step(self, inputs: Inputs, values: StepValues) -> None:
        """Losses, gradients, optimiser, teacher."""
        set_values(self.optimizer, values)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.precision == "bf16"):
            loss = self.objective(inputs, values)["loss"]
        loss.backward()
        clip_gradients(self.objective.student, self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.end_step(values.ema)


def both(centering: str, *, quick: bool, **changes: object) -> tuple[OfficialStep, OurStep, Inputs]:
    """The rivals with equal weights, teacher and student apart, and crops for a step."""
    sizes = {"batch_size": 2, "prototypes": 4096, "backbone": "vit_tiny_patch16_224"} if quick else {"batch_size": 8}
    settings = PretrainSettings.model_validate(
        {"preset": "dinov2", "warmup_steps": STEP, "freeze_last_layer_steps": 0, "centering": centering, **sizes, **changes}
    )
    torch.manual_seed(0)
    objective, _ = build_objective(settings, torch.device("cpu"))
    assert isinstance(objective, SelfDistillation)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return OfficialStep(objective), OurStep(objective), drawn_inputs(settings, objective.student.backbone.grid_side(224))


def drawn_inputs(settings: PretrainSettings, grid_side: int) -> Inputs:
    """Random crops, and masks as training draws them."""
    crops, size = settings.crops, settings.batch_size
    masks_CP = batch_masks(settings, grid_side, range(2 * size), (0, settings.seed, STEP))
    weight_CP = (masks_CP / np.maximum(masks_CP.sum(axis=1, keepdims=True), 1)).astype(np.float32)
    return Inputs(
        torch.randn(2 * size, 3, crops.global_px, crops.global_px),
        torch.randn(crops.local_count * size, 3, crops.local_px, crops.local_px),
        torch.from_numpy(masks_CP),
        torch.from_numpy(np.flatnonzero(masks_CP)),
        torch.from_numpy(weight_CP[masks_CP]),
    )


def run(options: Options) -> list[Table]:
    """Equality in fp32 without stochastic depth, then CPU and wall time in bf16 with it."""
    torch.set_num_threads(1)
    equality = Table("step: largest relative difference without stochastic depth", ("centring", "of", "losses", "gradients"))
    speed = Table(
        "step: CPU of one step, alternated", ("centring", "what", "CPU s", "wall s", "CPU / official", "wall / official")
    )
    for centering in ("softmax", "sinkhorn"):
        equality.rows.extend((centering, *row) for row in _differences(centering, quick=options.quick))
        speed.rows.extend((centering, *row) for row in _times(centering, quick=options.quick))
    return [equality, speed]


def _differences(centering: str, *, quick: bool) -> list[tuple[str | float, ...]]:
    """Of the loss terms, and of the gradients of each parameter (norm of the difference to norm)."""
    official, ours, inputs = both(centering, quick=quick, precision="fp32", drop_path=0.0)
    values = Schedules(official.settings)(STEP)
    exact = copy.deepcopy(ours.objective).double()
    wide = Inputs(*[part.double() if part is not None and part.is_floating_point() else part for part in inputs])
    terms = {
        "official fp32": official.losses(inputs, values.teacher_temperature)._asdict(),
        "ours fp32": ours.objective(inputs, values),
        "ours fp64": exact(wide, values),
    }
    students = dict(zip(terms, (official.student, ours.objective.student, exact.student), strict=True))
    for found in terms.values():
        found["loss"].backward()
    return [
        (f"{one}, {other}", _of_losses(terms[one], terms[other]), _of_gradients(students[one], students[other]))
        for one, other in itertools.combinations(terms, 2)
    ]


def _of_losses(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    names = Losses._fields
    return max(abs(one[name].item() / other[name].item() - 1) for name in names)


def _of_gradients(one: nn.Module, other: nn.Module) -> float:
    pairs = [(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def _times(centering: str, *, quick: bool) -> list[tuple[str | float, ...]]:
    official, ours, inputs = both(centering, quick=quick, precision="bf16")
    values = Schedules(official.settings)(STEP)
    rivals: dict[str, Callable[[], object]] = {
        OFFICIAL: lambda: official.step(inputs, values),
        OURS: lambda: ours.step(inputs, values),
    }
    samples: dict[str, list[Spent]] = {name: [] for name in rivals}
    for work in rivals.values():
        work()
    for turn in range(1 if quick else TIMES):
        for name in list(rivals)[:: -1 if turn % 2 else 1]:
            samples[name].append(spent(lambda rival: bool(rivals[rival]()), name))
    return [(name, *_medians(taken, samples[OFFICIAL])) for name, taken in samples.items()]


def _medians(taken: list[Spent], official: list[Spent]) -> tuple[float, ...]:
    """CPU and wall seconds, and medians of the ratios of neighbours in time."""
    return (
        statistics.median(one.cpu_s for one in taken),
        statistics.median(one.wall_s for one in taken),
        statistics.median(one.cpu_s / other.cpu_s for one, other in zip(taken, official, strict=True)),
        statistics.median(one.wall_s / other.wall_s for one, other in zip(taken, official, strict=True)),
    )
