import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm.config import did_you_mean, dump_study, fingerprint, load_study
from pathfm.errors import UsageError
from pathfm.study import MilSettings, PretrainSettings, Study, TileSettings


@pytest.fixture
def study_file(tmp_path):
    def write(text, name="study.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def refusal(path, overrides=()):
    with pytest.raises(UsageError) as caught:
        load_study(path, overrides)
    return str(caught.value)


def test_without_a_file_everything_is_default_and_output_goes_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_study(None) == Study(out=tmp_path / "out")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "tile:\n", "\ufeffname: study\n", "%YAML 1.2\n---\n{}\n"])
def test_an_empty_file_or_table_means_defaults(study_file, text):
    path = study_file(text)
    assert load_study(path) == Study(out=path.parent / "out")


@pytest.mark.parametrize(
    "word", ["off", "no", "on", "yes", "true", "0012", "1.0", "1", "1e3", "12:30", "2024-01-31", "0x1F", "1_0", "nan"]
)
def test_text_settings_keep_what_was_written(study_file, word):
    assert load_study(study_file(f"mil: {{positive: {word}}}")).mil.positive == word
    assert load_study(None, [f"mil.positive={word}"]).mil.positive == word


@pytest.mark.parametrize("word", ["null", "~", "Null", ""])
def test_null_means_not_given_unless_quoted(study_file, word):
    assert load_study(study_file(f"mil:\n  positive: {word}\n")).mil.positive is None
    assert load_study(study_file(f"mil:\n  positive: '{word}'\n")).mil.positive == word


def test_numbers_and_booleans_are_read_where_they_are_wanted(study_file):
    study = load_study(
        study_file("""
            pretrain: {lr: 1e-3, seed: 0012, separate_ibot_head: true, weight_decay: [4e-2, .4]}
            tile: {mpp: 0.25, tissue: {method: off}}
            mil: {controls: false, max_bag_tiles: null}
        """)
    )
    assert (study.pretrain.lr, study.pretrain.seed, study.pretrain.separate_ibot_head) == (1e-3, 12, True)
    assert study.pretrain.weight_decay == (0.04, 0.4)
    assert (study.tile.mpp, study.tile.tissue.method) == (0.25, "off")
    assert (study.mil.controls, study.mil.max_bag_tiles) == (False, None)
    assert load_study(None, ["tile.mpp=native"]).tile.mpp == "native"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("tile:\n  mpp: 1\n  mpp: 2\n", "line 3, column 3", "'mpp' is given twice"),
        ("name: [\n", "line 2", "not valid YAML"),
        ("name: a\n\tout: b\n", "line 2", "not valid YAML"),
        ("name: 'a\n", "line 2", "not valid YAML"),
        ("name: &a [*a]\n", "line 1", "recursive"),
        ("name: !!python/object:os.system x\n", "line 1", "constructor"),
        ("name: !!timestamp x\n", "line 1", "constructor"),
        ("? [a]\n: b\n", "line 1", "must be text"),
        ("name: a\n---\nname: b\n", "line 2", "another document"),
        ("name: a\nout: \x07\n", "line 2", "not text"),
        ('name: "\\UFFFFFFFF"\n', "study.yaml", "not valid YAML"),
        ("[" * 5000, "study.yaml", "not valid YAML"),
        ("- a\n", "study.yaml", "must be a table of settings"),
        ("just text\n", "study.yaml", "must be a table of settings"),
    ],
)
def test_broken_yaml_is_refused_with_its_place_on_one_line(study_file, text, place, words):
    message = refusal(study_file(text))
    assert place in message
    assert words in message
    assert "\n" not in message


def test_unreadable_study_files(tmp_path):
    assert "no such study file" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "cannot be read" in refusal(tmp_path / "latin.yaml")


def test_an_unknown_setting_names_its_table_the_closest_name_and_all_that_exist(study_file):
    message = refusal(study_file("tile:\n  tissue:\n    methd: otsu\n"))
    assert "tile.tissue.methd: unknown setting, did you mean 'method'?" in message
    assert "tile.tissue has: method, min_fraction, min_area_um2" in message
    assert "\n" not in message


def test_a_setting_in_the_wrong_table_is_pointed_to_its_own(study_file):
    assert "did you mean tile.mpp?" in refusal(study_file("mpp: 0.5\n"))
    assert "did you mean pretrain.lr or mil.lr?" in refusal(study_file("tile: {lr: 1}\n"))


