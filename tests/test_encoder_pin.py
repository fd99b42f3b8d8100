"""The frozen list of pretraining slides: what makes an encoder stale, and what does not. Training itself is a stand-in here."""

from __future__ import annotations

import datetime
import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm import pretraining
from pathfm.encoder_pin import counted, encoder_digest, encoder_fingerprint, origin_digests, trainable
from pathfm.errors import StoreError, UsageError
from pathfm.models.encoders import check_pinned
from pathfm.pretraining import (
    pretrain_fingerprint,
    pretrain_inputs,
    pretraining_stores,
    reopen_list,
    run_pretraining,
)
from pathfm.retraining_price import retrain_price
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.commit import write_json
from pathfm.store.layout import Layout, tile_spec
from pathfm.store.manifest import file_digest
from pathfm.store.pinned import Pinned, PinnedSlide, pinned_file, read_pinned, write_pinned
from pathfm.store.record import Outcome, StageReport, write_record
from pathfm.store.tile_store import write_tiles
from pathfm.study import Study
from pathfm.tile.stage import tile_settings_digest
from pathfm.workflow import Run

PIXELS = np.zeros((2, 16, 16, 3), dtype=np.uint8)


@dataclass
class Bench:
    """A study whose slides are tile stores only, and whose pretraining writes a card."""

    out: Path
    trained: list[list[str]] = field(default_factory=list)

    def run(self, *slides: str, unreadable: tuple[str, ...] = (), absent: tuple[str, ...] = (), **study: object) -> Run:
        """A run on these slides; ``a2`` is slide a with other tiles; absent: not tiled yet."""
        made = Study.model_validate({"out": self.out, **study})
        layout = Layout(self.out, tile_spec(made.tile, tile_settings_digest(made.tile)))
        ids = [name[0] for name in (*slides, *unreadable, *absent)]
        stores = {}
        for name in slides:
            stores[name[0]] = layout.store(name[0])
            write_tiles(stores[name[0]], PIXELS, slide_id=name[0])
            head = stores[name[0]] / "zarr.json"
            content = json.loads(head.read_text())
            content["attributes"]["pathfm"]["fingerprint"] = planned(name)[0]
            head.write_text(json.dumps(content))
        rows = tuple(SlideRow(name, Path(name), patient_id=f"p{name}", labels={"label": "xy"[ord(name) % 2]}) for name in ids)
        return Run(made, Cohort(rows, ("label",)), layout, stores=stores)

    def pretrain(self, *slides: str, **more: object) -> Run:
        """A run that has pretrained."""
        run = self.run(*slides, **more)  # type: ignore[arg-type]
        run_pretraining(run)
        return run


def planned(name: str) -> tuple[str, str]:
    """The two fingerprints that tiling a slide may give."""
    return f"tiles-{name}", f"assumed-{name}"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    found = Bench(tmp_path / "out")

    def stand_in(study, store_paths, encoder_dir, fingerprint, facts=None, patient_of=None):
        card = encoder_dir / "teacher" / "card.json"
        if card.is_file():
            return StageReport("pretrain")
        found.trained.append([path.stem for path in store_paths])
        write_json(card, {"fingerprint": fingerprint})
        return StageReport("pretrain", worked=1)

    monkeypatch.setattr("pathfm.pretrain.stage.run_pretrain", stand_in)
    monkeypatch.setattr("pathfm.report.pretrain_page.write_pretrain_page", lambda folder, page: page)
    return found


def test_new_slides_leave_the_encoder_as_it_is_and_are_named_in_one_line(bench, capsys):
    first = bench.pretrain("a", "b")
    assert "not in the list" not in capsys.readouterr().out
    second = bench.pretrain("a", "b", "c", "d")
    assert second.encoder == first.encoder and bench.trained == [["a", "b"]]
    assert (
        "2 slides are not in the list that the encoder was pretrained on; --retrain-encoder adds them"
        in capsys.readouterr().out
    )
    assert pretraining_stores(second).keys() == {"a", "b"}


