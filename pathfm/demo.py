"""The demo: synthetic slides with planted lesions through the whole pipeline, on the CPU, in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pathfm.config import load_study
from pathfm.errors import ExitCode
from pathfm.log import say
from pathfm.store.commit import read_json
from pathfm.study import Study

SLIDES = 40
SEED = 7
SETTINGS = (
    "name=demo",
    "tile.tile_px=128",
    "tile.tissue.min_area_um2=5000",
    "pretrain.backbone=vit_tiny_patch16_224",
    "pretrain.steps=300",
    "pretrain.batch_size=32",
    "pretrain.prototypes=2048",
    "pretrain.head_hidden=1024",
    "pretrain.warmup_steps=50",
    "pretrain.teacher_warmup_steps=100",
    "pretrain.crops.global_px=112",
    "pretrain.crops.local_px=48",
    "pretrain.crops.local_count=4",
    "mil.label=label",
    "mil.positive=lesion",
)
"""What differs from the defaults: small tiles, a small network, few steps."""


def demo_study(out: Path, overrides: Sequence[str] = ()) -> Study:
    """The demo's study under ``out``."""
    placed = [f"out={out.absolute() / 'study'}", f"cohort.table={out.absolute() / 'slides' / 'cohort.csv'}"]
    return load_study(None, [*SETTINGS, *placed, *overrides])


def run_demo(out: Path, overrides: Sequence[str] = ()) -> ExitCode:
    """Draws the slides unless they are there, runs the study, and prints its key numbers and the report's path."""
    from pathfm import workflow
    from pathfm.report.summary import key_numbers
    from pathfm.slides.synthetic import write_cohort

    started = time.monotonic()
    write_cohort(out / "slides", SLIDES, SEED)
    study = demo_study(out, overrides)
    code = workflow.run(study)
    for line in key_numbers(read_json(study.out / "report" / "summary.json")):
        say(line)
    say(f"report: {study.out / 'report' / 'index.html'} ({time.monotonic() - started:.0f} s)")
    return code
