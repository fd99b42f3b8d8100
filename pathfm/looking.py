"""Looking at features: ``pathfm map`` draws a cohort's tiles and slides, ``pathfm search`` finds tiles like a given one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import ExitCode, MissingExtraError, StoreError, UsageError
from pathfm.extraction import read_tile
from pathfm.log import say, status, track
from pathfm.report import feature_map as drawing
from pathfm.report.feature_points import SAMPLE_TILES, SLIDE, FeaturePoints, columns, read_points
from pathfm.report.figures import data_uri
from pathfm.report.gallery import picture_uri
from pathfm.report.picture_page import Picture, PicturePage, Section, write_picture_page
from pathfm.report.search_page import Found, caption, write_search_page, write_table
from pathfm.report.tile_looks import TileLooks
from pathfm.stats.feature_health import usable_rows
from pathfm.stats.neighbours import Hit, SlideRows, nearest_tiles, tile_at
from pathfm.stats.projection import as_colours, colour_limits, explained_share, principal_components, umap_2d, unit_rows
from pathfm.stats.row_sample import RowSample, row_blocks
from pathfm.store.cohort import SlideRow
from pathfm.store.commit import commit_file, read_json
from pathfm.store.feature_file import FeatureFile, open_features
from pathfm.store.record import record_file
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import Study
from pathfm.tile.pictures import contact_sheet, png_bytes, sample_evenly
from pathfm.workflow import Run, begin

Pixels = NDArray[np.uint8]

PICTURES = 24
"""Slides that are drawn in the colours of their components when none are named."""
PAGE_PX = 1200
"""Longer side of a picture on the page [px]."""
ATLAS, ATLAS_PX = (14, 20), 64
"""Rows and columns of the grid of tiles laid over a map, and the side of its cells [px]."""
SHEET_COLUMNS, NAMED_SLIDES = 5, 10
SEARCHED = {"none": "all slides", "slide": "other slides than its own", "patient": "slides of other patients"}
BAD_POINT = "name it as SLIDE:x,y in level-0 pixels, or as SLIDE:NUMBER"


@dataclass(frozen=True)
class MapOptions:
    """What ``pathfm map`` draws.

    Attributes:
        features: folder name of the features, where a study has several; empty: those of its encoder.
        by: columns of the cohort table that points are coloured by; empty: all that fit.
        slides: slides drawn in the colours of their components; empty: up to ``PICTURES``, spread over the cohort.
        fit: components of these pictures are fitted on the cohort (colours mean the same in all) or on each slide.
        umap: whether UMAP is tried.
        out: output folder; None: ``map/<features>`` of the study.
    """

    features: str = ""
    by: tuple[str, ...] = ()
    slides: tuple[str, ...] = ()
    fit: Literal["cohort", "slide"] = "cohort"
    umap: bool = True
    out: Path | None = None


@dataclass(frozen=True)
class SearchOptions:
    """How ``pathfm search`` looks.

    Attributes:
        count: tiles to find.
        other: leave out the query's own slide, or all slides of its patient.
        features: as in ``MapOptions``.
        out: output folder; None: ``search/<features>/<slide>-<tile>`` of the study.
    """

    count: int = 24
    other: Literal["none", "slide", "patient"] = "none"
    features: str = ""
    out: Path | None = None


def find_features(run: Run, wanted: str = "") -> Path:
    """The folder of feature files of a study's encoder, told by its name and, of several, by the settings it was made with.

    Raises:
        UsageError: there is none, or there are several and nothing tells which; lists what there is.
    """
    home = run.layout.features("x", "x").parent
    there = sorted(folder.name for folder in home.glob("*") if any(folder.glob("*.h5")))
    if wanted:
        start = run.layout.features(wanted, "").name  # as the encoder is called, not as its folder
        found = [name for name in there if name == wanted] or [name for name in there if name.startswith((wanted, start))]
    else:
        scheme, _, rest = run.study.extract.encoder.partition(":")
        label = f"{scheme}:{Path(rest).name}" if scheme == "local-dir" else run.study.extract.encoder
        start = run.layout.features(label, "").name
        found = [name for name in there if re.fullmatch(f"{re.escape(start)}[0-9a-f]{{8}}", name)]
        settings = run.study.extract.model_dump(mode="json")
        found = [name for name in found if len(found) == 1 or _made_with(home / name) == settings] or found
    if len(found) == 1:
        return home / found[0]
    what = "several features fit" if found else "no features of this encoder"
    fix = f"name one by --features: {', '.join(found or there)}" if there else "run `pathfm extract` first"
    raise UsageError(what, where=wanted or run.study.extract.encoder, fix=fix)


def _made_with(folder: Path) -> object:
    record = record_file(folder)
    return read_json(record).get("settings") if record.is_file() else None


def feature_map(study: Study, options: MapOptions) -> ExitCode:
    """``pathfm map``: maps of tiles and slides as PNG files, slides in the colours of their components, and one page.

    Raises:
        UsageError: no such features, column or slide.
        StoreError: no slide has usable features.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    run = begin(study)
    folder = find_features(run, options.features)
    out = options.out or run.layout.out / "map" / folder.name
    points = read_points(folder, [row.slide_id for row in run.cohort.rows])
    unknown = sorted(set(options.slides) - set(points.slide_ids))
    if unknown:
        raise UsageError(f"no features of slide {unknown[0]!r}", where="--slides", fix="name slides of the cohort")
    values, notes = columns(run.cohort, points.slide_ids, study.mil.label, options.by)
    if points.left_out:
        named = [f"{slide_id} ({why})" for slide_id, why in points.left_out.items()]
        rest = f" and {len(named) - NAMED_SLIDES} more" if len(named) > NAMED_SLIDES else ""
        notes.append(f"Without features: {', '.join(named[:NAMED_SLIDES])}{rest}.")
    maps, missing = _maps(points, options.umap)
    looks = TileLooks(run.layout.tiles, folder, partial(read_tile, run))
    sections = [_map_section(out, points, drawn, values) for drawn in maps]
    atlases = [_atlas(out, points, drawn, looks) for drawn in maps if drawn.what == "tiles"]
    sections.append(Section("Which tiles lie where", "The tile nearest to the centre of each cell.", [a for a in atlases if a]))
    sections.append(_component_section(out, run, folder, points, options))
    facts = [("features", folder.name), ("drawn", points.sample_words), ("scaled", "every feature vector to length one")]
    page = PicturePage("map of features", study.name, facts, [*notes, *missing], [part for part in sections if part.pictures])
    write_picture_page(out / "index.html", page)
    for note in [*notes, *missing]:
        say(f"note: {note}")
    say(f"map: {points.sample_words} in {out / 'index.html'}")
    return ExitCode.DONE