def test_without_a_list_the_fingerprint_is_what_it_always_was(bench):
    """Encoders that were made before there were lists stay current."""
    from pathfm.config import fingerprint
    from pathfm.pretrain import VERSION

    run = bench.run("b", "a")
    stores = {name: planned(name)[0] for name in "ab"}
    old = fingerprint({"version": VERSION, "stores": stores, "facts": {}, "weights": ["", ""]}, run.study.pretrain.decisive())
    assert pretrain_fingerprint(run) == old == encoder_fingerprint(stores, {"c": {"site": "x"}}, run.study.pretrain)


def test_what_an_encoder_folder_says_counts_where_it_looks_at_tiles(tmp_path):
    folder, found = tmp_path / "enc", set()
    folder.mkdir()
    assert encoder_digest(f"local-dir:{folder}") == encoder_digest("timm:x") == encoder_digest(None) == ""
    (folder / "card.json").write_text('{"recipe": {"mean": 1}}')
    for config, weights in (("{}", "w"), ('{"mean": 1}', "w"), ("{}", "v")):
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_text(weights)
        found.add(encoder_digest(f"local-dir:{folder}"))
    (folder / "card.json").write_text('{"recipe": {"mean": 2}, "note": "x"}')
    found.add(encoder_digest(f"local-dir:{folder}"))
    (folder / "card.json").write_text('{"recipe": {"mean": 2}, "note": "y"}')
    found.add(encoder_digest(f"local-dir:{folder}"))
    assert len(found) == 4 and "" not in found

    def digests():
        named = {"preset": "distill", "teacher": f"local-dir:{folder}", "init": f"local-dir:{folder}"}
        return origin_digests(Study.model_validate({"pretrain": named}).pretrain)

    before = digests()
    (folder / "config.json").write_text('{"mean": 2}')
    now = digests()
    assert before[0] == now[0] == file_digest(folder / "model.safetensors") and before[1] != now[1]


def test_a_slide_that_leaves_counts_for_its_encoder_and_not_for_the_next(bench):
    first = bench.pretrain("a", "b", "c")
    assert bench.pretrain("a", "b").encoder == first.encoder
    assert bench.pretrain("a", "b", "d", pretrain={"steps": 7}).encoder != first.encoder
    assert bench.trained == [["a", "b", "c"], ["a", "b"]] and set(read_pinned(bench.out).slides) == {"a", "b"}
    assert bench.pretrain("a", "b", "c", pretrain={"steps": 7}) and len(bench.trained) == 2


def test_a_slide_that_cannot_be_read_any_more_still_has_its_tiles(bench):
    first = bench.pretrain("a", "b")
    run = bench.run("a", unreadable=("b",))
    assert pretrain_fingerprint(run) == pretrain_inputs(first).fingerprint and pretraining_stores(run).keys() == {"a", "b"}


def test_other_tiles_of_a_listed_slide_make_it_stale(bench):
    first = bench.pretrain("a", "b")
    assert bench.pretrain("a", "b2").encoder != first.encoder and bench.trained[1] == ["a", "b"]
    assert bench.pretrain("a", "b").encoder == first.encoder and len(bench.trained) == 2


def test_with_other_tile_settings_the_slides_of_the_list_are_tiled_and_used_again(bench):
    bench.pretrain("a", "b", "c")
    bench.pretrain("a3", "b3", "d3", tile={"tile_px": 64})
    assert bench.trained[1] == ["a", "b"]
    bench.pretrain("a", "b", "c", "d")
    assert bench.trained[2] == ["a", "b"]  # c has left the list meanwhile


def test_facts_by_which_a_listed_slide_was_sampled_count(bench):
    weights = {"pretrain": {"sampling": {"weights": {"label": {"x": 2.0, "y": 1.0}}}}}
    run = bench.pretrain("a", "b", **weights)
    assert read_pinned(bench.out).slides["a"].facts == {"label": "y"}
    again = bench.run("a", "b", "c", **weights)
    assert pretrain_fingerprint(again) == pretrain_fingerprint(run)
    assert pretrain_fingerprint(bench.run("a", **weights)) == pretrain_fingerprint(run)
    rows = tuple(replace(row, labels={"label": "x"}) for row in again.cohort.rows)
    again.cohort = replace(again.cohort, rows=rows)
    assert pretrain_fingerprint(again) != pretrain_fingerprint(run)


