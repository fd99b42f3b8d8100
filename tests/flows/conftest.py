"""A study small enough to be run several times."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, write_cohort
from pathfm.store.receipts import STAGES, read_receipt, receipt_path

STUDY = """
name: tiny
out: {out}
cohort: {{table: {table}}}
tile: {{tile_px: 64, tissue: {{min_area_um2: 500}}}}
pretrain:
  {{backbone: vit_tiny_patch16_224, steps: 6, checkpoint_every: 2, batch_size: 4, prototypes: 32, head_hidden: 32,
    head_bottleneck: 16, layer_scale: 0, warmup_steps: 2, freeze_last_layer_steps: 1, teacher_warmup_steps: 2,
    crops: {{global_px: 32, local_px: 16, local_count: 2}}}}
extract: {{input_px: 64, precision: fp32}}
mil: {{label: label, positive: lesion, folds: 2, ensemble: 2, epochs: 3, numbers: {{bootstrap: 50}}, hidden: 16, attention: 8}}
report: {{heatmaps: 2, top_tiles: 2}}
"""


@pytest.fixture(scope="session")
def cohort_table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return write_cohort(folder, 12, 3, SyntheticSpec(size_px=Size(512, 512)))


@pytest.fixture
def study_file(tmp_path, cohort_table):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(out="out", table=cohort_table))
    return path


def read_receipts(out, stages=STAGES):
    """All receipts of a study, by stage and group."""
    return [read_receipt(path) for stage in stages for path in sorted(receipt_path(out, stage, "all").parent.glob("*.json"))]


def pathfm(*arguments, crash_at="", **options):
    """Runs the command in a process group of its own, on one thread."""
    environment = {**os.environ, "PATHFM_CRASH_AT": crash_at, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pathfm", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def run(*arguments, **options):
    """Runs the command to its end: exit code, standard output, standard error."""
    process = pathfm(*arguments, **options)
    out, err = process.communicate()
    return process.returncode, out, err
