"""``pathfm pretrain --dry-run``: what pretraining would do, need and take. It trains nothing and writes nothing.

Sizes are counted, not guessed: parameters on networks without weights, FLOPs from them, memory from what a step keeps. What is
an estimate is called one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from pathfm import workflow
from pathfm.compute import pick_device, use_threads
from pathfm.errors import ExitCode, PathfmError, StoreError, UsageError
from pathfm.log import say
from pathfm.models.checkpoints import differences
from pathfm.models.cost import StepCost, process_memory, step_cost
from pathfm.models.processor import cpu_has_bf16
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain.order import UNIT
from pathfm.pretrain.probe_table import read_probe_table
from pathfm.pretrain.schedule import REFERENCE_BATCH, phase_start
from pathfm.pretrain.views import fitting_crops, larger_crops
from pathfm.pretrain_settings import PATH_SCHEMES, CropSettings, PretrainSettings
from pathfm.pretraining import pretraining_stores, sampling_facts
from pathfm.study import ComputeSettings, Study
from pathfm.tile.check import keep_note

if TYPE_CHECKING:
    from pathfm.pretrain.catalogue import Catalogue

GPU_TFLOPS, GPU_MFU, GPU_NAME = {"bf16": 989.0, "fp32": 67.0}, 0.35, "H100"
"""Peak of a GPU without sparsity, and the share of it that is assumed: published runs of this kind reach 19 to 34 %."""
GPUS = (1, 4, 8)
INITIAL = tuple(f"{scheme}:" for scheme in ("timm", "hf-hub", *PATH_SCHEMES))
"""How names of first weights begin."""
TIMED_BLOCKS, TIMED_IMAGES = 2, {"cpu": 2, "cuda": 32}
SMALL_BATCH = 16
"""Rows that KoLeo, KDE or Sinkhorn should see at least."""
FEW_EPOCHS, MANY_EPOCHS = 0.1, 300


class Tiles(NamedTuple):
    """What there is to train on: slides, tiles, samples of an epoch (weights and caps applied), side [px]; 0: not known yet."""

    slides: int
    tiles: int
    epoch: int
    tile_px: int
    problem: str = ""


class Place(NamedTuple):
    """One way to run: a line of the table."""

    name: str
    processes: int
    strategy: str
    memory_gb: float
    images_s: float


class Plan(NamedTuple):
    """Everything that is said. ``settings`` have the crops that really are cut; ``late`` are those of the high-resolution
    phase, the same where there is none. ``cost`` is the mean over the steps, and memory is that of the larger crops.
    """

    settings: PretrainSettings
    late: CropSettings
    asked: PretrainSettings
    tiles: Tiles
    cost: StepCost
    places: tuple[Place, ...]
    warnings: tuple[str, ...]


def dry_run(study: Study) -> ExitCode:
    """Says the plan of a study's pretraining.

    Raises:
        UsageError: as ``make_plan``.
    """
    say(plan_text(make_plan(study)))
    return ExitCode.DONE


def make_plan(study: Study, device_flops: float | None = None) -> Plan:
    """The plan.

    Args:
        study: all settings.
        device_flops: what this device sustains [FLOP/s]; None: it is measured, which takes a second or two.

    Raises:
        UsageError: an impossible backbone, crop size, sampling weight or device, or files that are not there.
    """
    asked = study.pretrain
    _check_files(asked)
    tiles = _tiles(study)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        patch_px = MaskedViT(build_backbone(asked, asked.crops.global_px)).patch_px
    settings = asked.model_copy(update={"crops": fitting_crops(asked.crops, tiles.tile_px, patch_px)})
    late = larger_crops(asked, settings.crops, tiles.tile_px, patch_px)
    largest = settings.model_copy(update={"crops": late})
    cost = _mean_cost(settings, largest)
    device = pick_device(study.compute)
    sustained = device_flops or sustained_flops(settings, study.compute)
    here = Place(
        f"this {'GPU' if device.type == 'cuda' else 'CPU'}",
        1,
        "",
        process_memory(largest, study.compute, 1, on_gpu=device.type == "cuda") / 1e9,
        sustained / cost.flops_per_tile,
    )
    places = (here, *_on_gpus(largest, study.compute, cost))
    return Plan(settings, late, asked, tiles, cost, places, tuple(_warnings(study, settings, tiles)))


def _check_files(settings: PretrainSettings) -> None:
    """What the run reads besides tiles must be there. Weights are not opened, and names of other places not looked up."""
    if settings.init and not settings.init.startswith(INITIAL):
        fix = "use timm:NAME, hf-hub:ORG/NAME, local-dir:PATH or dinov2:PATH"
        raise UsageError(f"unknown weights {settings.init!r}", where="pretrain.init", fix=fix)
    for where, name in (("pretrain.init", settings.init), ("pretrain.teacher", settings.teacher)):
        scheme, _, rest = (name or "").partition(":")
        needed = {"local-dir": Path(rest, "model.safetensors"), "dinov2": Path(rest)}.get(scheme)
        if needed and not needed.is_file():
            raise UsageError("there is no such file", where=f"{where}: {needed}", fix="check the path")
    if settings.health.probe:
        read_probe_table(settings.health.probe)


def _mean_cost(settings: PretrainSettings, late: PretrainSettings) -> StepCost:
    """The cost of a step, averaged over those before the high-resolution phase and those in it."""
    cost, share = step_cost(settings), min(1.0, phase_start(settings.high_resolution.start, settings.steps) / settings.steps)
    mean = share * cost.flops_per_tile + (1 - share) * step_cost(late).flops_per_tile
    return cost._replace(flops_per_tile=mean)


def _on_gpus(settings: PretrainSettings, compute: ComputeSettings, cost: StepCost) -> Iterator[Place]:
    rate = GPU_TFLOPS[settings.precision] * 1e12 * GPU_MFU / cost.flops_per_tile
    for gpus in GPUS:
        for strategy in ("ddp", "fsdp") if gpus > 1 else ("ddp",):
            ways = compute.model_copy(update={"strategy": strategy})
            memory = process_memory(settings, ways, gpus, on_gpu=True) / 1e9
            yield Place(f"{gpus} x {GPU_NAME}", gpus, strategy if gpus > 1 else "", memory, gpus * rate)


def _tiles(study: Study) -> Tiles:
    """The study's tiles as they are now. What is wrong with them is said in the plan, which can be made without them.

    Raises:
        UsageError: sampling weights of columns or values that the cohort does not have.
    """
    planned_px = study.tile.keep_px or study.tile.tile_px
    try:
        run = workflow.begin(study)
    except PathfmError as error:
        return Tiles(0, 0, 0, planned_px, str(error))
    facts = sampling_facts(run)
    try:
        catalogue = _catalogue(run, facts)
    except StoreError as error:
        return Tiles(0, 0, 0, planned_px, str(error))
    counts = [count for _, count in catalogue.used if count]
    return Tiles(len(counts), sum(counts), int(catalogue.ends_E[-1]) // UNIT, catalogue.tile_px)


def _catalogue(run: workflow.Run, facts: Mapping[str, Mapping[str, str]]) -> Catalogue:
    from pathfm.pretrain.catalogue import build_catalogue

    return build_catalogue(list(pretraining_stores(run).values()), run.study.pretrain.sampling, facts)


def sustained_flops(settings: PretrainSettings, compute: ComputeSettings) -> float:
    """FLOP/s of forward and backward passes of two of the backbone's blocks on this device, in the run's arithmetic."""
    device = pick_device(compute)
    use_threads(compute)
    images = TIMED_IMAGES[device.type]
    side = settings.crops.global_px
    with torch.random.fork_rng(devices=[]):
        backbone = MaskedViT(build_backbone(settings, side))
        backbone.vit.blocks = backbone.vit.blocks[:TIMED_BLOCKS]
        backbone.to(device)
        pixels = torch.randn(images, 3, side, side, device=device)
    tokens = 1 + settings.registers + backbone.grid_side(side) ** 2
    weights = sum(parameter.numel() for block in backbone.blocks for parameter in block.parameters())
    done = 3 * images * tokens * (2 * weights + TIMED_BLOCKS * 4 * tokens * backbone.embed_dim)
    walls = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            (seen,) = backbone([pixels], [None])
            total = seen.cls_ND.float().square().mean() + seen.patches_NPD.float().square().mean()
        total.backward()
        total.item()
        walls.append(time.perf_counter() - started)
    return float(done / min(walls))


def _warnings(study: Study, settings: PretrainSettings, tiles: Tiles) -> Iterator[str]:
    """What is likely to go wrong, and what to change."""
    asked, rows = study.pretrain, settings.batch_size // settings.accumulate
    if tiles.problem:
        yield f"{tiles.problem}; planned for tiles of {tiles.tile_px} px"
    if note := keep_note(study):
        yield note
    if settings.crops != asked.crops:
        yield f"crops are {settings.crops.global_px} and {settings.crops.local_px} px, since tiles have {tiles.tile_px} px"
    if settings.warmup_steps >= settings.steps:
        yield "warmup_steps >= steps: the learning rate never reaches its full value"
    if settings.teacher_warmup_steps >= settings.steps:
        yield "teacher_warmup_steps >= steps: the teacher's temperature never reaches its full value"
    spread = [name for name, on in _needs_rows(settings) if on]
    if rows < SMALL_BATCH and spread:
        yield f"{', '.join(spread)} see {rows} tiles at a time, fewer than {SMALL_BATCH}: raise batch_size or lower accumulate"
    if settings.batch_size <= 256 and settings.beta2 > 0.99 and settings.preset != "distill":
        yield f"beta2 {settings.beta2:g} with a batch of {settings.batch_size}: 0.99 is steadier with small batches"
    if 0 < tiles.tiles < settings.batch_size:
        yield f"{tiles.tiles} tiles are fewer than one batch of {settings.batch_size}"
    epochs = settings.steps * settings.batch_size / tiles.epoch if tiles.epoch else 1
    if epochs < FEW_EPOCHS:
        yield f"only {100 * epochs:.2g} % of the tiles are seen"
    if epochs > MANY_EPOCHS:
        yield f"{epochs:.0f} epochs: each tile is seen very often; fewer steps or more slides"
    if settings.precision == "bf16" and pick_device(study.compute).type == "cpu" and not cpu_has_bf16():
        yield "this CPU emulates bf16: fp32 is faster"
    if settings.preset == "distill":
        yield "the cost of the encoder that is learned from is not counted"


def _needs_rows(settings: PretrainSettings) -> Sequence[tuple[str, bool]]:
    return (
        ("KoLeo", settings.koleo_weight > 0),
        ("KDE", settings.kde_weight > 0),
        ("Sinkhorn", settings.centering == "sinkhorn" and settings.preset != "distill"),
    )


def plan_text(plan: Plan) -> str:
    """The plan as aligned plain text."""
    settings, cost, tiles = plan.settings, plan.cost, plan.tiles
    changed = ", ".join(f"{name}={value}" for name, value in differences(plan.asked).items())
    masks = f", {100 * settings.mask_probability:.0f} % of global crops masked" if settings.mask_probability else ""
    epochs = f" = {settings.steps * settings.batch_size / tiles.epoch:.3g} epochs" if tiles.epoch else ""
    saved = cost.checkpoint_bytes * (settings.keep_checkpoints + 1) / 1e9
    lr = settings.lr * math.sqrt(settings.batch_size / REFERENCE_BATCH)
    heads = f"{cost.head_parameters / 1e6:.1f} M heads ({settings.prototypes} prototypes)"
    facts = {
        "preset": f"{settings.preset}{f', with {changed}' if changed else ''}",
        "tiles": f"{tiles.tiles} of {tiles.tile_px} px on {tiles.slides} slides" if tiles.tiles else "none yet",
        "steps": f"{settings.steps} of {settings.batch_size} tiles{epochs}, warm-up {settings.warmup_steps}",
        "learning rate": f"{lr:.3g} at its peak ({settings.lr:g} x sqrt({settings.batch_size} / {REFERENCE_BATCH}))",
        "crops": f"{_said_of(settings.crops)}{masks}{_said_of_late(plan)}",
        "network": f"{settings.backbone}, {cost.backbone_parameters / 1e6:.1f} M parameters"
        + (f" + {heads}" if settings.preset != "distill" else ""),
        "arithmetic": f"{cost.flops_per_tile / 1e12:.3g} TFLOP per tile, {settings.precision}",
        "checkpoints": f"{cost.checkpoint_bytes / 1e9:.2g} GB each, {saved:.2g} GB on disk",
    }
    width = max(map(len, facts))
    lines = [*(f"{name:<{width}}  {value}" for name, value in facts.items()), "", *_table(plan)]
    return "\n".join([*lines, *([""] if plan.warnings else []), *(f"warning: {warning}" for warning in plan.warnings)])


def _said_of(crops: CropSettings) -> str:
    return f"2 of {crops.global_px} px, {crops.local_count} of {crops.local_px} px"


def _said_of_late(plan: Plan) -> str:
    high = plan.settings.high_resolution
    return f"; from step {phase_start(high.start, plan.settings.steps)} on {_said_of(plan.late)}" if high.start < 1 else ""


def _table(plan: Plan) -> Iterator[str]:
    header = ("where", "strategy", "GB per process", "images/s", "run time")
    cells = [header]
    for place in plan.places:
        seconds = plan.settings.steps * plan.settings.batch_size / place.images_s
        memory, rate = f"{place.memory_gb:.1f}", f"{place.images_s:.3g}"
        cells.append((place.name, place.strategy, memory, rate, _duration(seconds)))
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    for line in cells:
        yield "  ".join(cell.ljust(wide) for cell, wide in zip(line, widths, strict=True)).rstrip()
    peak = GPU_TFLOPS[plan.settings.precision]
    yield (
        f"All are estimates. This device: from timed passes of {TIMED_BLOCKS} blocks. {GPU_NAME}: {100 * GPU_MFU:.0f} % of "
        f"{peak:.0f} TFLOP/s. Memory without the workers that read tiles."
    )


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
