"""A page of pictures with words: what ``pathfm map`` and ``pathfm search`` write. One HTML file that loads nothing."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pathfm import __version__
from pathfm.errors import MissingExtraError
from pathfm.store.commit import commit_file


class Picture(NamedTuple):
    """A picture as data address, words for those who cannot see it, and lines below it."""

    uri: str
    alt: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and pictures: wide ones below each other, or small ones in a grid."""

    heading: str
    text: str
    pictures: Sequence[Picture]
    small: bool = False


@dataclass(frozen=True)
class PicturePage:
    """What the page shows.

    Attributes:
        kicker: what kind of page it is.
        title: its heading.
        facts: short facts, as (name, value).
        notes: what the reader should know first.
        sections: the pictures.
    """

    kicker: str
    title: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def write_picture_page(path: Path, page: PicturePage) -> None:
    """Writes the page, whole or not at all; the same content gives the same bytes. Every text is escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("pages need jinja2", extra="report") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = importlib.resources.files("pathfm.report").joinpath("picture_page.html.j2").read_text(encoding="utf-8")
    html = environment.from_string(text).render(page=page, version=__version__) + "\n"
    with commit_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