def test_retraining_makes_the_list_anew_whatever_process_comes_next(bench):
    first = bench.pretrain("a", "b")
    reopen_list(bench.run("a", "b", "c"))
    run = bench.run("a", "b", "c")
    assert pretraining_stores(run).keys() == {"a", "b", "c"}
    assert bench.pretrain("a", "b", "c").encoder != first.encoder and bench.trained[1] == ["a", "b", "c"]
    reopen_list(run)
    assert bench.pretrain("a", "b", "c") and len(bench.trained) == 2  # nothing has changed: nothing to do


def test_patients_are_not_held_out_for_a_classifier_that_cannot_be_trained(bench):
    run = bench.run(*"abcdefgh", mil={"folds": 2, "seen_in_pretraining": "exclude"})
    rows = tuple(replace(row, split="test" if row.slide_id in "ac" else "train") for row in run.cohort.rows)
    run.cohort = replace(run.cohort, rows=rows)
    for ask in (pretraining_stores, run_pretraining):
        with pytest.raises(UsageError, match="every class needs a patient to test and two others"):
            ask(run)
    assert not bench.trained and read_pinned(bench.out) is None


def test_a_list_from_which_nothing_was_learned_binds_nobody(bench):
    run = bench.run("a", "b")
    write_pinned(bench.out, Pinned(tile_settings_digest(run.study.tile), {"a": PinnedSlide("tiles-a")}))
    assert pretraining_stores(run).keys() == {"a", "b"}
    (bench.out / "encoder" / "e" / "checkpoints" / "step-2").mkdir(parents=True)
    assert pretraining_stores(run).keys() == {"a"}


def test_all_processes_come_to_the_same_before_and_after_the_first_has_written_the_list(bench, monkeypatch):
    bench.pretrain("a", "b", "c")
    run = bench.run("a", "b", "d", pretrain={"steps": 7})
    early = pretrain_inputs(run)
    pretraining._freeze(run, early)
    assert pretrain_inputs(run) == early
    monkeypatch.setenv("RANK", "1")
    before = pinned_file(bench.out).read_bytes()
    reopen_list(run)
    early = pretrain_inputs(run)
    pretraining._freeze(run, early)
    assert pretrain_inputs(run) == early and pinned_file(bench.out).read_bytes() != before


def test_slides_that_are_now_held_out_leave_the_list_and_make_it_stale(bench):
    slides = tuple("abcdefgh")
    first = bench.pretrain(*slides, mil={"folds": 2})
    exclude = {"mil": {"folds": 2, "seen_in_pretraining": "exclude"}}
    held = set(slides) - set(bench.pretrain(*slides, **exclude).cohort and bench.trained[-1])
    assert len(bench.trained) == 2 and held and set(read_pinned(bench.out).held_out) == {f"p{name}" for name in held}
    assert bench.pretrain(*slides, *"mnop", **exclude).encoder != first.encoder and len(bench.trained) == 2
    assert set(pretrain_inputs(bench.run(*slides, *"mnop", **exclude)).newcomers) == set("mnop")


def test_a_list_that_is_damaged_says_so(bench):
    bench.pretrain("a")
    whole = {"format": 1, "tiling": "", "held_out": [], "without_tiles": []}
    for content in ({"format": 9}, {"format": 1}, {**whole, "slides": {"a": {"x": 1}}}):
        pinned_file(bench.out).write_text(json.dumps(content))
        with pytest.raises(StoreError, match=r"pinned.json: .*delete it"):
            pretrain_fingerprint(bench.run("a"))


