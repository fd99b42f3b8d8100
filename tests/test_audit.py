"""Who tampers with the records of a study is found, whatever was done; kills and full disks are no alarm."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm import run_manifest
from pathfm.audit import audit, read_chain
from pathfm.chain import ID_FILE, KEY_FILE, Head, new_key, parse_sealed, read_key, seal
from pathfm.config import load_study
from pathfm.errors import ExitCode, PreemptedError, StoreError, UsageError
from pathfm.events import Events
from pathfm.run_manifest import OPERATOR, RunManifest, manifest_files, manifest_text
from tests.flows.tile_runs import tile, write_slides


@pytest.fixture
def key(tmp_path, monkeypatch):
    """The key of a study's owner, in the environment."""
    new_key(tmp_path / "key")
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    return tmp_path / "key"


def run_once(out):
    """A run with two stages, each with its own five events, and the run's manifest."""
    with RunManifest(out, "run"):
        for stage in ("tile", "extract"):
            with Events(out / stage) as events:
                kinds = ("run_started", "slide_started", "slide_done", "progress", "run_ended")
                _ = [events.write(kind, stage=stage) for kind in kinds]


@dataclass
class Audited:
    code: ExitCode
    told: str

    @property
    def findings(self) -> list[str]:
        return [line for line in self.told.splitlines() if line.partition(":")[0].endswith(("l", "json", "runs"))]


@pytest.fixture
def audited(tmp_path, capsys):
    def look(*keys, head=""):
        capsys.readouterr()
        code = audit(tmp_path / "out", keys, head)
        told = Audited(code, capsys.readouterr().out)
        assert (code == ExitCode.SOME_FAILED) == ("audit: nothing was found" not in told.told)
        return told

    return look


@pytest.fixture
def out(tmp_path, key):
    for _ in range(3):
        run_once(tmp_path / "out")
    return tmp_path / "out"


def chain_of(folder):
    (path,) = folder.glob("events-*.jsonl")
    return path


def rewrite(path, change):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


def resealed(lines, key):
    """All lines anew, as a program would write them that has this key, or none."""
    last, made = Head(), []
    for line in lines:
        said = json.loads(line)
        content = {name: value for name, value in said.items() if name not in {"sequence", "previous", "key", "mac"}}
        new, last = seal(content, last, key)
        made.append(new + b"\n")
    return made


def test_what_was_not_touched_is_clean(out, audited):
    found = audited()
    assert found.code == 0, found.told
    assert "33 lines in 3 chains, 3 recorded runs, 0 torn lines recovered" in found.told
    assert "no key was given" not in found.told
    assert (f"head: {_sha(manifest_files(out)[-1])}") in found.told


def _sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


LINES = {
    "altered": (
        lambda lines: [*lines[:2], lines[2].replace(b"slide_done", b"slide_gone"), *lines[3:]],
        ":3: altered: its MAC is wrong",
    ),
    "dropped": (lambda lines: [*lines[:2], *lines[3:]], ":3: 1 line is missing before this one"),
    "dropped first": (lambda lines: lines[1:], ":1: 1 line is missing before this one"),
    "swapped": (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], ":4: out of order"),
    "copied": (lambda lines: [*lines[:4], lines[2], *lines[4:]], ":5: out of order"),
    "inserted": (lambda lines: [*lines[:4], b'{"kind": "slide_done"}\n', *lines[4:]], ":5: no line of the chain"),
    "cut off": (lambda lines: lines[:-1], "cut off behind line 14 of 15 (head kept in runs/"),
    "cut off and torn": (lambda lines: [*lines[:-1], lines[-1][:50]], "cut off behind line 14 of 15 (head kept in runs/"),
    "emptied": (lambda lines: [], "cut off behind line 0 of 15"),
    "recomputed without a key": (lambda lines: resealed(lines, None), "proved by no key"),
}


@pytest.mark.parametrize("attack", LINES)
def test_attacks_on_lines(out, audited, attack):
    change, wanted = LINES[attack]
    rewrite(chain_of(out / "tile"), change)
    found = audited()
    assert found.code == 3
    assert wanted in found.told
    assert all(line.startswith("tile/events-") for line in found.findings)


