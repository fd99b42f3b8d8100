"""A byte that differs is found in every kind of artifact, and named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pathfm.audit import audit
from pathfm.batch.results import Outbox
from pathfm.batch.verified import _in_order
from pathfm.config import fingerprint
from pathfm.errors import ExitCode, UsageError
from pathfm.events import Events
from pathfm.jobs import Made, write_receipts
from pathfm.run_manifest import RunManifest
from pathfm.store.commit import content_digest
from pathfm.store.receipts import Receipt, SlideReceipt, read_receipt, receipt_path, write_receipt
from pathfm.study_plan import Planned
from pathfm.verification import verify


def _sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def study(out):
    """What a study leaves, as far as it is hashed."""
    _write(out / "tiles/spec/a.zarr/zarr.json", "{}")
    _write(out / "tiles/spec/a.zarr/pixels/0", "pixels")
    _write(out / "features/spec/enc/a.h5", "features")
    _write(out / "mil/predictions.csv", "slide_id\n")
    _write(out / "encoder/own/teacher/model.safetensors", "weights")
    _write(out / "report/index.html", "page")
    made = {name: {name: content_digest(out / name)} for name in ("encoder/own/teacher", "report/index.html", "mil")}
    for stage, path in (("tile", "tiles/spec/a.zarr"), ("extract", "features/spec/enc/a.h5")):
        slide = SlideReceipt("a", "done", artifacts={path: content_digest(out / path)})
        write_receipt(out, Receipt(stage, "1-of-1", "f", slides=(slide, SlideReceipt("b", "failed", "broken"))))
    write_receipt(out, Receipt("pretrain", "all", "f", artifacts=made["encoder/own/teacher"]))
    write_receipt(out, Receipt("mil", "all", "f", artifacts=made["mil"]))
    write_receipt(out, Receipt("report", "all", "f", artifacts=made["report/index.html"]))
    return [path for path in out.rglob("*") if path.is_file()]


def bundle(out):
    """Two files, and the list of their hashes."""
    files = {"members/a.safetensors": _sha(_write(out / "members/a.safetensors", "w")), "card": _sha(_write(out / "card", "x"))}
    _write(out / "bundle.json", json.dumps({"format": "pathfm-bundle", "version": 1, "files": files}))
    return [out / name for name in files]


def encoder(out):
    """Weights and the list of what they have seen."""
    weights, manifest = _write(out / "model.safetensors", "w"), _write(out / "manifest.csv", "slide\n")
    _write(out / "card.json", json.dumps({"weights_sha256": _sha(weights), "manifest_sha256": _sha(manifest)}))
    return [weights, manifest]


def outbox(out):
    """Results of two slides, which the events tell of."""
    with Events(out) as events:
        for name in ("a", "b"):
            folder = out / "results" / name
            files = {
                "predictions.csv": _sha(_write(folder / "predictions.csv", f"slide_id,{name}\n{name},1\n")),
                "x/h.png": _sha(_write(folder / "x/h.png", "h")),
            }
            said = dict.fromkeys(("outcome", "decision", "bundle", "time"), "") | {
                "name": name,
                "slide_id": name,
                "drift": None,
            }
            result = _write(folder / "result.json", json.dumps(said | {"files": files, "identity": name * 64}))
            events.write("result_written", stage="batch", slide_id=name, identity=name * 64, bundle="", result=_sha(result))
    Outbox(out).write_index(Outbox(out).read_results()[0])
    return [*(path for path in (out / "results").rglob("*") if path.is_file()), out / "predictions.csv"]


def recorded(out):
    """What a manifest names as the outputs of a command."""
    with RunManifest(out, "mil predict") as manifest:
        manifest.outputs(_write(out / "predictions.csv", "p"))
    return [out / "predictions.csv"]


def export(out):
    """What ``pathfm export encoder`` writes, with hashes of all of it in the card."""
    texts = {"model.safetensors": "w", "config.json": "{}", "README.md": "r", "manifest.csv": "slide\n", "model.onnx": "o"}
    files = {name: _sha(_write(out / name, text)) for name, text in texts.items()}
    card = {"weights_sha256": files["model.safetensors"], "manifest_sha256": files["manifest.csv"], "mpp": 0.5, "files": files}
    _write(out / "card.json", json.dumps({**card, "content": fingerprint(card)}))
    return [out / name for name in texts]


KINDS = (study, bundle, encoder, outbox, recorded, export)


@pytest.mark.parametrize("make", KINDS)
def test_every_byte_counts(tmp_path, make, capsys):
    protected = make(tmp_path / "x")
    assert verify(tmp_path / "x") == 0
    first = capsys.readouterr().out
    assert "everything is what it was" in first
    for path in protected:
        whole = path.read_bytes()
        is_receipt = path.parts[-3] == "receipts"  # its last byte ends the line and says nothing
        for changed in (bytes([whole[0] ^ 1]) + whole[1:], whole[: -2 if is_receipt else -1]):
            path.write_bytes(changed)
            is_end = path == tmp_path / "x/predictions.csv" and make is outbox and changed == whole[:-1]  # of the last line
            assert verify(tmp_path / "x") == (0 if is_end else 3), path
        told = capsys.readouterr().out
        assert "  " in told
        path.unlink()
        # Without its receipt nothing says what a job made; the run manifest does, which `audit` looks after.
        assert verify(tmp_path / "x") == (0 if is_receipt else 3), path
        path.write_bytes(whole)
    capsys.readouterr()
    assert verify(tmp_path / "x") == 0
    assert capsys.readouterr().out == first


def test_differences_are_named_by_stage(tmp_path, capsys):
    study(tmp_path / "x")
    (tmp_path / "x/tiles/spec/a.zarr/pixels/0").write_text("pixelz")
    (tmp_path / "x/features/spec/enc/a.h5").unlink()
    assert verify(tmp_path / "x") == 3
    lines = capsys.readouterr().out.splitlines()
    assert "  tiles/spec/a.zarr: differs from what was made" in lines
    assert "  features/spec/enc/a.h5: missing" in lines
    assert [line.partition(":")[0] for line in lines if "content" in line] == ["tile", "pretrain", "extract", "mil", "report"]
    assert lines[-1] == "verify: 2 problems"
    (tmp_path / "x/tiles/spec/a.zarr/pixels/0").write_text("pixels")
    verify(tmp_path / "x")
    assert capsys.readouterr().out.splitlines()[-1] == "verify: 1 problem"


def test_a_receipt_that_fits_a_changed_artifact_is_noted(tmp_path, capsys):
    out = tmp_path / "x"
    study(out)
    with RunManifest(out, "run"):
        pass
    assert verify(out) == 0
    assert "note" not in capsys.readouterr().out
    _write(out / "report/index.html", "another page")
    write_receipt(
        out, Receipt("report", "all", "f", artifacts={"report/index.html": content_digest(out / "report/index.html")})
    )
    assert verify(out) == 0
    assert "note: receipts/report/all.json: of other content than when the last" in capsys.readouterr().out


def _job(out, content, done=True):
    """A job of the stage tile, and the event of its slide."""
    _write(out / "tiles/spec/a.zarr/pixels/0", content)
    if done:
        with Events(out / "tiles/spec") as events:
            events.write("slide_done", stage="tile", slide_id="a")
    made = {"tiles/spec/a.zarr": content_digest(out / "tiles/spec/a.zarr")}
    write_receipt(out, Receipt("tile", "1-of-1", "f", slides=(SlideReceipt("a", "done", artifacts=made),)))


def test_a_receipt_that_nothing_can_have_made_is_a_problem(tmp_path, capsys):
    out = tmp_path / "x"
    for content in ("pixels", "other pixels"):  # the second by a run without a manifest: it was killed
        _job(out, content)
        assert verify(out) == 0
        assert ("note: receipts/tile/1-of-1.json" in capsys.readouterr().out) == (content != "pixels")
        if content == "pixels":
            with RunManifest(out, "run"):
                pass
    for _ in range(2):
        with RunManifest(out, "run"):
            pass
    assert verify(out) == 0
    _job(out, "forged pixels", done=False)
    assert verify(out) == 3
    assert "receipts/tile/1-of-1.json: of other content than when the last recorded run ended, and nothing has worked on" in (
        capsys.readouterr().out
    )


def work(out, stage, content):
    """A job of any stage, as both engines end it."""
    made = _write(out / "made" / stage, content)
    run = SimpleNamespace(layout=SimpleNamespace(out=out))
    write_receipts(run, [Planned(stage, "all", "f", {"seed": 1}, {}, ())], Made(whole=(made,)))
    return receipt_path(out, stage, "all")


def forged(out, stage, content, **other):
    """Another artifact, and the receipt that fits it."""
    path = receipt_path(out, stage, "all")
    _write(out / "made" / stage, content)
    made = {f"made/{stage}": content_digest(out / "made" / stage)}
    write_receipt(out, replace(read_receipt(path), artifacts=made, **other))


@pytest.mark.parametrize("stage", ["check", "tile", "pretrain", "extract", "mil", "report"])
def test_a_forged_receipt_is_a_problem_in_every_stage(tmp_path, stage, capsys):
    out, untold = tmp_path / "x", f"  receipts/{stage}/all.json: no event tells of it: altered, or made up\n"
    with RunManifest(out, "run"):
        work(out, stage, "first")
    assert verify(out) == ExitCode.DONE
    forged(out, stage, "forged")
    for _ in range(2):
        assert verify(out) == ExitCode.SOME_FAILED and untold in capsys.readouterr().out
        with RunManifest(out, "run"):  # a run that finds it up to date does not make it true
            pass
    work(out, stage, "second")
    assert verify(out) == ExitCode.DONE
    assert "note: receipts" in capsys.readouterr().out  # its run was killed, or is still going
    with RunManifest(out, "run"):
        pass
    assert verify(out) == audit(out) == ExitCode.DONE
    assert "note" not in capsys.readouterr().out
    forged(out, stage, "first")  # put back, as it was told of once
    assert verify(out) == ExitCode.SOME_FAILED
    assert "ended, and no event tells of such work since" in capsys.readouterr().out
    forged(out, stage, "second", settings={"seed": 2})
    assert verify(out) == ExitCode.SOME_FAILED and untold in capsys.readouterr().out
    forged(out, stage, "second", settings={"seed": 1})
    assert verify(out) == ExitCode.DONE
    write_receipt(out, Receipt("tile", "9-of-9", "f"))
    assert verify(out) == ExitCode.SOME_FAILED
    assert "receipts/tile/9-of-9.json: no event tells of it" in capsys.readouterr().out


def test_receipts_of_an_earlier_version_are_known_by_their_manifest(tmp_path, capsys):
    out = tmp_path / "x"
    study(out)
    with RunManifest(out, "run"):
        work(out, "check", "first")
    assert verify(out) == ExitCode.DONE
    assert "note" not in capsys.readouterr().out
    _write(out / "report/index.html", "another page")
    made = {"report/index.html": content_digest(out / "report/index.html")}
    write_receipt(out, Receipt("report", "all", "f", artifacts=made))
    assert verify(out) == ExitCode.SOME_FAILED


def test_a_kill_between_event_and_receipt_is_mended_by_the_next_job(tmp_path):
    out = tmp_path / "x"
    with RunManifest(out, "run"):
        work(out, "tile", "first")
    code = f"from pathlib import Path; from tests.test_audit_verify import work; work(Path({str(out)!r}), 'mil', 'made')"
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PATHFM_CRASH_AT": "job.told"}, check=False)
    assert killed.returncode == -signal.SIGKILL and (out / "made/mil").is_file()
    assert not receipt_path(out, "mil", "all").exists()
    assert verify(out) == audit(out) == ExitCode.DONE
    work(out, "mil", "made")
    assert verify(out) == audit(out) == ExitCode.DONE


def test_a_card_of_an_export_that_was_altered_and_one_without_hashes(tmp_path, capsys):
    out = tmp_path / "x"
    export(out)
    card = json.loads((out / "card.json").read_text())
    _write(out / "card.json", json.dumps(card | {"mpp": 0.25}))
    assert verify(out) == ExitCode.SOME_FAILED
    assert "  card.json: differs from what was made" in capsys.readouterr().out
    _write(out / "card.json", json.dumps({name: value for name, value in card.items() if name not in {"files", "content"}}))
    _write(out / "README.md", "another")
    assert verify(out) == ExitCode.DONE
    assert "note: card.json has no hashes of the other files" in capsys.readouterr().out


def test_results_that_are_swapped_copied_or_gone(tmp_path, capsys):
    out = tmp_path / "x"
    outbox(out)
    a, b, aside = out / "results/a", out / "results/b", out / "results/.aside"
    for one, other in ((a, aside), (b, a), (aside, b)):
        one.rename(other)
    assert verify(out) == 3
    assert "results/a/result.json: the result called b, copied or moved" in capsys.readouterr().out
    shutil.rmtree(a)
    assert verify(out) == 3
    assert "results: the result of b (bbbbbbbb), which the events tell of, is missing" in capsys.readouterr().out
    shutil.rmtree(out / "results")
    assert verify(out) == 3


def test_results_of_another_outbox_with_their_events(tmp_path, capsys):
    outbox(tmp_path / "x")
    with Events(tmp_path / "y") as events:
        result = _write(tmp_path / "y/results/c/result.json", json.dumps({"files": {}, "name": "c", "identity": "c" * 64}))
        events.write("result_written", stage="batch", slide_id="c", identity="c" * 64, result=_sha(result))
    shutil.copytree(tmp_path / "y/results/c", tmp_path / "x/results/c")
    assert verify(tmp_path / "x") == 3
    assert "results/c/result.json: the events do not tell of it" in capsys.readouterr().out
    shutil.copy(events.path, tmp_path / "x" / f"{events.path.stem}-2.jsonl")
    assert verify(tmp_path / "x") == 3
    assert "the events are of several folders" in capsys.readouterr().out


def test_the_table_of_all_results(tmp_path, capsys):
    out = tmp_path / "x"
    outbox(out)
    index = out / "predictions.csv"
    whole = index.read_text()
    assert whole == "result,slide_id,a,b\na,a,1,\nb,b,,1\n"
    for changed, words in (
        (whole.replace("a,a,1,", "a,a,0,"), "the row of a is not that of its result"),
        (whole + "c,c,1,\n", "the row of c is not"),
        (whole + "b,b,,1\n", "the row of b is not"),
        (whole.replace("b,b,,1\n", ""), "no row of b"),
        (whole.replace("b,b", "b,\0"), "the row of b is not"),
    ):
        index.write_text(changed)
        assert verify(out) == 3
        assert f"  predictions.csv: {words}" in capsys.readouterr().out
    index.unlink()
    with Events(out) as events:
        events.write("run_started", stage="batch")
        assert verify(out) == 0  # killed before the table: the next run makes it
        assert "note: predictions.csv: no row of a" in capsys.readouterr().out
        events.write("run_ended", stage="batch")
    assert verify(out) == 3


def test_strangers_among_results(tmp_path, capsys):
    outbox(tmp_path / "x")
    _write(tmp_path / "x/results/a/more.txt", "x")
    assert verify(tmp_path / "x") == 3
    assert "  results/a/more.txt: does not belong there" in capsys.readouterr().out


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        verify(tmp_path / "nothere")
    with pytest.raises(UsageError, match="nothing here says"):
        verify(tmp_path)


def test_a_clock_that_was_set_back_does_not_bring_later_events_forward():
    first, later, other = {"time": "2030-02"}, {"time": "2030-01"}, {"time": "2030-03"}
    assert _in_order([[other], [first, later]]) == [first, later, other]
