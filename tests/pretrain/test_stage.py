import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save

from pathfm.errors import StoreError, TrainingError, UsageError
from pathfm.models.checkpoints import load_encoder_folder
from pathfm.pretrain.method import DinoV2
from pathfm.pretrain.metrics import FLUSH_EVERY, MetricsLog
from pathfm.pretrain.stage import run_pretrain
from pathfm.store.commit import content_digest
from pathfm.study import CropSettings
from tests.pretrain.conftest import study

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
    assert (tmp_path / "e/checkpoints/last.ckpt").is_file() and (tmp_path / "e/timing.csv").is_file()
    assert caplog.text == "" and capfd.readouterr() == ("", "")

    before = content_digest(tmp_path / "e")
    again = run_pretrain(study(), stores, tmp_path / "e", "print")
    assert again.did_nothing and {row.status for row in again.outcomes} == {"kept"} and content_digest(tmp_path / "e") == before


def crash(folder: Path, stores: list[Path], point: str) -> None:
    code = (
        "import sys; from pathlib import Path; from pathfm.pretrain.stage import run_pretrain\n"
        "from tests.pretrain.conftest import study\nfrom tests.pretrain.test_stage import RESUMED\n"
        "run_pretrain(study(**RESUMED), [Path(path) for path in sys.argv[2:]], Path(sys.argv[1]), 'print')"
    )
    environment = {**os.environ, "PATHFM_CRASH_AT": point, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(folder), *map(str, stores)], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_run_killed_twice_ends_with_the_same_bits(tmp_path, stores):
    """Once in the middle of the steps (8, checkpoint at 5), once while the checkpoint of step 10 is being written."""
    run_pretrain(study(**RESUMED), stores, tmp_path / "whole", "print")
    crash(tmp_path / "killed", stores, "pretrain.step:8")
    assert not (tmp_path / "killed/teacher").exists()
    crash(tmp_path / "killed", stores, "pretrain.checkpoint.before_rename")
    report = run_pretrain(study(**RESUMED), stores, tmp_path / "killed", "print")
    assert report.note == "resumed at step 5"
    files = [
        "teacher/model.safetensors",
        "teacher/card.json",
        "untrained/model.safetensors",
        "metrics.csv",
        "checkpoints/last.ckpt",
    ]
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert content_digest(tmp_path / "killed") == content_digest(tmp_path / "whole")


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
    monkeypatch.setattr(DinoV2, "forward", None)
    assert run_pretrain(study(), stores, tmp_path / "e", "print").note == "resumed at step 3"
    assert content_digest(tmp_path / "e") == before


def test_a_damaged_checkpoint_is_not_passed_over(tmp_path, stores):
    checkpoint = tmp_path / "e/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    for content in (b"", b"nonsense", save({"method.x": torch.zeros(2)}), save({"method.x": torch.zeros(2)})[:-1]):
        checkpoint.write_bytes(content)
        with pytest.raises(StoreError, match=r"last\.ckpt: the checkpoint is damaged \(delete it"):
            run_pretrain(study(), stores, tmp_path / "e", "print")


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path, stores, monkeypatch):
    forward = DinoV2.forward

    def broken(self, inputs, temperature):
        terms = forward(self, inputs, temperature)
        return terms._replace(ibot=terms.ibot * float("nan"))

    monkeypatch.setattr(DinoV2, "forward", broken)
    with pytest.raises(TrainingError, match="ibot is nan at step 0"):
        run_pretrain(study(), stores, tmp_path / "e", "print")
    assert not (tmp_path / "e/checkpoints/last.ckpt").exists() and not (tmp_path / "e/teacher").exists()


def test_impossible_settings_are_named(tmp_path, stores):
    crops = CropSettings(global_px=32, local_px=24, local_count=2)
    with pytest.raises(UsageError, match=r"pretrain.crops.local_px: patches of 16 px do not divide crops of 24 px"):
        run_pretrain(study(crops=crops), stores, tmp_path / "e", "print")
    with pytest.raises(TrainingError, match="41 tiles in 3 stores"):
        run_pretrain(study(batch_size=64), stores, tmp_path / "e", "print")
    assert not (tmp_path / "e").exists()


def test_bf16_runs_with_finite_losses(tmp_path, stores):
    run_pretrain(study(precision="bf16", centering="sinkhorn"), stores, tmp_path / "e", "print")
    assert len(rows(tmp_path / "e")) == 3


def test_rows_after_the_checkpoint_are_cut_off(tmp_path):
    def add(start, steps):
        log = MetricsLog(tmp_path, ["loss"], ["lr"], images_per_step=2, start=start)
        for step in steps:
            log.add(step, torch.tensor([step / 2]), [0.1])
        log.sync()
        log.close()

    add(0, range(2 * FLUSH_EVERY))
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("20,9.5")  # a kill in the middle of a line
    add(15, range(15, 17))
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(str(step), f"{step / 2:.8g}") for step in range(17)]


def test_a_short_run_says_that_it_never_warms_up(tmp_path, stores, caplog):
    run_pretrain(study(warmup_steps=3), stores, tmp_path / "e", "print")
    assert "warmup_steps" in caplog.text


def test_an_interrupted_run_raises_and_can_be_interrupted_again(tmp_path, stores, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(DinoV2, "update_teacher", pressed)
    with pytest.raises(KeyboardInterrupt):
        run_pretrain(study(), stores, tmp_path / "e", "print")
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert run_pretrain(study(), stores, tmp_path / "e", "print").exit_code == 0
