"""The page of a pretraining run: curves, probes, pictures of what the teacher sees, alarms and settings, in one HTML file."""

from __future__ import annotations

import importlib.resources
import statistics
from pathlib import Path

from pathfm import __version__
from pathfm.errors import MissingExtraError
from pathfm.pretrain_settings import PretrainSettings
from pathfm.report.fates import without_folders
from pathfm.report.figures import data_uri
from pathfm.report.page import SettingRow, _setting_rows
from pathfm.report.pretrain_curves import SECTIONS, Run, charts, read_run
from pathfm.store.commit import commit_file


def write_pretrain_page(encoder_dir: Path, out: Path) -> Path:
    """Writes ``out`` (HTML that loads nothing), whole or not at all; the same run gives the same bytes.

    Args:
        encoder_dir: what ``pathfm pretrain`` wrote; the run may be unfinished.
        out: the file.

    Raises:
        StoreError: there is no run, or a table is damaged.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    html = render_pretrain_page(read_run(encoder_dir), encoder_dir.name)
    with commit_file(out) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out


def render_pretrain_page(run: Run, title: str) -> str:
    """The page as HTML. Everything that came from a file is escaped.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("the page of pretraining needs jinja2", extra="report") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["without_folders"] = without_folders
    sections = [(section, drawn) for section in SECTIONS if (drawn := charts(run, section))]
    context = {
        "title": title,
        "preset": run.settings.preset if run.settings else "",
        "alarms": run.alarms,
        "cards": _cards(run),
        "sections": sections,
        "pictures": _pictures(run),
        "settings": _settings_table(run),
        "version": __version__,
    }
    text = importlib.resources.files("pathfm.report").joinpath("pretrain.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(context) + "\n"


def _cards(run: Run) -> list[tuple[str, str, str]]:
    """Headline numbers: label, value, what it means."""
    of = f"of {run.settings.steps:,}" if run.settings else "so far"
    uniform = f"nat; uniform is {run.levels['log K']:.2f}" if run.levels else "nat"
    speeds = [speed for _, speed in run.points("times", "images_per_second")[1:]]
    shares = [share for _, share in run.points("times", "data_wait_share")[1:]]
    waiting = f"median; {statistics.median(shares):.1%} of the time waiting for data" if shares else "median"
    probe = [score for _, score in run.points("looks", "probe_linear")]
    cards = [
        ("Steps", f"{len(run.steps):,}", of),
        ("Loss", _last(run, "steps", "loss", ".4g"), "at the last step"),
        ("Teacher entropy", _last(run, "steps", "teacher_entropy", ".2f"), uniform),
        ("RankMe", _last(run, "looks", "rankme", ".1f"), "directions that the teacher's features fill"),
        ("Linear probe", _last(run, "looks", "probe_linear", ".3f"), f"AUROC on val; best {max(probe):.3f}" if probe else ""),
        ("Images per second", f"{statistics.median(speeds):.3g}" if speeds else "", waiting),
    ]
    return [card for card in cards if card[1]]


def _last(run: Run, table: str, column: str, form: str) -> str:
    points = run.points(table, column)
    return f"{points[-1][1]:{form}}" if points else ""


def _pictures(run: Run) -> list[tuple[str, str]]:
    """Captions and addresses of the newest and the first picture."""
    chosen = list(run.pictures.items())
    shown = chosen[-1:] if len(chosen) < 2 else [chosen[-1], chosen[0]]
    return [(f"Step {step:,}", data_uri(path.read_bytes(), "image/png")) for step, path in shown]


def _settings_table(run: Run) -> tuple[SettingRow, ...]:
    if run.settings is None:
        return ()
    needed = {"teacher": ""} if run.settings.preset == "distill" else {}
    usual = PretrainSettings.model_validate({"preset": run.settings.preset, **needed})
    return tuple(_setting_rows(run.settings, usual, ""))
