import io
import logging
import re
import subprocess
import sys

import pytest

from pathfm import log


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def quiet_again():
    yield
    for handler in [*log.get_log().handlers]:
        log.get_log().removeHandler(handler)
    log.get_log().setLevel(logging.NOTSET)


def test_loggers_are_named_below_pathfm():
    assert [log.get_log(name).name for name in ("", "tile", "pathfm", "pathfm.tile.stage")] == [
        "pathfm",
        "pathfm.tile",
        "pathfm",
        "pathfm.tile.stage",
    ]


def test_results_go_to_stdout_and_status_lines_to_stderr(capsys):
    log.say("report/index.html")
    log.status("slide_01", "done", "1,234 tiles")
    log.status("slide_02", "kept")
    out, err = capsys.readouterr()
    assert out == "report/index.html\n"
    assert err == "done    slide_01  1,234 tiles\nkept    slide_02\n"


def test_the_log_is_shown_once_however_often_it_is_asked_for(capsys, quiet_again):
    log.show_log()
    log.show_log(verbose=True)
    log.get_log("tile").info("a level was skipped")
    err = capsys.readouterr().err
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO pathfm\.tile: a level was skipped\n", err)
    log.show_log(verbose=False)
    log.get_log("tile").info("a level was skipped")
    assert capsys.readouterr().err == ""


def test_quick_work_says_nothing_where_there_is_no_terminal(capsys):
    assert list(log.track(range(5), "tile")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_slow_work_says_how_far_it_is_and_how_long_it_took(capsys, monkeypatch):
    ticks = iter(range(0, 1000, 4))
    monkeypatch.setattr(log.time, "monotonic", lambda: float(next(ticks)))
    assert len(list(log.track(iter("abcdef"), "tile", total=6))) == 6
    assert capsys.readouterr().err == "tile: 3/6 (50 %), 0:00:12 left\ntile: 6/6 (100 %), 0:00:00 left\ntile: 6 in 0:00:28\n"


@pytest.mark.parametrize(
    ("done", "total", "line"),
    [
        (0, 4, "x: 0/4 in 0:01:05"),
        (1, 4, "x: 1/4 (25 %), 0:03:15 left"),
        (7, None, "x: 7 in 0:01:05"),
        (9, 4, "x: 9/4 (225 %), 0:00:00 left"),
    ],
)
def test_progress_lines(done, total, line):
    assert log.progress_line("x", done, total, 65.0) == line


def test_clock_counts_hours():
    assert [log.clock(seconds) for seconds in (0, 59.6, 3725, 100_000)] == ["0:00:00", "0:01:00", "1:02:05", "27:46:40"]


def test_a_terminal_sees_a_bar_with_status_lines_above_it_and_inner_loops_stay_plain(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    seen = []
    for item in log.track([1, 2], "outer [tile]"):
        log.status(f"slide_{item}", "done", "[bold]")
        seen += [item, *log.track("ab", "inner")]
    assert seen == [1, "a", "b", 2, "a", "b"]
    assert "outer [tile]" in screen.getvalue()
    assert "done    slide_2  [bold]" in screen.getvalue()
    assert "inner" not in screen.getvalue()


def test_a_loop_that_is_left_early_gives_the_terminal_back(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    items = log.track([1, 2], "outer")
    assert next(items) == 1
    items.close()
    assert log._live == []


def test_importing_the_log_does_not_import_rich():
    code = "import sys, pathfm.log; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_what_is_quiet_goes_to_the_log_alone(capsys, caplog):
    with caplog.at_level(logging.INFO, "pathfm"), log.quiet():
        log.say("many words")
        log.status("a", "failed", "again")
        assert list(log.track([1, 2], "tile")) == [1, 2]
    assert capsys.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records] == ["many words", "failed  a  again"]
    log.say(log.plural(1, "slide") + " of " + log.plural(1200, "slide"))
    assert capsys.readouterr().out == "1 slide of 1,200 slides\n"
