"""The page of an external validation: how a locked classifier did on labelled slides that are not its own."""

from __future__ import annotations

from pathlib import Path

from pathfm.errors import UsageError
from pathfm.mil_settings import MilSettings
from pathfm.report.mil_sections import design_items
from pathfm.report.page import render_template, result_context
from pathfm.report.results import read_mil
from pathfm.store.commit import commit_file, read_json


def validation_page(folder: Path, settings: MilSettings | None = None, name: str = "") -> Path:
    """Writes ``index.html`` beside the ``metrics.json`` and the tables that ``pathfm mil predict`` left.

    Nothing is fitted or chosen: the page shows the numbers of the file. The same files give the same bytes.

    Args:
        folder: where the tables are; the page comes beside them.
        settings: of the bundle (``Bundle.settings``): columns of survival times, for Kaplan-Meier curves.
        name: heading of the page; by default it names the label.

    Returns:
        the page.

    Raises:
        UsageError: nobody was judged, because no slide has a label.
        StoreError: a table is damaged.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    path = folder / "metrics.json"
    if not path.is_file() or not read_json(path).get("models"):
        fix = "predict a table with the label column of the classifier"
        raise UsageError("nobody was judged: no slide has a label", where=str(folder), fix=fix)
    result = read_mil(folder)
    context = {
        **result_context(result, settings),
        "title": name or f"External validation of {result.label if result else ''}",
        "design": design_items(result) if result else (),
    }
    html = render_template("mil_validation.html.j2", context)
    with commit_file(folder / "index.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return folder / "index.html"
