"""On real tiles: no preset raises an alarm in 200 steps, and every broken run raises the alarm that names its fault."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from pathfm.errors import TrainingError
from pathfm.presets import PRESETS
from pathfm.pretrain.method import SelfDistillation
from pathfm.pretrain.stage import run_pretrain
from pathfm.pretrain_settings import PretrainSettings
from pathfm.store.tile_store import write_tiles
from pathfm.study import ComputeSettings, Study

pytestmark = pytest.mark.long

SIDE_PX = 128
PER_CLASS = 80
SEEDS = (0, 1, 2)
SMALL = {
    "backbone": "vit_tiny_patch16_224",
    "batch_size": 8,
    "prototypes": 8192,
    "head_hidden": 256,
    "precision": "bf16",
    "warmup_steps": 20,
    "freeze_last_layer_steps": 10,
    "checkpoint_every": 1000,
}
CROPS = {"global_px": 64, "local_px": 32, "local_count": 2}
HEALTH = {"snapshot_steps": 100, "tiles": 64, "maps": 0}


@pytest.fixture(scope="module")
def real_tiles(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Quarters of lung fields and H. pylori tiles, a store per class of the former and one of the latter."""
    folder = tmp_path_factory.mktemp("real")
    classes: dict[str, list[Path]] = {}
    for path in sorted((shared_data / "lc25000").rglob("*.jp*g")) + sorted((shared_data / "lc25000").rglob("*.png")):
        classes.setdefault(path.parent.name, []).append(path)
    classes["hpylori"] = sorted((shared_data / "hpylori" / "tiles").rglob("*.*"))[::8]
    stores = []
    for name, paths in classes.items():
        images = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)[:SIDE_PX, :SIDE_PX] for path in paths[:PER_CLASS]]
        write_tiles(folder / f"{name}.zarr", np.stack(images), slide_id=name, codec="jpeg")
        stores.append(folder / f"{name}.zarr")
    return stores


def small(preset: str, seed: int = 0, steps: int = 200, **changes) -> Study:
    crops = CROPS | ({"local_count": 0} if preset == "distill" else {})
    teacher = "untrained:vit_tiny_patch16_224" if preset == "distill" else None
    given = {"preset": preset, "seed": seed, "steps": steps, "crops": crops, "teacher": teacher, "health": HEALTH, **SMALL}
    return Study(pretrain=PretrainSettings(**{**given, **changes}), compute=ComputeSettings(device="cpu", threads=1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_raises_an_alarm_in_its_first_steps(tmp_path, real_tiles, preset, seed):
    run_pretrain(small(preset, seed), real_tiles, tmp_path / "e", "print")
    assert not (tmp_path / "e/health/alarms.csv").exists()
    assert len((tmp_path / "e/metrics.csv").read_text().splitlines()) == 201


BROKEN = {
    "one prototype": {"centering": "none"},
    "teacher too soft": {"teacher_temperature": (1.0, 1.0)},
    "diverging": {"lr": 0.4},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_run_raises_the_alarm_that_names_its_fault(tmp_path, real_tiles, fault):
    with pytest.raises(TrainingError, match=f"{fault} at step"):
        run_pretrain(small("dinov2-path", steps=500, **BROKEN[fault]), real_tiles, tmp_path / "e", "print")


def test_a_batch_that_is_not_finite_raises_the_alarm_that_names_it(tmp_path, real_tiles, monkeypatch):
    forward = SelfDistillation.forward

    def poisoned(self, inputs, values):
        if values.step == 60:
            inputs.global_images[0, 0, 0, 0] = float("nan")
        return forward(self, inputs, values)

    monkeypatch.setattr(SelfDistillation, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"not finite at step 60: .*its batch begins with tiles"):
        run_pretrain(small("dinov2-path", steps=500), real_tiles, tmp_path / "e", "print")