def _maps(points: FeaturePoints, umap: bool) -> tuple[list[drawing.ScatterMap], list[str]]:
    """Maps of tiles and of slides, and notes on what could not be drawn."""
    components, notes = points.components, []
    tiles_N2 = components.project(points.sample_ND)[:, :2]
    maps = [drawing.ScatterMap("tiles", "PCA", tiles_N2, drawing.component_axes(components.share_K))]
    if umap:
        try:
            found = umap_2d(points.sample_ND)
            maps += [] if found is None else [drawing.ScatterMap("tiles", "UMAP", found, ("UMAP 1", "UMAP 2"))]
        except MissingExtraError as error:
            notes.append(f"No UMAP map: {error.reason}.")
    if len(points.slide_ids) > 2:
        of_slides = principal_components(points.mean_SD, 2)
        axes = drawing.component_axes(of_slides.share_K)
        maps.append(drawing.ScatterMap("slides", "PCA", of_slides.project(points.mean_SD), axes))
    return maps, notes


def _map_section(
    out: Path, points: FeaturePoints, drawn: drawing.ScatterMap, values: Mapping[str, Mapping[str, str]]
) -> Section:
    """One map in the colours of every column."""
    of_slides = drawn.what == "slides"
    slide_N = range(len(points.slide_ids)) if of_slides else points.slide_N.tolist()
    pictures = []
    for column, value_of in values.items():
        if of_slides and column == SLIDE and len(slide_N) > drawing.DIRECT_LABELS:
            continue  # a colour for each would be told apart by nobody
        value_N = [value_of[points.slide_ids[index]] for index in slide_N]
        png = drawing.scatter_png(drawn, column, value_N, points.slide_ids if of_slides else ())
        name = f"{drawn.what}-{drawn.method.lower()}-by-{_safe(column)}.png"
        _write(out / name, png)
        # Tiles of a slide are alike, so whatever else holds for whole slides is judged on slides.
        if column == SLIDE:
            words = drawing.effect_words("The slide", "tiles", explained_share(points.sample_ND, points.slide_N))
        else:
            per_slide = [value_of[slide_id] for slide_id in points.slide_ids]
            words = drawing.effect_words(column.capitalize(), "slides", explained_share(points.mean_SD, per_slide))
        pictures.append(Picture(data_uri(png, "image/png"), f"{drawn.method} of {drawn.what} by {column}", (name, words)))
    text = {
        "PCA": "The two directions with most variance; each axis is scaled to fill the picture.",
        "UMAP": "Neighbours stay neighbours; sizes of groups and distances between them mean little.",
    }[drawn.method]
    return Section(f"{drawn.what.capitalize()}, {drawn.method}", text, pictures)


