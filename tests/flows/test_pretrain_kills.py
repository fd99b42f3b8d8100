"""Pretraining by its command, killed wherever: the same command goes on and ends with the bits of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pathfm.slides.synthetic import write_cohort
from pathfm.store.commit import content_digest
from pathfm.store.layout import Layout

pytestmark = pytest.mark.long

SETTINGS = (
    "tile.tile_px=128",
    "tile.tissue.min_area_um2=5000",
    "pretrain.backbone=vit_tiny_patch16_224",
    "pretrain.steps=24",
    "pretrain.batch_size=8",
    "pretrain.prototypes=256",
    "pretrain.head_hidden=64",
    "pretrain.head_bottleneck=32",
    "pretrain.warmup_steps=4",
    "pretrain.drop_path=0.2",
    "pretrain.checkpoint_every=5",
    "pretrain.crops.global_px=64",
    "pretrain.crops.local_px=32",
    "pretrain.crops.local_count=2",
    "pretrain.health.tiles=16",
    "pretrain.health.maps=1",
    "pretrain.health.snapshot_steps=7",
    "compute.device=cpu",
    "compute.threads=1",
)
"""The last step is neither a checkpoint's nor a snapshot's."""


def command(out: Path, *more: str) -> list[str]:
    settings = [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]
    return [sys.executable, "-m", "pathfm", "pretrain", str(out), *settings]


def run(out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *more), capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_cohort(folder / "slides", 4, seed=3)
    settings = [part for setting in SETTINGS[:2] for part in ("--set", setting)]
    source, out = folder / "slides" / "cohort.csv", folder / "out"
    done = subprocess.run(
        [sys.executable, "-m", "pathfm", "tile", str(source), "--out", str(out), *settings], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return out


def encoder_of(out: Path) -> Path:
    (folder,) = (path for path in Layout(out, "").encoder("x", "y").parent.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def undisturbed(tiled: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shutil.copytree(tiled, out)
    done = run(out)
    assert done.returncode == 0, done.stderr
    return content_digest(encoder_of(out))


@pytest.mark.parametrize("draw", range(3))
def test_killed_at_a_random_step(tiled, undisturbed, tmp_path, draw):
    shutil.copytree(tiled, tmp_path / "out")
    step = random.Random(time.time_ns()).randint(2, 23)
    killed = run(tmp_path / "out", PATHFM_CRASH_AT=f"pretrain.step:{step}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (encoder_of(tmp_path / "out") / "teacher").exists()
    done = run(tmp_path / "out")
    kept = (step - 1) // 5 * 5  # the kill comes before what follows its step is saved
    assert done.returncode == 0 and (f"resumed at step {kept}" in done.stderr + done.stdout or not kept), done.stderr
    assert content_digest(encoder_of(tmp_path / "out")) == undisturbed, f"killed at step {step}"


def test_killed_from_outside_at_a_random_moment_and_stopped_by_the_scheduler(tiled, undisturbed, tmp_path):
    shutil.copytree(tiled, tmp_path / "out")
    for number, expected in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGUSR1, 75), (signal.SIGTERM, 75)):
        process = subprocess.Popen(command(tmp_path / "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        before = rows(tmp_path / "out")
        while process.poll() is None and rows(tmp_path / "out") <= before and not started(tmp_path / "out", before):
            time.sleep(0.02)
        time.sleep(random.Random(time.time_ns()).random() / 2)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode in (expected, 0), said
        if process.returncode == 75:
            assert f"stopped by {signal.Signals(number).name}" in said and "everything is saved" in said
    assert run(tmp_path / "out").returncode == 0
    assert content_digest(encoder_of(tmp_path / "out")) == undisturbed


def rows(out: Path) -> int:
    files = list((out / "encoder").glob("*/metrics.csv")) if (out / "encoder").is_dir() else []
    return len(files[0].read_text().splitlines()) if files else 0


def started(out: Path, before: int) -> bool:
    """A resumed run cuts its table first, so fewer rows than before are a sign of life, too."""
    return 0 < rows(out) < before


def test_started_processes_end_with_a_killed_parent_and_any_method_can_be_shared(tiled, tmp_path):
    """Distillation, by two processes; its parent is killed in the middle, and the same command goes on."""
    shutil.copytree(tiled, tmp_path / "out")
    distill = ("pretrain.preset=distill", "pretrain.teacher=untrained:vit_tiny_patch16_224", "compute.devices=2")
    more = (*distill, "pretrain.crops.local_count=0", "pretrain.drop_path=0", "pretrain.steps=40")
    with subprocess.Popen(command(tmp_path / "out", *more), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and rows(tmp_path / "out") < 12:
            time.sleep(0.05)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.kill()
    assert process.returncode == -signal.SIGKILL and children
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    done = run(tmp_path / "out", *more)
    assert done.returncode == 0 and rows(tmp_path / "out") == 41, done.stderr


def test_two_processes_train_like_one_and_pass_on_the_scheduler_s_wish(tiled, tmp_path):
    """Started by the command itself; float32, so that losses agree to what rounding leaves."""
    curves = {}
    for name, more in (
        ("one", ()),
        ("two", ("compute.devices=2",)),
        ("sharded", ("compute.devices=2", "compute.strategy=fsdp")),
    ):
        shutil.copytree(tiled, tmp_path / name)
        done = run(tmp_path / name, "pretrain.steps=4", "pretrain.drop_path=0.0", *more)
        assert done.returncode == 0, done.stderr
        text = (encoder_of(tmp_path / name) / "metrics.csv").read_text().splitlines()
        curves[name] = [float(line.split(",")[1]) for line in text[1:]]
    assert len(curves["one"]) == 4
    assert curves["two"] == pytest.approx(curves["one"], rel=1e-3) and curves["sharded"] == pytest.approx(
        curves["one"], rel=1e-3
    )
    shutil.copytree(tiled, tmp_path / "stopped")
    process = subprocess.Popen(
        command(tmp_path / "stopped", "compute.devices=2", "pretrain.steps=2000", "pretrain.checkpoint_every=1000"),
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and rows(tmp_path / "stopped") < 5:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and "everything is saved" in said, said
    assert list(encoder_of(tmp_path / "stopped").glob("checkpoints/step-*/state.json"))


def test_of_several_encoders_the_export_takes_the_one_that_the_settings_mean(tiled, tmp_path):
    shutil.copytree(tiled, tmp_path / "out")
    for steps in (2, 3):
        assert run(tmp_path / "out", f"pretrain.steps={steps}", "pretrain.warmup_steps=1").returncode == 0
    export = [sys.executable, "-m", "pathfm", "export", "encoder", str(tmp_path / "out"), str(tmp_path / "exported")]
    done = subprocess.run(export, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"step": 3' in (tmp_path / "exported" / "card.json").read_text()
