import csv
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from pathfm.errors import ExitCode, StoreError, TrainingError, UsageError
from pathfm.models.checkpoints import load_encoder_folder
from pathfm.pretrain.method import SelfDistillation
from pathfm.pretrain.optim import set_values
from pathfm.pretrain.schedule import Schedules
from pathfm.pretrain.stage import run_pretrain
from pathfm.pretrain.state import newest_checkpoint
from pathfm.pretrain_settings import CropSettings
from pathfm.store.commit import content_digest
from tests.pretrain.conftest import study, tiny

ROOT = Path(__file__).resolve().parents[2]
RESUMED = {"steps": 12, "checkpoint_every": 5, "drop_path": 0.2, "layer_scale": 0.1, "ema": (0.9, 1.0), "lr": 0.05}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_run_leaves_two_encoders_a_curve_and_a_checkpoint(tmp_path, stores, caplog, capfd):
    report = run_pretrain(study(), stores, tmp_path / "e", "print")
    assert [(row.slide_id, row.status, row.counts) for row in report.outcomes] == [
        ("a", "done", {"tiles": 24}),
        ("b", "done", {"tiles": 10}),
        ("c", "done", {"tiles": 7}),
    ]
    teacher, untrained = load_encoder_folder(tmp_path / "e/teacher"), load_encoder_folder(tmp_path / "e/untrained")
    assert {key: teacher.card[key] for key in ("fingerprint", "mpp", "tile_px", "step")} == {
        "fingerprint": "print",
        "mpp": 0.5,
        "tile_px": 40,
        "step": 3,
    }
    assert untrained.card["step"] == 0 and untrained.card["weights_sha256"] != teacher.card["weights_sha256"]
    assert timm.create_model(f"local-dir:{tmp_path / 'e/teacher'}", pretrained=True)(
        torch.zeros(1, 3, 40, 40).add(1)[..., :32, :32]
    ).shape == (1, 192)
    curve = rows(tmp_path / "e")
    assert [row["step"] for row in curve] == ["0", "1", "2"]
    assert {"loss", "dino_local", "ibot", "koleo", "teacher_entropy", "grad_norm_backbone", "lr", "ema"} <= set(curve[0])
    assert newest_checkpoint(tmp_path / "e/checkpoints", "print").step == 3 and (tmp_path / "e/timing.csv").is_file()
    assert load_encoder_folder(tmp_path / "e/student").card["weights_sha256"] != teacher.card["weights_sha256"]
    assert caplog.text == "" and capfd.readouterr() == ("", "")

    before = content_digest(tmp_path / "e")
    again = run_pretrain(study(), stores, tmp_path / "e", "print")
    assert again.did_nothing and {row.status for row in again.outcomes} == {"kept"} and content_digest(tmp_path / "e") == before


def run_with(folder: Path, stores: list[Path], environment: dict[str, str], before: str = "") -> subprocess.CompletedProcess:
    code = (
        "import sys; from pathlib import Path; from pathfm.errors import PathfmError\n"
        "from pathfm.pretrain.stage import run_pretrain\n"
        "from tests.pretrain.conftest import study\nfrom tests.pretrain.test_stage import RESUMED\n"
        f"{before}\n"
        "try:\n    run_pretrain(study(**RESUMED), [Path(path) for path in sys.argv[2:]], Path(sys.argv[1]), 'print')\n"
        "except PathfmError as error:\n    print(error, file=sys.stderr)\n    sys.exit(error.exit_code)"
    )
    command = [sys.executable, "-c", code, str(folder), *map(str, stores)]
    return subprocess.run(command, env={**os.environ, **environment, "PYTHONPATH": str(ROOT)}, capture_output=True)


def crash(folder: Path, stores: list[Path], point: str) -> None:
    done = run_with(folder, stores, {"PATHFM_CRASH_AT": point})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.long