def test_what_can_be_found_without_the_key(out, audited, monkeypatch):
    monkeypatch.delenv(KEY_FILE)
    assert "whoever writes a whole log anew is not" in audited().told
    path, whole = chain_of(out / "tile"), chain_of(out / "tile").read_bytes()
    for attack, (change, _) in LINES.items():
        rewrite(path, change)
        assert audited().code == 3, attack
        path.write_bytes(whole)
    assert audited().code == 0


def test_a_log_recomputed_with_another_key(out, audited, tmp_path):
    other = new_key(tmp_path / "other")
    rewrite(chain_of(out / "tile"), lambda lines: resealed(lines, other))
    assert f"written with the key {other.id}, which is not given" in audited().told
    # Even if that key counts, the heads of the manifests tell.
    assert "line 15 of the chain is another one than when the run ended" in audited(tmp_path / "other").told


def test_everything_recomputed_without_the_key(out, audited, monkeypatch):
    """Chains and manifests that fit each other perfectly: who expects a key finds that there is none."""
    shutil.rmtree(out)
    monkeypatch.delenv(KEY_FILE)
    for _ in range(3):
        run_once(out)
    assert audited().code == 0
    found = audited(out.parent / "key")
    assert found.code == 3
    assert found.told.count("are proved by no key") == 4
    assert found.told.splitlines()[-1] == "audit: 4 findings (33 lines proved by no key)"


def test_a_tail_that_was_cut_off_and_written_anew_without_the_key(out, audited):
    def anew(lines):
        last = parse_sealed(lines[9].rstrip(b"\n")).head
        for number in range(5):
            line, last = seal({"kind": "slide_done", "slide_id": f"t{number}"}, last, None)
            lines[10 + number] = line + b"\n"
        return lines

    rewrite(chain_of(out / "tile"), anew)
    found = audited()
    assert "no key from here on, though the lines before have one" in found.told
    assert "line 15 of the chain is another one" in found.told
    assert re.search(r"^audit: \d+ findings \(\d+ altered, \d+ lines? proved by no key\)$", found.told, re.MULTILINE)


def test_a_run_without_the_key_is_a_finding(out, audited, monkeypatch, key):
    monkeypatch.delenv(KEY_FILE)
    run_once(out)
    found = audited(key)
    assert found.told.count("no key from here on, though the lines before have one") == 3
    assert found.told.count("no key from here on, though the manifests before have one") == 1


def test_a_key_that_comes_later_proves_what_is_there_from_then_on(tmp_path, audited, monkeypatch):
    run_once(tmp_path / "out")
    run_once(tmp_path / "out")
    new_key(tmp_path / "key")
    assert audited(tmp_path / "key").code == 3
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    with RunManifest(tmp_path / "out", "run"):
        pass  # nothing was done, and the manifest pins all chains
    assert audited().code == 0, audited().told
    rewrite(chain_of(tmp_path / "out" / "tile"), lambda lines: resealed(lines[:3] + lines[4:], None))
    assert "cut off behind line 9 of 10" in audited().told


def test_files_of_earlier_versions_are_no_finding_once_a_manifest_knows_them(out, audited):
    old = out / "events-old-0.jsonl"
    old.write_text('{"kind": "run_started"}\n')
    assert f"{old.name}: 1 line without a chain" in audited().told
    run_once(out)
    found = audited()
    assert found.code == 0, found.told
    assert "1 line from before the chain" in found.told


def test_keys_may_change(out, audited, monkeypatch, tmp_path, key):
    new_key(tmp_path / "new")
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "new"))
    run_once(out)
    assert "which is not given: not ours, or an older one" in audited().told
    found = audited(key)
    assert found.code == 0
    assert f"key {read_key(key).id}: 33 lines" in found.told
    assert f"key {read_key(tmp_path / 'new').id}: 11 lines" in found.told


def test_a_chain_that_was_removed(out, audited):
    path = chain_of(out / "extract")
    path.unlink()
    assert f"extract/{path.name} was removed (head kept in runs/" in audited().told


