"""From raw slides to predictions with a bundle: in another folder, on one command, killed and run again, and refused.

The networks are untrained: what a bundle says does not matter here, only that it is always the same and never mixed up.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save

from pathfm import workflow
from pathfm.config import load_study
from pathfm.errors import ExitCode, PathfmError, UsageError
from pathfm.extraction import run_extraction
from pathfm.geometry import Size
from pathfm.mil.bundle import BundleFacts, EncoderFacts, TrainingSlide, open_bundle, write_bundle
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.network import build_network, spec_of
from pathfm.mil.tasks import make_tasks
from pathfm.mil.trust import fit_trust
from pathfm.prediction import _place_of_bundle, mil_predict
from pathfm.running import run_study
from pathfm.slides.synthetic import SyntheticSpec, draw_slide, write_cohort, write_slide
from pathfm.store.commit import content_digest, write_json
from pathfm.store.manifest import CARD, DIGEST, MANIFEST, write_manifest
from pathfm.store.tile_store import open_tiles
from pathfm.study import MilSettings

ENCODER = "untrained:resnet10t"
FAST = ("compute.workers=1", "compute.threads=1", "compute.device=cpu")
SETTINGS = ("tile.tile_px=64", "tile.tissue.min_area_um2=500", f"extract.encoder={ENCODER}", "extract.input_px=32")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with training slides, new slides, and a bundle that was moved to another folder."""
    folder = tmp_path_factory.mktemp("bundle-flow")
    table = write_cohort(folder / "old", 4, 2, SyntheticSpec(size_px=Size(512, 512)))
    study = load_study(None, [*FAST, *SETTINGS, f"out={folder / 'out'}", f"cohort.table={table}", "extract.controls=false"])
    run = workflow.begin(study)
    workflow.run_tiling(run)
    features = run_extraction(run).sets["main"].folder
    facts = _facts(run, features, folder)
    digest = write_bundle(folder / "made" / "bundle", facts)
    shutil.move(folder / "made" / "bundle", folder / "bundle")
    assert open_bundle(folder / "bundle").digest == digest
    (folder / "new").mkdir()
    for number in range(3):
        spec = SyntheticSpec(size_px=Size(512, 512), seed=900 + number, lesion=number % 2 == 1)
        write_slide(folder / "new" / f"n{number}.tiff", spec)
    shutil.rmtree(folder / "out" / "features")
    return folder


def _facts(run, features, folder):
    settings = MilSettings(hidden=8, attention=4)
    slides, mean = [], []
    with FeatureCache(1 << 24, folder / "scratch") as cache:
        for row in run.cohort.rows:
            found, store = cache.add(row.slide_id, features / f"{row.slide_id}.h5"), open_tiles(run.layout.store(row.slide_id))
            slides.append(TrainingSlide(row.slide_id, row.patient_id, store.attrs["identity"], len(found), store.mpp))
            mean.append(found.mean_D)
    rows = [{"label": name} for name in ("lesion", "normal")] * 20
    tasks = make_tasks(settings, rows)
    for number in range(2):
        network = build_network(spec_of(settings, found.dim, tasks.outputs))
        network.draw_weights(torch.Generator().manual_seed(number))
        data = save({name: value.contiguous() for name, value in sorted(network.state_dict().items())})
        path = folder / "models" / f"fold-{number}" / "member-0.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        said = {"fold": number, "member": 0, "network": network.spec.record(), "tasks": tasks.record(), "states": {"label": {}}}
        path.with_suffix(".json").write_text(json.dumps({**said, "sha256": hashlib.sha256(data).hexdigest()}))
    score, target = np.linspace(0.3, 0.7, 40), tasks.encode(rows)
    mean_BD = np.resize(np.array(mean), (40, found.dim)) + np.random.default_rng(0).normal(0, 0.01, (40, found.dim))
    names = [f"p{number}" for number in range(40)]
    folds = [number % 4 for number in range(40)]
    trust, _ = fit_trust(tasks.main, np.stack([1 - score, score], 1), target, names, folds, mean_BD, settings.numbers)
    encoder = EncoderFacts(ENCODER, found.encoder, found.dim)
    return BundleFacts(
        settings,
        tasks.record(),
        {"label": trust.record()},
        folder / "models",
        encoder,
        run.study.tile,
        run.study.extract,
        slides,
        {"label": "label", "kind": "binary"},
        names=frozenset(name for slide in slides for name in (slide.slide_id, slide.patient_id)),
    )