def test_a_run_killed_twice_ends_with_the_same_bits(tmp_path, stores):
    """Once in the middle of the steps (8, checkpoint at 5), once while the checkpoint of step 10 is being written."""
    run_pretrain(study(**RESUMED), stores, tmp_path / "whole", "print")
    crash(tmp_path / "killed", stores, "pretrain.step:8")
    assert not (tmp_path / "killed/teacher").exists()
    crash(tmp_path / "killed", stores, "pretrain.checkpoint.before_rename")
    report = run_pretrain(study(**RESUMED), stores, tmp_path / "killed", "print")
    assert report.note == "resumed at step 5"
    files = ["teacher/model.safetensors", "teacher/card.json", "student/model.safetensors", "untrained/model.safetensors"]
    for name in [*files, "metrics.csv", "health/snapshots.csv"]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert content_digest(tmp_path / "killed") == content_digest(tmp_path / "whole")
    ours, theirs = (tensors(tmp_path / name / "checkpoints/step-00000012") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_another_fingerprint_starts_anew(tmp_path, stores, caplog):
    run_pretrain(study(steps=2), stores, tmp_path / "e", "old")
    (tmp_path / "e/teacher/card.json").write_text("{}")
    report = run_pretrain(study(steps=3), stores, tmp_path / "e", "new")
    assert report.note == "" and len(rows(tmp_path / "e")) == 3 and "starting anew" in caplog.text
    run_pretrain(study(steps=3), stores, tmp_path / "fresh", "new")
    assert content_digest(tmp_path / "e") == content_digest(tmp_path / "fresh")


def test_a_run_killed_before_the_export_only_exports(tmp_path, stores, monkeypatch):
    run_pretrain(study(), stores, tmp_path / "e", "print")
    before = content_digest(tmp_path / "e")
    for file in (tmp_path / "e/teacher").iterdir():
        file.unlink()
    (tmp_path / "e/teacher").rmdir()
    monkeypatch.setattr(SelfDistillation, "forward", None)
    assert run_pretrain(study(), stores, tmp_path / "e", "print").note == "resumed at step 3"
    assert content_digest(tmp_path / "e") == before


@pytest.mark.long
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, stores, caplog):
    changes = {"steps": 6, "checkpoint_every": 2}
    run_pretrain(study(**changes), stores, tmp_path / "whole", "print")
    run_pretrain(study(**changes), stores, tmp_path / "e", "print")
    shutil.rmtree(tmp_path / "e/teacher")
    shards = sorted((tmp_path / "e/checkpoints").glob("step-*/*.safetensors"))
    assert [path.parent.name for path in shards] == ["step-00000004", "step-00000006"]  # the newest two are kept
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    report = run_pretrain(study(**changes), stores, tmp_path / "e", "print")
    assert "step-00000006: the checkpoint is damaged" in caplog.text and report.exit_code == 0
    assert content_digest(tmp_path / "e") == content_digest(tmp_path / "whole")
    shutil.rmtree(tmp_path / "e/teacher")
    for path in (tmp_path / "e/checkpoints").glob("step-*/state.json"):
        path.write_text("nonsense")
    with pytest.raises(StoreError, match=r"the checkpoint is damaged \(delete it"):
        run_pretrain(study(**changes), stores, tmp_path / "e", "print")


def broken_from(step: int, monkeypatch) -> None:
    forward = SelfDistillation.forward

    def broken(self, inputs, values):
        terms = forward(self, inputs, values)
        return terms | ({"ibot": terms["ibot"] * float("nan")} if values.step >= step else {})

    monkeypatch.setattr(SelfDistillation, "forward", broken)


def test_a_loss_that_is_not_finite_is_named_with_its_step_and_tiles(tmp_path, stores, monkeypatch):
    broken_from(0, monkeypatch)
    with pytest.raises(TrainingError, match=r"not finite at step 0: .*ibot.* its batch begins with tiles [abc] \d+"):
        run_pretrain(study(), stores, tmp_path / "e", "print")
    assert not list((tmp_path / "e/checkpoints").glob("step-*")) and not (tmp_path / "e/teacher").exists()
    assert "0,not finite," in (tmp_path / "e/health/alarms.csv").read_text()