def _atlas(out: Path, points: FeaturePoints, drawn: drawing.ScatterMap, looks: TileLooks) -> Picture | None:
    """The map with tiles in place of points; None where no store has pixels."""
    chosen = drawing.tile_atlas(drawn.xy_N2, ATLAS)
    seen = [
        (row, column, looks.look(points.slide_ids[points.slide_N[at]], int(points.row_N[at]))) for row, column, at in chosen
    ]
    cells = [(row, column, tile.pixels) for row, column, tile in seen if not tile.problem]
    if not cells:
        return None
    picture = drawing.atlas_picture(cells, ATLAS, ATLAS_PX)
    name = f"tiles-{drawn.method.lower()}-atlas.png"
    _write(out / name, png_bytes(picture))
    return Picture(picture_uri(picture, PAGE_PX), f"{drawn.method} map with tiles in place of points", (name,))


def _component_section(out: Path, run: Run, folder: Path, points: FeaturePoints, options: MapOptions) -> Section:
    """Slides whose tiles have the colours of their first three components."""
    evenly = [points.slide_ids[index] for index in sample_evenly(len(points.slide_ids), PICTURES)]
    shown = options.slides or tuple(evenly)
    pictures = []
    for slide_id in track(shown, "map", len(shown)):
        try:
            store = open_tiles(run.layout.store(slide_id))
            file = open_features(folder / f"{slide_id}.h5")
            picture = _component_picture(store, file, points, options.fit)
        except StoreError as error:
            status(slide_id, "left out", error.reason)
            continue
        _write(out / "slides" / f"{slide_id}.png", png_bytes(picture))
        said = f"{len(file.coords):,} tiles{'; a mosaic, not tissue' if store.coords_synthetic else ''}"
        pictures.append(Picture(picture_uri(picture, PAGE_PX), f"Components of the tiles of {slide_id}", (slide_id, said)))
    where = "the cohort, so that a colour means the same in all slides" if options.fit == "cohort" else "each slide by itself"
    left = len(points.slide_ids) - len(shown)
    text = f"Each tile has the colour of its first three principal components (red, green, blue), fitted on {where}."
    return Section(
        "Slides in the colours of their components", text + f" {left:,} slides are not shown." * (left > 0), pictures
    )


def _component_picture(store: TileStore, file: FeatureFile, points: FeaturePoints, fit: str) -> Pixels:
    usable = np.flatnonzero(usable_rows(file.features, file.valid))
    rows_ND = file.features[usable]
    components, sample_ND = points.components, points.sample_ND
    if fit == "slide":
        sample = RowSample(SAMPLE_TILES)
        sample.add("slide", rows_ND)
        sample_ND = unit_rows(sample.finish().values_ND)
        components = principal_components(sample_ND, 3)
    coordinate_N3 = np.concatenate([components.project(unit_rows(block)) for block in row_blocks(rows_ND)])
    rgb_N3 = as_colours(coordinate_N3, colour_limits(components.project(sample_ND)))
    shares = ", ".join(f"{share:.0%}" for share in components.share_K)
    words = f"red, green, blue: components 1, 2, 3 of the {fit}, with {shares} of its variance"
    slide = store.thumbnail, store.thumbnail_downsample
    return drawing.colour_map(slide, file.coords[usable], store.tile_sides_level0, rgb_N3, words)


def search(study: Study, query: str, options: SearchOptions) -> ExitCode:
    """``pathfm search``: the tiles of the cohort whose features have the highest cosine with those of one tile.

    Writes ``index.html`` (a gallery), ``contact.png`` and ``neighbours.csv``.

    Raises:
        UsageError: no such slide or tile; names the nearest one.
        StoreError: the slide has no features, or they are damaged.
        MissingExtraError: jinja2 is not installed.
    """
    if options.count < 1:
        raise UsageError("at least one tile must be found", where="-k", fix="give a number above 0")
    run = begin(study)
    folder = find_features(run, options.features)
    rows = {row.slide_id: row for row in run.cohort.rows}
    slide_id, file, tile = _query_tile(query, rows, folder)
    if not usable_rows(file.features[tile : tile + 1], file.valid[tile : tile + 1])[0] or not file.features[tile].any():
        raise UsageError("the tile has no usable features", where=query, fix="choose another tile")
    skipped = {slide_id} if options.other == "slide" else set()
    if options.other == "patient":
        skipped = {other for other, row in rows.items() if _patient(row) == _patient(rows[slide_id])}
    slides = _searched(folder, sorted(rows.keys() - skipped), (slide_id, tile), file.features.shape[1])
    hits = nearest_tiles(file.features[tile], slides, options.count)
    if not hits:
        raise UsageError("there is no other tile to find", where=query, fix="search among more slides")
    out = options.out or run.layout.out / "search" / folder.name / f"{slide_id}-{tile}"
    looks = TileLooks(run.layout.tiles, folder, partial(read_tile, run))
    asked = Found(Hit(slide_id, tile, 1.0), rows[slide_id], _point(file, tile), looks.look(slide_id, tile))
    points = _corners(folder, hits)
    found = [Found(hit, rows[hit.slide_id], points[hit], looks.look(hit.slide_id, hit.tile)) for hit in hits]
    mpp = float(file.attrs.get("mpp", math.nan))
    sheet = contact_sheet(
        [item.look.pixels for item in (asked, *found)],
        ["QUERY\n" + caption(asked), *(f"{item.hit.cosine:.4f}\n{caption(item)}" for item in found)],
        SHEET_COLUMNS,
        mpp if math.isfinite(mpp) else None,
    )
    _write(out / "contact.png", png_bytes(sheet))
    write_table(out / "neighbours.csv", found, run.cohort.label_names)
    facts = [("features", folder.name), ("searched", SEARCHED[options.other])]
    write_search_page(out / "index.html", asked, found, facts, run.cohort.label_names)
    say(f"search: {len(hits)} tiles, cosine {hits[0].cosine:.3f} to {hits[-1].cosine:.3f}, in {out / 'index.html'}")
    return ExitCode.DONE


