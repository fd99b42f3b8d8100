"""Who is who among the pseudonyms of a night batch."""

from __future__ import annotations

import csv
from pathlib import Path
from tempfile import TemporaryDirectory

from pathfm.batch.results import shown
from pathfm.errors import UsageError
from pathfm.slides.discover import discover
from pathfm.store.pseudonyms import write_pseudonyms


def write_inbox_pseudonyms(inbox: Path, key: Path, out: Path) -> int:
    """Writes who is who: the slides that lie in an inbox, with their pseudonyms, for the key's owner alone (0600).

    Args:
        inbox: of a night batch.
        key: file of the key.
        out: CSV to make.

    Returns:
        number of names.

    Raises:
        UsageError: no slides, no such key, or there is a file already.
    """
    # Two of one name have one pseudonym too, and are not worked on until one of them is renamed.
    slides = {shown(slide.slide_id): slide.path for slide in discover([inbox], namesakes=True).slides}
    if not slides:
        raise UsageError("there are no slides in this folder", where=str(inbox), fix="name the inbox, or a cohort table")
    with TemporaryDirectory() as folder:  # which nobody else can read
        table = Path(folder) / "slides.csv"
        with table.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("slide_id", "path"), *slides.items()])
        return write_pseudonyms(table, key, out)