def test_when_all_of_the_list_are_gone_it_says_what_to_do(bench):
    bench.pretrain("a", "b")
    with pytest.raises(StoreError, match="--retrain-encoder makes a new one"):
        bench.pretrain("c", pretrain={"steps": 7})


FPS = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["1", "2"]))


@settings(max_examples=60)
@given(FPS, FPS, st.sets(st.sampled_from("abcdef")), st.booleans())
def test_the_rules_of_the_list(listed, present, held_out, same_tiling):
    present = {name: store for name, store in present.items() if name not in held_out}
    pinned = Pinned("t", {name: PinnedSlide(store) for name, store in listed.items()})
    kept = counted(pinned, present, "t" if same_tiling else "other", held_out)
    assert not kept.keys() & held_out
    if not listed:
        assert kept == present == trainable(pinned, present) == counted(None, present, "t", held_out)
        return
    wanted = listed.keys() - held_out if same_tiling else listed.keys() & present.keys()
    assert kept.keys() == wanted and all(kept[name] == present.get(name, listed[name]) for name in kept)
    assert trainable(pinned, present) == {name: store for name, store in present.items() if name in listed}


def test_the_price_names_everything_that_is_made_again(bench):
    run = bench.pretrain("a", "b", "c")
    lines = retrain_price(run)
    assert lines[0] == "3 slides instead of 3: 0 new, 0 removed" and "no features yet" in lines[3]
    assert not any("by earlier runs" in line for line in lines)
    (run.encoder / "timing.csv").write_text("step,seconds\n9,3000\n19,4200\n")
    folder = run.layout.features("pretrained", "f" * 8)
    folder.mkdir(parents=True)
    (folder / "a.h5").write_bytes(bytes(2_000_000))
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=30)
    done = (Outcome("a", "done", counts={"tiles": 2}), Outcome("b", "kept", counts={"tiles": 2}))
    write_record(folder, StageReport("extract", done), run.study.extract, started)
    write_record(run.layout.mil, StageReport("mil"), run.study.mil, started)
    lines = retrain_price(bench.run("a", "b", "d", absent=("e",)))
    assert lines[0] == "4 slides instead of 3: 2 new, 1 removed"
    assert lines[1].endswith("steps (about 2.0 h, by earlier runs)")
    assert (
        lines[2]
        == "all features are made again: 3 slides, 6 tiles, and 1 slides that have no tiles yet (about 1.5 h, by earlier runs)"
    )
    assert lines[3].startswith("0.002 GB of features become stale") and "pretrained-ffffffff" in lines[3]
    assert lines[4].endswith("trained again (about 30 min, by earlier runs)")
    with pytest.raises(UsageError, match="uses the encoder timm:x"):
        retrain_price(bench.run("a", extract={"encoder": "timm:x"}))


def test_an_encoder_folder_is_named_by_the_hash_of_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = file_digest(tmp_path / "model.safetensors")
    check_pinned(f"local-dir:{tmp_path}", digest)
    check_pinned(f"local-dir:{tmp_path}", digest.upper())
    with pytest.raises(UsageError, match=f"another one: its weights have the SHA-256 {digest}"):
        check_pinned(f"local-dir:{tmp_path}", "0" * 64)
    for name in ("timm:resnet18", "uni", f"local-dir:{tmp_path}/none"):
        with pytest.raises(UsageError, match="only an encoder in a folder"):
            check_pinned(name, digest)


def test_every_kill_while_the_list_is_written_leaves_the_old_or_the_new_one(bench, monkeypatch):
    bench.pretrain("a", "b")
    before = pinned_file(bench.out).read_bytes()
    reached = itertools.count()

    def killed(name):
        next(reached)
        raise KeyboardInterrupt(name)

    monkeypatch.setattr("pathfm.store.commit.crash_point", killed)
    with pytest.raises(KeyboardInterrupt, match="before_rename"):
        bench.pretrain("a", "b", pretrain={"steps": 7}, tile={"tile_px": 32})
    assert next(reached) and pinned_file(bench.out).read_bytes() == before
