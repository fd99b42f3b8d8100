"""The demo: synthetic slides with planted lesions through the whole pipeline, on the CPU, in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pathfm.config import load_study
from pathfm.errors import ExitCode
from pathfm.log import say
from pathfm.study import Study

SLIDES = 48
SEED = 7
SETTINGS = (
    "name=demo",
    "tile.tile_px=128",
    "tile.tissue.min_area_um2=5000",
    "pretrain.backbone=vit_tiny_patch16_224",
    "pretrain.layer_scale=0",
    "pretrain.steps=320",
    "pretrain.batch_size=32",
    "pretrain.prototypes=2048",
    "pretrain.head_hidden=512",
    "pretrain.head_bottleneck=128",
    "pretrain.warmup_steps=30",
    "pretrain.freeze_last_layer_steps=30",
    "pretrain.teacher_warmup_steps=100",
    "pretrain.ema=[0.98, 1.0]",
    # In so few steps KoLeo spreads the tiles better than KDE, and registers have nothing to hold.
    "pretrain.koleo_weight=0.1",
    "pretrain.kde_weight=0",
    "pretrain.registers=0",
    "pretrain.sampling.slide_power=1",
    "pretrain.crops.global_px=96",
    "pretrain.crops.local_px=48",
    "pretrain.crops.local_count=4",
    "pretrain.crops.hue=0.1",
    "pretrain.crops.hed=0.1",
    "pretrain.crops.hed_probability=0.8",
    "extract.input_px=128",
    "mil.label=label",
    "mil.positive=lesion",
)
"""What differs from the defaults: small tiles, a small network, few steps, crops at the tiles' own scale."""


def demo_study(out: Path, overrides: Sequence[str] = ()) -> Study:
    """The demo's study under ``out``. Pretraining runs in bfloat16 where the processor computes in it: twice as fast."""
    from pathfm.models.processor import cpu_has_bf16

    placed = [f"out={out.absolute() / 'study'}", f"cohort.table={out.absolute() / 'slides' / 'cohort.csv'}"]
    precision = f"pretrain.precision={'bf16' if cpu_has_bf16() else 'fp32'}"
    return load_study(None, [*SETTINGS, precision, *placed, *overrides])


def run_demo(out: Path, overrides: Sequence[str] = ()) -> ExitCode:
    """Draws the slides unless they are there, runs the study, which prints its key numbers and the page's path."""
    from pathfm.running import run_study
    from pathfm.slides.synthetic import write_cohort

    started = time.monotonic()
    write_cohort(out / "slides", SLIDES, SEED)
    study = demo_study(out, overrides)
    code = run_study(study)
    say(f"done in {time.monotonic() - started:.0f} s")
    return code