def _patient(row: SlideRow) -> str:
    return row.patient_id or row.slide_id


def _query_tile(query: str, rows: Mapping[str, SlideRow], folder: Path) -> tuple[str, FeatureFile, int]:
    """Slide, its features, and the tile that a query means."""
    slide_id, _, place = query.rpartition(":")
    numbers = [float(part) for part in place.split(",") if re.fullmatch(r"\s*\d+(\.\d+)?\s*", part)]
    if not slide_id or not numbers or len(numbers) != place.count(",") + 1 or len(numbers) > 2:
        raise UsageError("not a tile", where=query, fix=BAD_POINT)
    if slide_id not in rows:
        from pathfm.config import did_you_mean

        raise UsageError(f"the cohort has no slide {slide_id!r}{did_you_mean(slide_id, rows)}", where=query, fix=BAD_POINT)
    file = open_features(folder / f"{slide_id}.h5")
    if not len(file.coords):
        raise UsageError("the slide has no tiles", where=query, fix="choose another slide")
    if len(numbers) == 1:
        if not numbers[0].is_integer() or numbers[0] >= len(file.coords):
            raise UsageError("no such tile", where=query, fix=f"the slide has tiles 0 to {len(file.coords) - 1}")
        return slide_id, file, int(numbers[0])
    width = float(file.attrs.get("tile_side_level0") or file.attrs.get("tile_px", 1))
    sides = width, float(file.attrs.get("tile_height_level0") or width)
    tile, inside = tile_at(file.coords, sides, (numbers[0], numbers[1]))
    if not inside:
        x, y = (corner + side / 2 for corner, side in zip(_point(file, tile), sides, strict=True))
        raise UsageError("no tile lies there", where=query, fix=f"the nearest one is {slide_id}:{x:.0f},{y:.0f}")
    return slide_id, file, tile


def _point(file: FeatureFile, tile: int) -> tuple[int, int]:
    x, y = file.coords[tile].tolist()
    return x, y


def _searched(folder: Path, slide_ids: Sequence[str], query: tuple[str, int], dim: int) -> Iterator[SlideRows]:
    """Slide after slide, without the query itself; slides that cannot be searched are told of."""
    for slide_id in track(slide_ids, "search", len(slide_ids)):
        try:
            file = open_features(folder / f"{slide_id}.h5")
        except StoreError as error:
            status(slide_id, "left out", error.what)
            continue
        if file.features.shape[1] != dim:
            status(slide_id, "left out", f"features of length {file.features.shape[1]}, the tile's have {dim}")
            continue
        usable_N = usable_rows(file.features, file.valid)
        if slide_id == query[0]:
            usable_N[query[1]] = False
        yield SlideRows(slide_id, file.features, usable_N)


def _corners(folder: Path, hits: Sequence[Hit]) -> dict[Hit, tuple[int, int]]:
    """Upper left corners of tiles; each slide's file is read once more."""
    corners: dict[Hit, tuple[int, int]] = {}
    for slide_id in dict.fromkeys(hit.slide_id for hit in hits):
        file = open_features(folder / f"{slide_id}.h5")
        corners |= {hit: _point(file, hit.tile) for hit in hits if hit.slide_id == slide_id}
    return corners


def _write(path: Path, content: bytes) -> None:
    with commit_file(path) as temporary:
        temporary.write_bytes(content)


def _safe(name: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in name)