def test_manifests_that_were_altered_or_removed(out, audited):
    first, second, last = manifest_files(out)
    for path in (first, second, last):
        whole = path.read_bytes()
        said = json.loads(whole)
        for changed, wanted in (
            (manifest_text(said | {"exit_code": 3}).encode(), "altered: its MAC is wrong"),
            (manifest_text(said | {"key": None, "mac": None, "exit_code": 3}).encode(), "altered since it was written"),
            (whole + b" ", "altered: not as manifests are written"),
            (whole[:100], "altered: not as manifests are written"),
        ):
            path.write_bytes(changed)
            assert f"runs/{path.name}: {wanted}" in audited().told
        path.unlink()
        assert f"the manifest runs/{path.name} was removed" in audited().told
        path.write_bytes(whole)
        assert audited().code == 0
    shutil.rmtree(out / "runs")
    assert audited().told.count("was removed") == 3
    chain_of(out).unlink()
    assert audited().code == 0  # what only a head that is kept elsewhere can tell
    assert audited(head="abc").code == 3


def test_a_head_that_is_kept_elsewhere_proves_the_end(out, audited):
    head = _sha(manifest_files(out)[-1])
    assert audited(head=head).code == 0
    run_once(out)
    assert audited(head=head).code == 0
    for path in manifest_files(out)[2:]:
        path.unlink()
    rewrite(chain_of(out), lambda lines: lines[:2])
    for stage in ("tile", "extract"):
        rewrite(chain_of(out / stage), lambda lines: lines[:10])
    assert audited().code == 0
    assert f"no manifest or line has the hash {head}" in audited(head=head).told


def test_torn_lines_and_runs_that_were_killed_are_told_but_no_alarm(out, audited):
    with Events(out / "tile") as events:
        events.write("run_started", stage="tile")
    path = chain_of(out / "tile")
    with path.open("ab") as file:
        file.write(b'{"time": "2025')
    found = audited()
    assert found.code == 0
    assert "1 torn last line that the next run will close, 1 run that never ended" in found.told
    run_once(out)
    found = audited()
    assert found.code == 0, found.told
    assert "1 torn line recovered" in found.told
    assert json.loads(manifest_files(out)[-1].read_text())["unended_runs"] == 1
    # The torn bytes are proved as well.
    path.write_bytes(path.read_bytes().replace(b'{"time": "2025{', b'{"time": "2026{').replace(b'"2025\n', b'"2026\n'))
    assert "no line of the chain" in audited().told


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_runs_that_never_ended_are_found_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(run_manifest, "_BLOCK", block)
    lines = [b'{"kind": "run_%s", "run": "%d"}' % kind for n in range(9) for kind in ((b"started", n), (b"ended", n))]
    lines[3:4] = [b'{"kind": "slide_done", "run": "1"}', b'{"kind": "run_ended", "run"', b""]  # the second never ended
    (tmp_path / "events-a.jsonl").write_bytes(b"\n".join(lines))
    assert run_manifest.unended_runs(tmp_path) == {"1"}
    (tmp_path / "events-a.jsonl").write_bytes(b"\n".join(lines[:-1]) + b"\n")
    assert run_manifest.unended_runs(tmp_path) == {"1", "8"}


def test_a_recovered_line_cannot_be_made_up_without_the_key(out, audited):
    path = chain_of(out / "tile")

    def hide(lines):
        spoilt, last = lines[8].replace(b"s", b"t"), Head(8, json.loads(lines[8])["previous"])
        about = {"bytes": len(spoilt), "sha256": hashlib.sha256(spoilt).hexdigest()}
        line, _ = seal({"kind": "recovered", **about}, last, None)
        return [*lines[:8], b"x" + spoilt, line + b"\n", *lines[9:]]

    rewrite(path, hide)
    assert "no key from here on" in audited().told