def test_a_roll_back_goes_on_from_the_last_healthy_checkpoint_with_half_the_rate(tmp_path, stores, monkeypatch, caplog):
    """The fault is there at full rate only."""
    settings = {"steps": 12, "checkpoint_every": 4, "health": {"on_alarm": "rollback", "tiles": 16, "maps": 0}}
    end_step, peak = SelfDistillation.end_step, Schedules(tiny(**settings))(5).lr

    def poisoned(self, momentum):
        end_step(self, momentum)
        if group_lr(self) > 0.9 * peak:
            self.teacher.backbone.mask_token.fill_(float("nan"))
            self.student.backbone.mask_token.data.fill_(float("nan"))

    seen: list[float] = []

    def noted(optimizer, values):
        seen.append(values.lr)
        set_values(optimizer, values)

    def group_lr(_: object) -> float:
        return seen[-1] if len(seen) == 6 else 0.0

    monkeypatch.setattr("pathfm.pretrain.training.set_values", noted)
    monkeypatch.setattr(SelfDistillation, "end_step", poisoned)
    run_pretrain(study(**settings), stores, tmp_path / "e", "print")
    assert "going on from step 4 with half the learning rate" in caplog.text
    curve = rows(tmp_path / "e")
    assert [row["step"] for row in curve] == [str(step) for step in range(12)]
    assert float(curve[5]["lr"]) == pytest.approx(peak / 2, rel=1e-2)
    assert all(math.isfinite(float(row["loss"])) for row in curve)


@pytest.mark.long
def test_a_scheduler_that_wants_its_machine_back_gets_it_with_everything_saved(tmp_path, stores):
    """Two signals at step 8, the second while saving; the same command goes on to the same bits."""
    run_pretrain(study(**RESUMED), stores, tmp_path / "whole", "print")
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")):
        done = run_with(tmp_path / name, stores, {}, SIGNALLED.format(number=int(number)))
        assert done.returncode == ExitCode.PREEMPTED == 75, done.stderr.decode()
        assert f"stopped by {name} at step 8 of 12" in done.stderr.decode()
        assert run_pretrain(study(**RESUMED), stores, tmp_path / name, "print").note == "resumed at step 8"
        assert content_digest(tmp_path / name) == content_digest(tmp_path / "whole")


SIGNALLED = """
import os
from pathfm.pretrain import training
add, save = training.MetricsLog.add, training.save_checkpoint
def signalled(self, step, *rest):
    if step == 7:
        os.kill(os.getpid(), {number})
    return add(self, step, *rest)
def while_saving(*rest):
    if rest[2] == 8:
        os.kill(os.getpid(), {number})
    return save(*rest)
training.MetricsLog.add, training.save_checkpoint = signalled, while_saving
"""


def test_impossible_settings_are_named(tmp_path, stores):
    crops = CropSettings(global_px=32, local_px=24, local_count=2)
    with pytest.raises(UsageError, match=r"pretrain.crops.local_px: a crop of 24 px is no whole number of patches of 16 px"):
        run_pretrain(study(crops=crops), stores, tmp_path / "e", "print")
    with pytest.raises(TrainingError, match="41 tiles in 3 stores"):
        run_pretrain(study(batch_size=64), stores, tmp_path / "e", "print")
    assert not (tmp_path / "e/untrained").exists() and not (tmp_path / "e/checkpoints").exists()


def test_bf16_runs_with_finite_losses(tmp_path, stores):
    run_pretrain(study(precision="bf16", centering="sinkhorn"), stores, tmp_path / "e", "print")
    assert len(rows(tmp_path / "e")) == 3


def test_a_short_run_says_that_it_never_warms_up(tmp_path, stores, caplog):
    run_pretrain(study(warmup_steps=3), stores, tmp_path / "e", "print")
    assert "warmup_steps" in caplog.text


def test_an_interrupted_run_raises_and_can_be_interrupted_again(tmp_path, stores, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(SelfDistillation, "end_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        run_pretrain(study(), stores, tmp_path / "e", "print")
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert run_pretrain(study(), stores, tmp_path / "e", "print").exit_code == 0