def predicted(places, out, *sources, overrides=(), **options):
    return mil_predict([str(source) for source in sources], out, places / "bundle", [*FAST, *overrides], **options)


def rows_of(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def labelled(places, file, **patients):
    """A table of the new slides with labels."""
    lines = [
        f"n{n},{places / 'new' / f'n{n}.tiff'},{patients.get(f'n{n}', f'N{n}')},{'lesion' if n % 2 else 'normal'}"
        for n in range(3)
    ]
    file.write_text("\n".join(["slide_id,path,patient_id,label", *lines]) + "\n")
    return file


@pytest.fixture(scope="module")
def undisturbed(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted") / "out"
    assert predicted(places, out, places / "new" / "*.tiff") == ExitCode.DONE
    return out


def test_every_slide_has_its_row_pictures_and_hashes_and_no_pixels_are_kept(places, undisturbed):
    rows = rows_of(undisturbed / "predictions.csv")
    assert [row["slide_id"] for row in rows] == ["n0", "n1", "n2"]
    for row in rows:
        assert row["outcome"] == "predicted" and row["decision"] and row["bundle"] == open_bundle(places / "bundle").digest
        assert float(row["mpp"]) > 0 and 0 <= float(row["tiles_dropped"]) <= 1 and len(row["slide_identity"]) == 64
        assert float(row["probability_lesion"]) + float(row["probability_normal"]) == pytest.approx(1, abs=2e-6)
        for name in (
            f"heatmaps/{row['slide_id']}.png",
            f"geojson/{row['slide_id']}.geojson",
            f"attention/{row['slide_id']}.csv",
        ):
            assert (undisturbed / name).stat().st_size > 100
    assert not list(undisturbed.glob("tiles/*/*.zarr/tiles"))
    assert not (undisturbed / "patients.csv").exists() and not (undisturbed / "metrics.json").exists()
    (events,) = undisturbed.glob("events-*.jsonl")
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["kind"] for event in told] == ["run_started", *["slide_done"] * 3, "run_ended", "run_recorded"]
    assert told[0]["settings"] == open_bundle(places / "bundle").digest


def test_a_bad_slide_is_a_row_and_exit_code_3(places, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("pathfm.extract.stage.load_sets", None)  # the encoder is loaded once, before
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    sources = (places / "new" / "n0.tiff", tmp_path / "bad.svs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("of an earlier validation")
    assert predicted(places, tmp_path / "out", *sources) == ExitCode.SOME_FAILED
    assert not (tmp_path / "out" / "index.html").exists()
    bad, good = rows_of(tmp_path / "out" / "predictions.csv")
    assert (bad["outcome"], good["outcome"]) == ("failed", "predicted") and bad["reason"]
    assert good == rows_of(undisturbed / "predictions.csv")[0]  # whatever else is in the batch


def test_one_patients_slides_are_one_bag(places, tmp_path):
    table = labelled(places, tmp_path / "table.csv", n0="A", n2="A")
    table.write_text(table.read_text().replace(",normal", ",").replace(",lesion", ","))
    assert predicted(places, tmp_path / "out", table) == ExitCode.DONE
    people = {row["patient_id"]: row for row in rows_of(tmp_path / "out" / "patients.csv")}
    slides = {row["slide_id"]: row for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert int(people["A"]["n_tiles"]) == int(slides["n0"]["n_tiles"]) + int(slides["n2"]["n_tiles"])
    assert people["N1"]["probability_lesion"] == slides["n1"]["probability_lesion"]


def test_labels_make_it_the_external_validation_with_nothing_fitted(places, undisturbed, tmp_path):
    assert predicted(places, tmp_path / "out", labelled(places, tmp_path / "table.csv")) == ExitCode.DONE
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["n_patients"] == 3 and metrics["validation_of"] == open_bundle(places / "bundle").digest
    assert "auroc" in metrics["models"]["bundle"]
    locked = open_bundle(places / "bundle").facts["trust"]["label"]
    assert metrics["trust"]["operating_points"][0]["threshold"] == locked["points"][0]["threshold"]
    columns = ("probability_lesion", "calibrated_lesion", "decision")
    for row, plain in zip(rows_of(tmp_path / "out" / "predictions.csv"), rows_of(undisturbed / "predictions.csv"), strict=True):
        assert [row[name] for name in columns] == [plain[name] for name in columns]


def test_a_training_patient_with_labels_is_refused_and_without_is_marked(places, tmp_path, capsys):
    old = sorted((places / "old").rglob("*.tiff"))[0]
    shutil.copy(old, tmp_path / "renamed.tiff")
    table = tmp_path / "table.csv"
    table.write_text(f"slide_id,path,patient_id,label\nx,renamed.tiff,X,lesion\nn1,{places / 'new' / 'n1.tiff'},N1,lesion\n")
    with pytest.raises(UsageError, match=r"learned from 1 of 2 patients[^\n]*x: same file"):
        predicted(places, tmp_path / "out", table)
    assert not list((tmp_path / "out").glob("tiles/*"))
    assert predicted(places, tmp_path / "out", tmp_path / "renamed.tiff") == ExitCode.DONE
    assert rows_of(tmp_path / "out" / "predictions.csv")[0]["trained_on"] == "same file"
    assert "earlier prediction" not in capsys.readouterr().out
    assert predicted(places, tmp_path / "out", table, trained="exclude") == ExitCode.DONE
    lost = "note: 1 slide of an earlier prediction is not among these: their rows and pictures are removed (renamed)"
    assert lost in capsys.readouterr().out.splitlines()
    assert {path.stem for path in (tmp_path / "out" / "attention").iterdir()} == {"n1", "x"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["n_patients"], metrics["flow"]["slides"]["left out"]) == (1, 1)


def test_slides_the_encoder_was_pretrained_on_are_refused_before_any_work_and_told_in_one_go(places, tmp_path):
    digest = write_manifest(tmp_path / MANIFEST, sorted(places.glob("out/tiles/*/*.zarr")), {})
    write_json(tmp_path / CARD, {DIGEST: digest})
    shutil.copy(sorted((places / "old").rglob("*.tiff"))[0], tmp_path / "renamed.tiff")
    table = tmp_path / "table.csv"
    table.write_text("slide_id,path,patient_id,label\nx,renamed.tiff,X,lesion\n")
    encoder = [f"extract.encoder=local-dir:{tmp_path}"]
    with pytest.raises(UsageError, match=r"learned from 1 of 1.*--trained mark.*--set mil.seen_in_pretraining=mark"):
        predicted(places, tmp_path / "out", table, overrides=encoder)
    with pytest.raises(UsageError, match=r"the encoder has seen 1 of 1 patients[^\n]*x: same file"):
        predicted(places, tmp_path / "out", table, overrides=encoder, trained="mark")
    assert not list((tmp_path / "out").glob("tiles/*"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tile.mpp=1.0"], "the settings of a bundle are locked"),
        (["mil.level=slide"], "the settings of a bundle are locked"),
        (["extract.encoder=untrained:resnet18"], "512 features per tile|another encoder"),
        (["extract.encoder=timm:nothing_such"], "nothing_such"),
    ],
)
def test_other_settings_and_other_encoders_are_refused_before_any_work(places, tmp_path, overrides, said):
    with pytest.raises(PathfmError, match=said) as caught:
        predicted(places, tmp_path / "out", places / "new" / "*.tiff", overrides=overrides)
    assert caught.value.exit_code == ExitCode.USAGE
    assert not list((tmp_path / "out").glob("tiles/*"))


def test_a_flipped_byte_is_refused_before_any_work(places, tmp_path):
    shutil.copytree(places / "bundle", tmp_path / "bundle")
    weights = next((tmp_path / "bundle" / "members").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PathfmError, match=rf"{weights.name} is not the file that was locked") as caught:
        mil_predict([str(places / "new" / "*.tiff")], tmp_path / "out", tmp_path / "bundle", FAST)
    assert caught.value.exit_code == ExitCode.USAGE and not (tmp_path / "out").exists()


def test_slides_of_another_resolution_fail_by_name(places, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(f"slide_id,path,mpp\ncoarse,{places / 'new' / 'n0.tiff'},2.0\n")
    assert predicted(places, tmp_path / "out", table) == ExitCode.SOME_FAILED
    (row,) = rows_of(tmp_path / "out" / "predictions.csv")
    assert row["outcome"] == "failed" and "mpp" in row["reason"]


@pytest.mark.long
def test_a_slide_without_mpp_fails_until_somebody_says_it(places, tmp_path):
    """Also with a bundle of before, which holds what was assumed of the training's own files."""
    shutil.copytree(places / "bundle", tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "tile": {**facts["tile"], "assume_mpp": 0.5}}))
    picture, _ = draw_slide(SyntheticSpec(size_px=Size(512, 512), seed=900))
    cv2.imwrite(str(tmp_path / "plain.png"), picture[..., ::-1])
    (tmp_path / "table.csv").write_text(f"slide_id,path,mpp\nplain,{tmp_path / 'plain.png'},0.5\n")

    def row(name, source, *overrides):
        mil_predict([str(tmp_path / source)], tmp_path / name, tmp_path / "bundle", [*FAST, *overrides])
        return rows_of(tmp_path / name / "predictions.csv")[0]

    failed = row("nobody", "plain.png")
    assert (failed["outcome"], failed["n_tiles"]) == ("failed", "") and failed["reason"].startswith("no mpp in the file")
    advised = re.search(r"--set (tile\.assume_mpp=)MPP", failed["reason"])[1]
    assumed, given = row("assumed", "plain.png", f"{advised}0.5"), row("given", "table.csv")
    assert (assumed["outcome"], assumed["mpp"], assumed["qc"]) == ("predicted", "0.5", "mpp assumed")
    assert (given["outcome"], given["mpp"], given["qc"]) == ("predicted", "0.5", "")
    assert assumed["probability_lesion"] == given["probability_lesion"]


def test_labels_the_bundle_does_not_know_are_refused(places, tmp_path):
    table = labelled(places, tmp_path / "table.csv")
    table.write_text(table.read_text().replace("lesion\n", "cancer\n"))
    with pytest.raises(UsageError, match="cancer"):
        predicted(places, tmp_path / "out", table)


def test_who_predicts_is_said_in_one_of_three_ways_and_nothing_is_written_into_a_bundle(places, tmp_path):
    assert _place_of_bundle([str(places / "bundle"), "x.svs"], None) == (places / "bundle", ["x.svs"])
    assert _place_of_bundle(["x.svs"], places / "bundle") == (places / "bundle", ["x.svs"])
    with pytest.raises(UsageError, match="add --bundle"):
        _place_of_bundle(["x.svs", "y.svs"], None)
    with pytest.raises(UsageError, match="add --bundle"):
        _place_of_bundle([str(places / "new"), "y.svs"], None)
    with pytest.raises(UsageError, match="no slides are given"):
        _place_of_bundle([str(places / "bundle")], None)
    with pytest.raises(UsageError, match="nothing is written into a bundle"):
        predicted(places, places / "bundle" / "out", places / "new" / "*.tiff")
    open_bundle(places / "bundle")


@pytest.mark.long
def test_workers_threads_and_the_order_of_slides_change_nothing(places, undisturbed, tmp_path):
    sources = [str(places / "new" / f"n{number}.tiff") for number in (2, 0, 1)]
    overrides = ["compute.workers=2", "compute.threads=2", "compute.device=cpu", "compute.batch_size=7"]
    assert mil_predict(sources, tmp_path / "out", places / "bundle", overrides) == ExitCode.DONE
    for name in ("predictions.csv", "attention", "geojson", "heatmaps"):
        assert content_digest(tmp_path / "out" / name) == content_digest(undisturbed / name)


STUDY = """
out: out
cohort: {{table: {table}}}
tile: {{tile_px: 64, tissue: {{min_area_um2: 500}}}}
pretrain:
  {{backbone: vit_tiny_patch16_224, steps: 2, checkpoint_every: 2, batch_size: 4, prototypes: 32, head_hidden: 32,
    head_bottleneck: 16, layer_scale: 0, warmup_steps: 1, freeze_last_layer_steps: 1, teacher_warmup_steps: 1,
    crops: {{global_px: 32, local_px: 16, local_count: 2}}}}
extract: {{input_px: 64, precision: fp32, controls: false}}
mil: {{positive: lesion, folds: 2, ensemble: 1, epochs: 2, hidden: 8, attention: 4, controls: false,
  numbers: {{bootstrap: 20}}}}
report: {{heatmaps: 1}}
compute: {{workers: 1, threads: 1, device: cpu}}
"""


@pytest.mark.long
def test_a_study_ends_in_a_bundle_that_goes_anywhere_with_its_own_encoder(places, tmp_path):
    table = write_cohort(tmp_path / "old", 12, 2, SyntheticSpec(size_px=Size(512, 512)))
    (tmp_path / "study.yaml").write_text(STUDY.format(table=table))
    run_study(load_study(tmp_path / "study.yaml"))
    source = [str(places / "new" / "*.tiff")]
    assert mil_predict([str(tmp_path / "out"), *source], tmp_path / "first", None, FAST) == ExitCode.DONE
    shutil.move(tmp_path / "out" / "mil" / "bundle", tmp_path / "bundle")
    shutil.rmtree(tmp_path / "out")
    assert mil_predict(source, tmp_path / "second", tmp_path / "bundle", FAST) == ExitCode.DONE
    first, second = ((tmp_path / name / "predictions.csv").read_text() for name in ("first", "second"))
    assert first == second
    old = rows_of(table)[0]
    known = tmp_path / "known.csv"
    known.write_text(f"slide_id,path,patient_id,label\nagain,{table.parent / old['path']},NEW,{old['label']}\n")
    with pytest.raises(UsageError, match=r"again: same file.*--set mil.seen_in_pretraining=mark"):
        mil_predict([str(known)], tmp_path / "third", tmp_path / "bundle", FAST)
    with pytest.raises(UsageError, match="the encoder has seen"):
        mil_predict([str(known)], tmp_path / "third", tmp_path / "bundle", FAST, trained="mark")
    assert not list((tmp_path / "third").glob("tiles/*"))


@pytest.mark.long
@pytest.mark.parametrize("point", ["extract.slide:2", "mil.predict.slide:2", "mil.predict.before_commit"])
def test_killed_and_run_again_the_files_are_the_same(places, undisturbed, tmp_path, point):
    code = (
        "import sys; from pathlib import Path; from pathfm.prediction import _place_of_bundle, mil_predict;"
        "mil_predict(sys.argv[3:4], Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4:])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(places / "bundle"), str(places / "new" / "*.tiff"), *FAST]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    killed = subprocess.run(command, env={**environment, "PATHFM_CRASH_AT": point}, check=False, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "predictions.csv").exists()
    subprocess.run(command, env=environment, check=True, cwd=ROOT, capture_output=True)
    assert content_digest(tmp_path / "out") == content_digest(undisturbed)