def test_there_must_be_something_to_audit(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        audit(tmp_path / "nothere")
    with pytest.raises(UsageError, match="there are no events"):
        audit(tmp_path)


def test_results_of_a_batch_keep_heads_too(tmp_path, key, audited):
    with Events(tmp_path / "out") as events:
        events.write("slide_done", slide_id="a")
        result = tmp_path / "out" / "results" / "a" / "result.json"
        result.parent.mkdir(parents=True)
        result.write_text(json.dumps({"events": events.head, "files": {}}))
        events.write("slide_done", slide_id="b")
    assert audited().code == 0
    rewrite(events.path, lambda lines: lines[:0])
    assert "results/a/result.json" in audited().told


def test_a_chain_that_was_copied_from_another_folder(out, audited):
    run_once(out.parent / "other")
    source, target = chain_of(out.parent / "other" / "tile"), chain_of(out / "tile")
    copied = target.with_name(f"{target.stem}-2.jsonl")
    shutil.copy(source, copied)
    found = audited()
    assert f"tile/{copied.name}: of the folder " in found.told and "copied from elsewhere" in found.told
    (out / "tile" / ID_FILE).unlink()
    assert audited().code == 3
    copied.unlink()
    assert audited().code == 0
    # A folder of its own is no stranger: stages of a study have theirs.
    assert len({json.loads(chain_of(place).read_text().partition("\n")[0])["folder_id"] for place in (out, out / "tile")}) == 2


def test_lines_from_before_there_were_ids_stay_readable(tmp_path, key, audited):
    run_once(tmp_path / "out")
    for path in (tmp_path / "out").rglob("events-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        old = [json.dumps({name: value for name, value in line.items() if name != "folder_id"}) for line in lines]
        path.write_bytes(b"".join(resealed(old, read_key(key))))
    shutil.rmtree(tmp_path / "out" / "runs")
    chain_of(tmp_path / "out").unlink()
    for path in (tmp_path / "out").rglob(ID_FILE):
        path.unlink()
    assert audited().code == 0
    run_once(tmp_path / "out")
    assert audited().code == 0, audited().told


def test_writers_in_several_processes_and_a_manifest(tmp_path, key, audited):
    code = (
        "import sys; from pathlib import Path; from pathfm.events import Events\n"
        "with Events(Path(sys.argv[1])) as events:\n    print('ready', flush=True); input()\n"
        "    for n in range(50): events.write('slide_done', slide_id=str(n))"
    )
    with RunManifest(tmp_path / "out", "run"):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], **pipes) for _ in range(2)]
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
        assert [writer.communicate("\n") and writer.returncode for writer in writers] == [0, 0]
    said = json.loads(manifest_files(tmp_path / "out")[0].read_text())
    assert [head["sequence"] for head in said["chains"]] == [50, 50]
    found = audited()
    assert found.code == 0
    assert "101 lines in 2 chains" in found.told


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A keyed study with one manifest; the chain that is tampered with, as lines."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FILE, str(folder / "key"))
        new_key(folder / "key")
        run_once(folder / "out")
    path = chain_of(folder / "out" / "tile")
    return folder, path, path.read_bytes().splitlines(keepends=True)


@settings(max_examples=150)
@given(data=st.data())
def test_any_change_of_a_chain_is_found(kept, data):
    folder, path, lines = kept
    whole = b"".join(lines)
    kind = data.draw(st.sampled_from(["byte", "order", "removal"]))
    if kind == "byte":
        place = data.draw(st.integers(0, len(whole) - 1))
        value = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
        changed = whole[:place] + bytes([value]) + whole[place + 1 :]
    elif kind == "order":
        changed = b"".join(data.draw(st.permutations(lines)))
    else:
        gone = data.draw(st.sets(st.integers(0, len(lines) - 1), min_size=1))
        changed = b"".join(line for number, line in enumerate(lines) if number not in gone)
    path.write_bytes(changed)
    try:
        assert audit(folder / "out", [folder / "key"]) == (0 if changed == whole else 3)
    finally:
        path.write_bytes(whole)


@settings(max_examples=40)
@given(data=st.data())
def test_any_byte_of_a_manifest(kept, data):
    folder, _, _ = kept
    (path,) = manifest_files(folder / "out")
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    try:
        assert audit(folder / "out", [folder / "key"]) == 3
    finally:
        path.write_bytes(whole)


def test_a_long_log_is_read_to_its_end_and_from_it(tmp_path, key):
    """Over the size of the blocks in which the end is looked for."""
    with Events(tmp_path) as events:
        for number in range(30):
            events.write("slide_failed", slide_id=str(number), reason="x" * 9000)
        events.write("slide_failed", slide_id="long", reason="x" * 200_000)
    with events.path.open("ab") as file:
        file.write(b"y" * 150_000)
    with Events(tmp_path) as events:
        events.write("progress", done=1)
    findings = []
    chain = read_chain(events.path, {read_key(key).id: read_key(key)}, findings)
    assert (findings, chain.recovered, chain.last.sequence) == ([], 1, 33)


