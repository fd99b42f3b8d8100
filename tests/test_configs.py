"""Every shipped settings file loads; the presets for small batches keep what they promise, and their figures are the plan's."""

import re
from pathlib import Path

import pytest

from pathfm.config import load_study
from pathfm.planning import make_plan

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "pipelines").rglob("study*.yaml")])
PRESETS = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
CPU_FLOPS = 200e9


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_it_loads(file):
    load_study(file)


def test_there_is_one_for_each_place():
    assert {path.stem for path in PRESETS} == {
        f"vit-{size}-{place}" for size in "sb" for place in ("cpu", "1gpu", "4gpu", "8gpu")
    }


@pytest.mark.parametrize("file", PRESETS, ids=lambda path: path.stem)
def test_presets_for_small_batches_keep_what_they_say(file):
    text, study = file.read_text(), load_study(file)
    settings, gpus = study.pretrain, 0 if file.stem.endswith("cpu") else study.compute.devices
    assert f"-{gpus}gpu" in file.stem or not gpus
    assert settings.warmup_steps * 10 == settings.steps and settings.teacher_warmup_steps < settings.steps
    assert settings.batch_size % (settings.accumulate * max(1, gpus)) == 0
    assert (settings.beta2 == 0.99) == (settings.batch_size <= 256)
    assert f"{settings.lr * (settings.batch_size / 1024) ** 0.5:.1e} here".replace("e-0", "e-") in text

    plan = make_plan(study, device_flops=CPU_FLOPS)
    assert plan.settings.crops == settings.crops, "stored tiles have room for the crops"
    assert [warning for warning in plan.warnings if "cohort.csv" not in warning] == []
    place = next(place for place in plan.places if place.processes == max(1, gpus) and ("GPU" in text) == (" x " in place.name))
    said = re.search(r"dry run: ([\d.]+) GB(?: per GPU)?, ([\d.]+) images/s", text)
    assert said and float(said[1]) == pytest.approx(place.memory_gb, abs=0.06)
    assert float(said[2]) == pytest.approx(place.images_s, rel=0.01, abs=0.06)
