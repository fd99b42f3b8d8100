"""The drift page: opens offline, escapes what it is given, says what it must, and is the same for the same rows."""

import re

import pytest

from pathfm.report.drift_page import _date_axis, render_drift_page, write_drift_page

HOSTILE = "<script>alert(1)</script> $x$ \"&'"


def reference(**changes):
    number = {"label": "sharpness", "form": ".3g", "range": [80.0, 240.0], "middle": 150.0}
    share = {"label": "share of pen", "form": ".1%", "range": [None, 0.1], "middle": 0.0}
    return {
        "slides": 44,
        "patients": 40,
        "too_few": False,
        "numbers": {"sharpness": number, "pen": share},
        "limit": {"value": 3.0, "expected": 2 / 41},
        "scanners": {"aperio": 40, "rare": None},
        "decisions": {"tumour": 18, "normal": 18, "abstain:uncertain": 4},
        **changes,
    }


def row(number, decision="normal", flagged=False, scanner="aperio"):
    flag = {"name": "sharpness", "value": "20", "training": "80 to 240", "sentence": f"blurrier {HOSTILE} in /home/someone/x"}
    return {
        "slide_id": f"S{number:03d} {HOSTILE}",
        "time": f"2026-01-{1 + number % 28:02d}T21:05:00+00:00",
        "facts": {"scanner": scanner, "tiles": 100, "numbers": {"sharpness": 150.0 + number, "pen": None}},
        "flags": [flag] if flagged else [],
        "decision": decision,
    }


def shifts(*sentences):
    flags = [{"name": "sharpness", "value": "1", "training": "2", "sentence": sentence} for sentence in sentences]
    return {"slides": 50, "tests": 14, "verdict": "They look different." if flags else "No shift is seen.", "flags": flags}


def test_the_page_loads_nothing_runs_nothing_and_believes_nothing(tmp_path):
    rows = [row(number, flagged=number % 9 == 0) for number in range(60)]
    path = write_drift_page(tmp_path / "drift.html", reference(), rows, shifts(HOSTILE))
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html and "alert(1)&lt;/script&gt;" in html and "/home/someone" not in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html) and "default-src 'none'" in html
    assert write_drift_page(tmp_path / "again.html", reference(), rows, shifts(HOSTILE)).read_bytes() == path.read_bytes()


def test_it_says_what_has_shifted_what_chance_does_and_what_a_shift_does_not_mean():
    rows = [row(number, "abstain:uncertain" if number % 2 else "tumour", number > 50) for number in range(60)]
    html = render_drift_page(reference(), rows, shifts("much blurrier"))
    assert "They look different." in html and "<li>much blurrier</li>" in html and 'role="alert"' in html
    assert "about 4.9 % have a flag by chance" in html and "no limit can promise less than 2.4 %" in html
    assert "not decided worse for that alone" in html and "Flags change no decision" in html
    assert "50% (36% to 64%)" in html and "training 10% (3% to 24%)" in html
    assert "none: uncertain" in html and "fewer than 5" in html


@pytest.mark.parametrize("rows", [[], [{"slide_id": "only"}], [row(1, "")]])
def test_few_slides_and_slides_of_which_little_is_known_make_a_page(rows):
    html = render_drift_page(reference(), rows, shifts())
    assert "No shift is seen." in html and 'role="alert"' not in html
    if rows:
        assert html.count("<tr") == 1 + len(rows) + 1 + len({"aperio", "rare"})


def test_where_nothing_was_tested_the_banner_is_neither_good_nor_bad():
    untested = {"slides": 2, "tests": 0, "verdict": "Too few slides to compare yet: 2 of 20.", "flags": []}
    assert '<div class="box open">' in render_drift_page(reference(), [row(1)], untested)
    assert '<div class="box open">' in render_drift_page(reference(too_few=True, numbers={}), [row(1)], shifts())
    assert '<div class="box">' in render_drift_page(reference(), [row(1)], shifts())


def test_slides_of_one_minute_are_told_apart_by_the_second_or_by_their_number():
    from matplotlib.figure import Figure

    for second, ticks in (("07", ["23:09:00", "23:09:07"]), ("00", ["1", "2"])):
        axes = Figure().subplots()
        _date_axis(axes, [{"time": f"2026-01-02T23:09:{each}+00:00"} for each in ("00", second)])
        assert [label.get_text() for label in axes.get_xticklabels()] == ticks


@pytest.mark.parametrize(("days", "ticks"), [((1, 1), ["21:05", "23:45"]), ((1, 2), ["2026-01-01", "2026-01-02"])])
def test_slides_of_one_day_are_told_apart_by_the_time(days, ticks):
    from matplotlib.figure import Figure

    rows = [{"time": f"2026-01-{day:02d}T{time}:00+00:00"} for day, time in zip(days, ("21:05", "23:45"), strict=True)]
    axes = Figure().subplots()
    _date_axis(axes, rows)
    assert [label.get_text() for label in axes.get_xticklabels()] == ticks
    assert axes.get_xlabel() == ("2026-01-01 (UTC)" if days == (1, 1) else "")


def test_a_training_of_too_few_patients_is_said_to_be_one():
    few = reference(too_few=True, numbers={}, slides=0, patients=0, scanners={}, decisions={})
    html = render_drift_page(few, [row(1)], shifts())
    assert "fewer than five patients" in html and "What is watched" not in html


def test_the_newest_slide_comes_first_and_long_batches_are_cut():
    html = render_drift_page(reference(), [row(number) for number in range(400)], shifts())
    assert html.index("S399") < html.index("S398") and "S299" not in html and "100 of 400" in html
