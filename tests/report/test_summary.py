import builtins
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pathfm.errors import MissingExtraError, StoreError
from pathfm.report.fates import flow, slide_fates, without_folders
from pathfm.report.mil_blocks import Scale
from pathfm.report.results import Estimate, read_mil, to_number
from pathfm.report.stage import run_report
from pathfm.report.summary import key_numbers, summarise, warnings
from pathfm.store.commit import read_json
from pathfm.store.record import Outcome, StageReport
from pathfm.study import Study
from tests.report.conftest import MODELS, MakeInputs, cohort, metrics, records, write_mil

DOCS = Path(__file__).parents[2] / "docs" / "report.md"


def test_summary_keys_are_those_of_the_documentation(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    run_report(study, inputs)
    summary = read_json(inputs.report_dir / "summary.json")
    named = re.findall(r"^\| `(\w+)`", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(summary) == sorted(named)
    assert (
        summary["auroc"] == 0.91
        and summary["auroc_low"] == pytest.approx(0.81)
        and summary["auroc_high"] == pytest.approx(0.99)
    )
    assert summary["localisation_auroc"] == 0.88 and summary["localisation_slides"] == 3
    assert (summary["failed"], summary["empty"], summary["no_label"], summary["primary"]) == (1, 1, 1, MODELS[0])
    assert set(summary["controls"]) == set(MODELS[1:])
    assert summary["controls"]["colour histogram"]["auroc"] == 0.78
    assert summary["controls"]["colour histogram"]["localisation_auroc"] is None


def test_key_numbers_are_plain_lines(tmp_path: Path) -> None:
    write_mil(tmp_path / "mil")
    fates = slide_fates(cohort(tmp_path), records(tmp_path), "diagnosis")
    lines = key_numbers(summarise("x", "f", fates, read_mil(tmp_path / "mil")))
    assert lines[0] == "6 slides of 6 patients used, 1 failed, 1 empty, 1 no label"
    assert lines[1] == "AUROC 0.91 (95 % interval 0.81 to 0.99), our encoder"
    assert lines[3] == "localisation AUROC 0.88 (95 % interval 0.80 to 0.94) on 3 slides"
    assert "control tile count: AUROC 0.55 (95 % interval 0.45 to 0.63)" in lines
    assert key_numbers(summarise("x", "f", fates, None))[-1] == "no classifier result"


def transductive(folder: Path) -> Path:
    write_mil(folder)
    content = metrics()
    content["seen_in_pretraining"] = {"rule": "mark", "patients_seen": 3, "share": 0.5, "left_out": 0}
    for name in (MODELS[0], MODELS[4]):
        content["models"][name]["transductive"] = True  # type: ignore[index]
    (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_every_number_that_rests_on_a_seen_encoder_says_transductive(tmp_path: Path) -> None:
    fates = slide_fates(cohort(tmp_path), records(tmp_path), "diagnosis")
    summary = summarise("x", "f", fates, read_mil(transductive(tmp_path / "mil")))
    assert (summary["transductive"], summary["patients_seen"], summary["patients_seen_share"]) == (True, 3, 0.5)
    assert {name for name, control in summary["controls"].items() if control["transductive"]} == {"shuffled labels"}
    said = ", transductive: 50% of patients seen in pretraining"
    lines = [line for line in key_numbers(summary) if line.endswith(said)]
    assert [line.split()[0] for line in lines] == ["AUROC", "balanced", "localisation", "control"]


def test_a_control_that_has_seen_fewer_patients_says_its_own_share(tmp_path: Path) -> None:
    folder = transductive(tmp_path / "mil")
    content = json.loads((folder / "metrics.json").read_text())
    content["models"]["untrained encoder"] |= {"transductive": True, "patients_seen_share": 0.25}
    content["models"]["tile count"] |= {"transductive": False, "patients_seen_share": 0.0}
    (folder / "metrics.json").write_text(json.dumps(content))
    summary = summarise("x", "f", slide_fates(cohort(tmp_path), records(tmp_path), "diagnosis"), read_mil(folder))
    said = {line.partition(": ")[0]: line.partition("transductive: ")[2] for line in key_numbers(summary)}
    assert said["control untrained encoder"] == "25% of patients seen in pretraining"
    assert said["control shuffled labels"] == "50% of patients seen in pretraining"
    assert said["control tile count"] == ""


def test_results_without_a_word_about_pretraining_claim_nothing(tmp_path: Path) -> None:
    write_mil(tmp_path / "mil")
    fates = slide_fates(cohort(tmp_path), records(tmp_path), "diagnosis")
    summary = summarise("x", "f", fates, read_mil(tmp_path / "mil"))
    assert (summary["transductive"], summary["patients_seen"]) == (None, None)


def test_page_and_plots_say_transductive(study: Study, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    (inputs.mil_dir / "heatmaps").rename(inputs.out / "heatmaps")
    (inputs.mil_dir / "metrics.json").unlink()
    run_report(study, replace(inputs, mil_dir=transductive(inputs.out / "other")))
    html = (inputs.report_dir / "index.html").read_text()
    assert html.count("transductive: 50% of patients seen in pretraining") >= 6
    assert html.count("Transductive: 50% of patients seen in pretraining.") == 3  # the plots


def changed(folder: Path, name: str, value: float, low: float, high: float) -> Path:
    write_mil(folder)
    content = metrics()
    content["models"][name]["auroc"] = {"value": value, "low": low, "high": high, "method": "DeLong"}  # type: ignore[index]
    (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("colour histogram", (0.95, 0.9, 0.99), "adds nothing"),
        ("colour histogram", (0.85, 0.8, 0.9), "overlap"),
        ("shuffled labels", (0.7, 0.6, 0.8), "leak"),
    ],
)
def test_warnings_name_what_spoils_the_result(
    tmp_path: Path, name: str, numbers: tuple[float, float, float], words: str
) -> None:
    result = read_mil(changed(tmp_path / "mil", name, *numbers))
    assert result is not None and any(words in warning for warning in warnings(result))


def test_no_warning_when_the_model_stands_apart(tmp_path: Path) -> None:
    folder = changed(tmp_path / "mil", MODELS[0], 0.97, 0.95, 0.99)
    result = read_mil(folder)
    assert result is not None and warnings(result) == ()


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"label": "x"}', encoding="utf-8")
    with pytest.raises(StoreError, match=r"metrics\.json: cannot be understood"):
        read_mil(tmp_path)
    content = metrics() | {"primary": "nobody"}
    (tmp_path / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StoreError, match="nobody"):
        read_mil(tmp_path)
    assert read_mil(tmp_path / "absent") is None


def test_kept_and_done_slides_are_told_alike(tmp_path: Path) -> None:
    first = records(tmp_path)
    second = {
        stage: StageReport(
            stage, tuple(replace(row, status="kept") if row.status == "done" else row for row in report.outcomes)
        )
        for stage, report in first.items()
    }
    assert slide_fates(cohort(tmp_path), first, "diagnosis") == slide_fates(cohort(tmp_path), second, "diagnosis")


def test_flow_adds_up_for_slides_nobody_mentions(tmp_path: Path) -> None:
    partial = {"tile": StageReport("tile", (Outcome("n1", "done"), Outcome("stranger", "failed", "not ours")))}
    counts = flow(slide_fates(cohort(tmp_path), partial, "diagnosis"))
    assert counts[0] == ("in the cohort", 9) and sum(count for _, count in counts[1:]) == 9
    assert counts[-1] == ("used", 1)
    assert flow(slide_fates(cohort(tmp_path), {}, "diagnosis")) == (("in the cohort", 9), ("left out", 9), ("used", 0))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("/data/a b/slide.svs: cannot be read", "a b/slide.svs: cannot be read"),
        ("/data/cohort/slide.svs: cannot be read", "slide.svs: cannot be read"),
        (r"C:\scans\2024\slide.svs is empty", "slide.svs is empty"),
        ("hf-hub:org/name", "hf-hub:org/name"),
        ("3/4 of the tiles, 1 / 2", "3/4 of the tiles, 1 / 2"),
        ("local-dir:/srv/models/teacher", "local-dir:teacher"),
    ],
)
def test_folders_are_cut_from_reasons(text: str, plain: str) -> None:
    assert without_folders(text) == plain


def test_known_paths_with_spaces_are_cut() -> None:
    assert without_folders("/data/a b/slide.svs: no", Path("/data/a b/slide.svs")) == "slide.svs: no"


def test_numbers() -> None:
    assert [to_number(value) for value in ("1.5", 2, "", "nan", None, "x", float("inf"))] == [
        1.5,
        2.0,
        None,
        None,
        None,
        None,
        None,
    ]
    assert Estimate(0.6).overlaps(Estimate(0.7, 0.6, 0.8)) and not Estimate(0.5, 0.4, 0.55).overlaps(Estimate(0.7, 0.6, 0.8))
    assert Scale(0.3).ticks == (0.4, 0.6, 0.8, 1.0) and Scale(0.5).ticks == (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert (Scale(0.5).percent(0.75), Scale(0.5).percent(0.1), Scale(0.5).percent(None)) == ("50.00%", "0.00%", "")


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_missing_extra_has_its_install_line(
    library: str, study: Study, make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, real = make_inputs(), builtins.__import__

    def refuse(name: str, *rest: object, **more: object) -> object:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'pathfm\[report\]'"):
        run_report(study, inputs)
