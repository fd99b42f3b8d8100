"""Nothing reaches out at run time: flows with every connection refused, and the demo where there is no network at all."""

import csv
import os
import shutil
import socket
import subprocess
import sys

import pytest

from pathfm import workflow
from pathfm.config import load_study
from pathfm.errors import UsageError
from pathfm.extraction import run_extraction
from pathfm.geometry import Size
from pathfm.models.networks import load_network
from pathfm.slides.synthetic import SyntheticSpec, write_cohort, write_slide

FAST = ("compute.workers=1", "compute.threads=1", "compute.device=cpu")
TINY = (
    *FAST,
    "tile.tile_px=64",
    "tile.tissue.min_area_um2=500",
    "pretrain.steps=2",
    "pretrain.checkpoint_every=2",
    "pretrain.batch_size=4",
    "pretrain.prototypes=32",
    "pretrain.head_hidden=32",
    "pretrain.head_bottleneck=16",
    "pretrain.warmup_steps=1",
    "pretrain.freeze_last_layer_steps=1",
    "pretrain.teacher_warmup_steps=1",
    "pretrain.crops.global_px=32",
    "pretrain.crops.local_px=16",
    "pretrain.crops.local_count=2",
    "extract.input_px=64",
    "extract.controls=false",
    "report.heatmaps=1",
    "mil.controls=false",
    "mil.folds=2",
    "mil.ensemble=1",
    "mil.epochs=2",
    "mil.hidden=8",
    "mil.attention=4",
    "mil.numbers.bootstrap=20",
)


@pytest.fixture
def refused(monkeypatch):
    """Every look-up of a name and every connection fails, and is noted."""
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise OSError("a flow reaches out")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    return tried


def test_tiling_and_extraction_try_no_connection(refused, tmp_path):
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "one.tiff", SyntheticSpec(size_px=Size(512, 512)))
    settings = ["tile.tile_px=64", "tile.tissue.min_area_um2=500", "extract.encoder=untrained:resnet10t", "extract.input_px=32"]
    places = [f"out={tmp_path / 'out'}", f"cohort.slides=[{tmp_path / 'slides'}]"]
    run = workflow.begin(load_study(None, [*FAST, *settings, *places, "extract.controls=false"]))
    workflow.run_tiling(run)
    assert len(list(run_extraction(run).sets["main"].folder.glob("*.h5"))) == 1
    assert refused == []


def test_an_encoder_that_is_not_here_is_said_at_once_and_nothing_is_tried(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *arguments, **options: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="not on this machine, and HF_HUB_OFFLINE is set"):
        load_network("uni2-h")
    assert refused == []
    with pytest.raises(OSError, match="reaches out"):
        socket.create_connection(("localhost", 9))
    assert len(refused) == 1  # the trap notices


ALONE = ("unshare", "--net")
PROBE = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"


def cut_off():
    """The words before a command that take the network from it, loopback included; skips where that is not allowed."""
    for words in (ALONE, (*ALONE, "--map-root-user")):
        if shutil.which(words[0]) and not subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
            return words
    pytest.skip("this user may not make a network namespace (unshare --net)")


WATCH = ("strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect", "-e", "signal=none", "-o")


def watched(log):
    """The words before a command that note in a file whom it connects to; none where processes cannot be watched."""
    log.write_text("")
    words = [*WATCH, str(log)]
    return words if shutil.which(words[0]) and not subprocess.run([*words, "true"], check=False).returncode else []


def run_alone(code, *arguments, calls):
    command = [*cut_off(), *watched(calls), sys.executable, "-c", code, *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**environment, "OMP_NUM_THREADS": "1"})


DEMO = """
import sys
from pathlib import Path
from pathfm import demo
demo.SLIDES = 12
raise SystemExit(demo.run_demo(Path(sys.argv[1]), sys.argv[2:]))
"""
MAIN = "from pathfm.cli import main; main()"


@pytest.mark.long
def test_the_demo_and_its_bundle_run_without_a_network(tmp_path):
    calls = tmp_path / "calls"
    probed = run_alone(PROBE, calls=calls)
    assert probed.returncode and "unreachable" in probed.stderr  # the network is gone, or this test shows nothing
    assert "AF_INET" in calls.read_text() or not watched(calls)  # an attempt is noticed, also one that nobody hears of
    demo = run_alone(DEMO, tmp_path / "demo", *TINY, calls=calls)
    assert "AF_INET" not in calls.read_text()
    assert demo.returncode == 0, demo.stderr
    study = tmp_path / "demo" / "study"
    assert (study / "report" / "index.html").stat().st_size > 10_000
    table = write_cohort(tmp_path / "new", 3, 77)
    out = tmp_path / "predicted"
    settings = [word for setting in FAST for word in ("--set", setting)]
    slides = sorted(map(str, table.parent.glob("slides/*.tiff")))
    words = ["mil", "predict", "--bundle", study / "mil" / "bundle", *slides, "--out", out, *settings]
    predicted = run_alone(MAIN, *words, calls=calls)
    assert predicted.returncode == 0, predicted.stderr
    assert "AF_INET" not in calls.read_text()
    with (out / "predictions.csv").open(newline="") as stream:
        assert [row["outcome"] for row in csv.DictReader(stream)] == ["predicted"] * 3