def test_all_problems_come_in_one_message(study_file):
    message = refusal(
        study_file("tile: {mpp: -1, tile_pxx: 3}\npretrain: {lr: fast, ema: [0.9]}\ncompute: 4\nmil: {level: room}\n"),
        ["report.heatmap=3", "nonsense", "tile.mpp.x=1"],
    )
    assert "9 problems" in message
    for words in [
        "tile.mpp: must be",
        "tile.tile_pxx: unknown setting, did you mean 'tile_px'?",
        "pretrain.lr: must be a valid number, unable to parse string as a number, got 'fast'",
        "pretrain.ema[1]: ",
        "compute: must be a table of settings (workers, threads, device, ",
        "lease_s), got '4'",
        "mil.level: must be 'patient', 'specimen' or 'slide', got 'room'",
        "report.heatmap: unknown setting, did you mean 'heatmaps'?",
        "--set nonsense: must look like table.setting=value",
        "tile.mpp.x: mpp is not a table",
    ]:
        assert words in message


def test_overrides_win_over_the_file_and_the_last_one_wins(study_file):
    path = study_file("tile: {mpp: 0.25, tile_px: 256}\n")
    study = load_study(
        path, ["tile.mpp=1", "tile.tissue.method=entropy", "tile.mpp=2", "name=a=b", "tile.tissue.min_fraction=0.1"]
    )
    assert (study.tile.mpp, study.tile.tile_px, study.name) == (2.0, 256, "a=b")
    assert (study.tile.tissue.method, study.tile.tissue.min_fraction) == ("entropy", 0.1)


def test_an_override_may_hold_a_list_or_a_table_and_its_syntax_errors_name_it():
    study = load_study(None, ["pretrain.ema=[0.5, 0.9]", "tile.tissue={method: off}"])
    assert (study.pretrain.ema, study.tile.tissue.method) == ((0.5, 0.9), "off")
    assert "--set tile.mpp, line 1" in refusal(None, ["tile.mpp=[1"])


@pytest.mark.parametrize("override", ["", "=", "tile", "=3", "tile.=3", ".mpp=3", "tile..mpp=3"])
def test_an_override_that_is_none_is_refused(override):
    assert "must look like table.setting=value" in refusal(None, [override])


def test_relative_paths_start_at_the_study_file_and_absolute_ones_stay(study_file, tmp_path, monkeypatch):
    path = study_file("out: results\ncohort: {table: t.csv, tile_labels: l.csv, slides: [a/*.svs, /data/b]}\n")
    monkeypatch.chdir(tmp_path.parent)
    study = load_study(Path(tmp_path.name) / path.name)
    assert (study.out, study.cohort.table, study.cohort.tile_labels) == tuple(
        tmp_path / n for n in ("results", "t.csv", "l.csv")
    )
    assert study.cohort.slides == (str(tmp_path / "a/*.svs"), "/data/b")


def test_encoders_and_weights_start_at_the_study_file_and_those_of_overrides_here(study_file, tmp_path, monkeypatch):
    path = study_file("extract: {encoder: uni, weights: w.pth, also: ['local-dir:enc', 'timm:x', 'local-dir:/e']}\n")
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    study = load_study(path).extract
    assert (study.encoder, study.weights) == ("uni", tmp_path / "w.pth")
    assert study.also == (f"local-dir:{tmp_path / 'enc'}", "timm:x", "local-dir:/e")
    typed = ("extract.weights=w.pth", "extract.also=['local-dir:enc', uni]", "extract.encoder=local-dir:enc", "pretrain.init=~")
    study = load_study(path, typed)
    assert study.pretrain.init is None
    assert (study.extract.weights, study.extract.encoder) == (here / "w.pth", f"local-dir:{here / 'enc'}")
    assert study.extract.also == (f"local-dir:{here / 'enc'}", "uni")
    for folder in ("study #2/enc", "st: 2/enc", "a'b"):
        typed = (f"extract.encoder=local-dir:{folder}", f"pretrain.init=local-dir:{folder}")
        study = load_study(path, typed)
        assert study.extract.encoder == study.pretrain.init == f"local-dir:{here / folder}"
    for wrong in ("extract.also=['local-dir:enc', {a: b}]", "extract.encoder={local-dir: enc}"):
        with pytest.raises(UsageError, match="extract"):
            load_study(path, [wrong])


@settings(max_examples=15)
@given(
    name=st.text(),
    positive=st.none() | st.text(),
    slides=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=3),
    lr=st.floats(1e-30, 1e30),
    mpp=st.floats(1e-3, 1e3) | st.just("native"),
    seed=st.integers(0, 2**62),
    flag=st.booleans(),
)
def test_a_dumped_study_loads_as_the_same_study(tmp_path_factory, name, positive, slides, lr, mpp, seed, flag):
    study = Study(
        name=name,
        out=Path("/results"),
        cohort={"slides": [f"/{source}" for source in slides]},
        tile=TileSettings(mpp=mpp),
        pretrain=PretrainSettings(lr=lr, seed=seed),
        mil=MilSettings(positive=positive, controls=flag),
    )
    path = tmp_path_factory.mktemp("dump", numbered=True) / "study.yaml"
    path.write_text(dump_study(study), encoding="utf-8", newline="")
    loaded = load_study(path)
    expected = study.cohort.model_copy(update={"slides": tuple(str(Path(source)) for source in study.cohort.slides)})
    assert loaded == study.model_copy(update={"cohort": expected})