def test_a_manifest_says_who_where_when_and_what(tmp_path, monkeypatch, key):
    table = tmp_path / "Doe Jane" / "cohort.csv"
    table.parent.mkdir()
    table.write_text("slide_id,path\n")
    out = tmp_path / "out"
    study = load_study(None, [f"cohort.table={table}", f"out={out}", "tile.mpp=0.25"])
    with RunManifest(out, "run", study) as manifest:
        (out / "made").mkdir(parents=True)
        (out / "made" / "file").write_text("x")
        manifest.inputs({"s1": "abc"})
        manifest.models({"encoder": "def"})
        manifest.outputs(out / "made")
        manifest.exit_code = ExitCode.SOME_FAILED
    (path,) = manifest_files(out)
    said = json.loads(path.read_text())
    assert (said["command"], said["exit_code"], said["reason"], said["sequence"]) == ("run", 3, "", 1)
    assert said["inputs"] == {"cohort.table": _sha(table), "s1": "abc"}
    assert (said["models"], list(said["outputs"])) == ({"encoder": "def"}, ["made"])
    assert (said["settings"]["tile"]["mpp"], said["settings"]["cohort"]["table"]) == (0.25, "cohort.csv")
    assert said["versions"]["numpy"]
    assert said["operator"].startswith("login ")
    assert said["host"]
    assert not [word for word in ("Doe", str(tmp_path)) if word in path.read_text()]
    other = load_study(None, [f"cohort.table={table}", f"out={out}", "tile.mpp=0.25", "compute.workers=3"])
    monkeypatch.setenv(OPERATOR, "night batch")
    with RunManifest(out, "run", other):
        pass
    again = json.loads(manifest_files(out)[-1].read_text())
    assert (again["operator"], again["sequence"], again["fingerprint"]) == ("night batch", 2, said["fingerprint"])


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (StoreError("no room", where="/data/jane", fix="look at /data/jane/x"), 3, "no room (look at x)"),
        (PreemptedError("stopped"), 75, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("jane"), 1, "internal error: ZeroDivisionError"),
        (SystemExit(3), 3, ""),
    ],
)
def test_a_run_that_fails_has_a_manifest(tmp_path, error, code, reason):
    with pytest.raises(type(error)), RunManifest(tmp_path / "out", "run"):
        raise error
    (path,) = manifest_files(tmp_path / "out")
    said = json.loads(path.read_text())
    assert (said["exit_code"], said["reason"]) == (code, reason)


def test_a_refused_command_leaves_nothing_but_one_that_has_begun_does(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(UsageError), RunManifest(out, "run"):
            raise UsageError("no slides")
        assert not list(tmp_path.rglob("*.json*"))
        out.mkdir(exist_ok=True)
    with pytest.raises(UsageError), RunManifest(out, "run"), Events(out / "tiles") as events:
        events.write("run_started", stage="tile")
        raise UsageError("no labels")
    assert json.loads(manifest_files(out)[0].read_text())["exit_code"] == 2


def test_manifests_keep_their_order_when_the_clock_is_set_back(tmp_path):
    for _ in range(2):
        run_once(tmp_path / "out")
    path = manifest_files(tmp_path / "out")[-1]
    later = path.with_name("29990101T000000.000000Z-0.json")
    path.rename(later)
    run_once(tmp_path / "out")
    assert manifest_files(tmp_path / "out")[-2] == later
    assert json.loads(manifest_files(tmp_path / "out")[-1].read_text())["sequence"] == 3


@pytest.mark.long
def test_a_run_that_is_killed_at_its_work_leaves_no_alarm(tmp_path, key, audited):
    slides, out = write_slides(tmp_path / "slides", 3, 512), tmp_path / "out"
    for point in ("lease.taken:2", "store.commit.before_rename:2", "lease.before_release:2"):
        code, _, err = tile(slides, out, crash_at=point)
        assert code in {-9, 3}, err  # the run itself, or one of its workers
        assert audited().code == 0, audited().told
    code, _, err = tile(slides, out)
    assert code == 0, err
    found = audited()
    assert found.code == 0
    assert "that never ended" in found.told
    rewrite(chain_of(out / "tiles" / next((out / "tiles").iterdir()).name), lambda lines: lines[:4] + lines[5:])
    assert audited().code == 3