@pytest.mark.parametrize("preset", ["dinov2-path", "dinov3", "distill"])
def test_a_kept_study_leaves_the_choice_of_the_preset_open(tmp_path, preset):
    more = ["pretrain.teacher=timm:vit_tiny_patch16_224"] if preset == "distill" else []
    study = load_study(None, [f"pretrain.preset={preset}", "pretrain.steps=77", "pretrain.crops.hue=0.33", *more])
    (tmp_path / "study.yaml").write_text(dump_study(study, keeps_preset=True))
    kept = load_study(tmp_path / "study.yaml").pretrain
    assert kept == study.pretrain and (kept.steps, kept.crops.hue) == (77, 0.33)
    other = load_study(tmp_path / "study.yaml", ["pretrain.preset=dino", "pretrain.teacher=null"]).pretrain
    fresh = load_study(None, ["pretrain.preset=dino", "pretrain.steps=77", "pretrain.crops.hue=0.33"]).pretrain
    assert other == fresh and other.ibot_weight == 0


def test_a_dump_explains_every_setting():
    lines = dump_study(Study()).splitlines()
    settings = [index for index, line in enumerate(lines) if not line.lstrip().startswith("#")]
    assert all(lines[index - 1].lstrip().startswith("# ") for index in settings)
    assert "  # Side of a tile [px]." in lines


def test_the_closest_name_is_found_whatever_its_case():
    assert did_you_mean("Slide_Id", ["path", "slide_id"]) == ", did you mean 'slide_id'?"
    assert did_you_mean("zzz", ["path"]) == ""


def test_a_fingerprint_depends_on_content_only():
    assert fingerprint(TileSettings()) == fingerprint(TileSettings(mpp=0.5).model_dump())
    assert fingerprint({"a": 1, "b": [1.5, None]}) == fingerprint({"b": (1.5, None), "a": 1})
    assert fingerprint("a", "b") != fingerprint("ab")
    assert fingerprint("a", "b") != fingerprint(["a", "b"])
    assert fingerprint(1) != fingerprint("1")
    # Written down once, so that no artifact on any disk goes stale because the hashing changed.
    assert fingerprint("x", {"a": 0.1}) == "813eec79d3a6b906cb8fe764c321bc2484eb6ee8ac925b89c9f9884cee6f44d8"


def test_every_single_setting_changes_the_fingerprint_of_its_table():
    base = TileSettings()
    others = [{**base.model_dump(), key: "other"} for key in TileSettings.model_fields]
    assert len({fingerprint(table) for table in [base, *others]}) == len(others) + 1


def test_paths_and_other_things_without_content_are_not_fingerprinted():
    for part in [Path("/a"), {"a": [Path("a")]}, Study(), object(), b"bytes", {1: "a"}, {"a"}]:
        with pytest.raises(TypeError):
            fingerprint(part)
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(float("nan"))


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_equal_content_has_equal_fingerprints_in_any_order(value):
    keys = ["b", "a", "c"]
    shuffled = random.Random(0).sample(keys, 3)
    assert fingerprint(dict.fromkeys(keys, value)) == fingerprint(dict.fromkeys(shuffled, value))


def test_the_fingerprint_is_the_same_in_another_process():
    code = "from pathfm.config import fingerprint; from pathfm.study import TileSettings; print(fingerprint(TileSettings()))"
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert output.stdout.strip() == fingerprint(TileSettings())


def test_paths_below_a_folder_with_any_character(tmp_path, monkeypatch):
    """Values are handed on as JSON, which writes a character beyond U+FFFF as two; in YAML these are none."""
    folder = tmp_path / '\U0001f52c #1 \u00e4: "x"'
    folder.mkdir()
    monkeypatch.chdir(folder)
    study = load_study(None, ["out=o", "extract.encoder=local-dir:e", r'mil.label="\ud83d\udd2c"'])
    assert (study.out, study.extract.encoder, study.mil.label) == (folder / "o", f"local-dir:{folder / 'e'}", "\U0001f52c")


def test_what_the_command_line_got_wrong_is_not_blamed_on_the_file(study_file):
    path = study_file("name: x\n")
    for override, said in {"compute.batchsize=3": "compute.batchsize: unknown", "mil.folds=1": "mil.folds: must"}.items():
        assert refusal(path, [override]).startswith(f"--set {said}")
    path = study_file("mil: {level: room}\n")
    message = refusal(path, ["mil.folds=1"])
    assert message.startswith(f"{path}: 2 problems")
    assert "- mil.level: must" in message
    assert "- --set mil.folds: must" in message
