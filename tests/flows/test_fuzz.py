"""Damaged copies of slides: every one ends as a row with a named reason, and no stored tile holds what nobody scanned."""

from __future__ import annotations

import csv
import json
import resource
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.slides.synthetic_tiff import TiffOptions, write_pyramid
from pathfm.store.tile_store import open_tiles
from pathfm.study import FilterSettings
from pathfm.tile.quality import measure, removed_by
from tests.flows.conftest import run
from tests.slides.crosses import pyramid

MEMORY = 6 * 2**30
"""What a damaged header may make a process ask for, without taking the machine's memory from others [bytes]."""
RUN_BYTES = 512
"""Longest run that is overwritten."""
ALWAYS = [
    "--set=tile.tissue.method=off",
    "--set=tile.max_unreadable=1",
    "--set=compute.slide_timeout_s=60",
    "--set=compute.workers=2",
    "--set=compute.threads=2",
]
WAYS = {
    "passed through": ["--mpp=native", "--tile-px=240"],
    "stitched": ["--mpp=native", "--tile-px=100", "--set=tile.codec=zstd"],
    "shrunk": ["--mpp=1.0", "--tile-px=72", "--assume-mpp=0.5", "--set=tile.codec=zstd"],
}
"""How tiles come about: the slide's own streams, crops of several stored tiles, pictures shrunk in the decoder."""


def directories(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """All pages of a file, and those that a page names (SubIFDs) behind it."""
    pages = []
    for page in tiff.pages:
        pages.append(page if isinstance(page, tifffile.TiffPage) else page.aspage())
        pages += [sub if isinstance(sub, tifffile.TiffPage) else sub.aspage() for sub in pages[-1].pages or ()]
    return pages


class Places:
    """Where a slide file has its header, its directories and its picture data [bytes], each as (start, end)."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self.header, self.directory, self.data = [(0, min(self.size, 64))], [], []
        if path.suffix == ".dcm":
            start = path.read_bytes().find(b"\xe0\x7f\x10\x00")
            self.header, self.directory, self.data = [(0, 160)], [(160, start)], [(start, self.size)]
            return
        with tifffile.TiffFile(path) as tiff:
            for page in directories(tiff):
                for tag in page.tags:
                    self.directory += [(tag.offset, tag.offset + 12), (tag.valueoffset, tag.valueoffset + tag.valuebytecount)]
                counts = zip(page.dataoffsets, page.databytecounts, strict=True)
                self.data += [(offset, offset + count) for offset, count in counts if count]
        # The picture itself, not its label or macro page.
        with tifffile.TiffFile(path) as tiff:
            first = tiff.pages[0]
            counts = zip(first.dataoffsets, first.databytecounts, strict=True)
            self.first = [(offset, offset + count) for offset, count in counts if count]


def flip(data: bytearray, ranges: list[tuple[int, int]], count: int, random: np.random.Generator) -> None:
    """Flips single bits, each in any of the ranges."""
    lengths = np.array([end - start for start, end in ranges], dtype=float)
    for _ in range(count):
        start, end = ranges[random.choice(len(ranges), p=lengths / lengths.sum())]
        data[random.integers(start, end)] ^= 1 << random.integers(8)


def damage(path: Path, places: Places, kind: str, random: np.random.Generator) -> None:
    """Damages a file in place."""
    data = bytearray(path.read_bytes())
    if kind == "flips in data":
        flip(data, places.data, int(random.integers(1, 30)), random)
    elif kind == "flips in directory":
        flip(data, places.directory, int(random.integers(1, 5)), random)
    elif kind == "flips in header":
        flip(data, places.header, int(random.integers(1, 4)), random)
    elif kind == "cut":
        del data[int(random.integers(1, len(data))) :]
    elif kind == "cut near the end":
        del data[len(data) - int(random.integers(1, 5000)) :]
    else:
        start, end = {"run": (0, len(data)), "run in directory": places.directory[random.integers(len(places.directory))]}[kind]
        first = int(random.integers(start, end))
        last = min(len(data), first + int(random.integers(1, RUN_BYTES if kind == "run" else 1 + end - start)))
        filling = [bytes(last - first), b"\xff" * (last - first), random.bytes(last - first)][random.integers(3)]
        data[first:last] = filling
    path.write_bytes(data)


KINDS = ("flips in data", "flips in directory", "flips in header", "cut", "cut near the end", "run", "run in directory")
"""Kinds of damage; data and directories, where the trouble is, come up more often."""
WEIGHTS = (0.3, 0.25, 0.08, 0.1, 0.04, 0.13, 0.1)


@dataclass
class Fuzz:
    """One folder of damaged copies that was tiled in one way, and the undamaged slides tiled alike.

    Attributes:
        copies: name of each copy -> the sound file and the kind of damage.
        out, sound_out: folders of their tile stores.
        outcomes: rows of the record, by copy.
        said: standard output and error.
    """

    folder: Path
    copies: dict[str, tuple[Path, str]]
    out: Path
    sound_out: Path
    outcomes: dict[str, dict]
    said: str


def tiled(slides: list[tuple[str, Path]], folder: Path, options: list[str]) -> tuple[Path, dict[str, dict], str]:
    """``pathfm tile`` over a table of slides: folder of the stores, outcomes by slide, and what was said."""
    folder.mkdir()
    table = folder / "cohort.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([("slide_id", "path"), *slides])
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))}
    code, out, err = run("tile", table, "--out", folder / "out", *ALWAYS, *options, **limit)
    said = out + err
    assert code in {0, 3}, said
    (record,) = (folder / "out" / "tiles").glob("*/record.json")
    return record.parent, {row["slide_id"]: row for row in json.loads(record.read_text())["outcomes"]}, said


def fuzzed(sound: list[Path], count: int, way: str, folder: Path, seed: int) -> Fuzz:
    """Damages ``count`` copies of the slides and tiles them."""
    random = np.random.default_rng(seed)
    (folder / "copies").mkdir(parents=True)
    places = {path: Places(path) for path in sound}
    copies = {}
    for number in range(count):
        path = sound[number % len(sound)]
        kind = str(random.choice(KINDS, p=WEIGHTS))
        # A folder of its own, since files of one DICOM series are one slide.
        copy = folder / "copies" / f"{number:03d}" / f"slide{path.suffix}"
        copy.parent.mkdir()
        shutil.copyfile(path, copy)
        damage(copy, places[path], kind, random)
        copies[copy.parent.name] = (path, kind)
    sound_out, outcomes, said = tiled([(path.stem, path) for path in sound], folder / "sound", WAYS[way])
    assert {row["status"] for row in outcomes.values()} <= {"done", "empty"}, said
    out, outcomes, said = tiled(
        [(name, folder / "copies" / name / f"slide{copies[name][0].suffix}") for name in copies], folder / "damaged", WAYS[way]
    )
    return Fuzz(folder, copies, out, sound_out, outcomes, said)


def strictly_decoded(data: bytes, page: tifffile.TiffPage, number: int, shrink: int) -> np.ndarray:
    """A stored tile of a damaged file, decoded on a way of its own. Raises ValueError for an error or a libjpeg warning."""
    start, length = page.dataoffsets[number], page.databytecounts[number]
    stream = data[start : start + length]
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if page.photometric == 2 else b"\x01")
    tables = page.jpegtables[2:-2] if page.jpegtables else b""
    size = {"min_height": page.tilelength // shrink, "min_width": page.tilewidth // shrink}
    return simplejpeg.decode_jpeg(b"\xff\xd8" + adobe + tables + stream[2:], colorspace="RGB", strict=True, **size)


def expected(data: bytes, page: tifffile.TiffPage, box: tuple[int, ...], shrink: int) -> np.ndarray:
    """The pixels of a box [px of the shrunk level], by the damaged file's own directory."""
    left, top, right, bottom = box
    width, height = page.tilewidth // shrink, page.tilelength // shrink
    columns = -(-page.imagewidth // page.tilewidth)
    canvas = np.zeros((bottom - top, right - left, 3), np.uint8)
    filled = np.zeros(canvas.shape[:2], bool)
    for row in range(top // height, -(-bottom // height)):
        for column in range(left // width, -(-right // width)):
            tile = strictly_decoded(data, page, row * columns + column, shrink)
            x, y = column * width, row * height
            part = np.s_[max(0, y - top) : y + height - top, max(0, x - left) : x + width - left]
            inner = tile[max(0, top - y) : bottom - y, max(0, left - x) : right - x]
            canvas[part], filled[part] = inner, True
    assert filled.all()
    return canvas


def check_tiles(path: Path, store, sound) -> Counter:
    """Every stored tile of a slide that is read directly is what its file decodes to without a warning."""
    level, shrink = store.attrs["read_level"], store.attrs["read_shrink"]
    data = path.read_bytes()
    counts = Counter(tiles=len(store))
    at = {tuple(xy): index for index, xy in enumerate(sound.xy_level0.tolist())} if sound else {}
    with tifffile.TiffFile(path) as tiff:
        if store.attrs["vendor"] in {"tiff", "ome-tiff"}:
            page = tiff.series[0].levels[level].keyframe
        else:
            page = [page for page in directories(tiff) if page.is_tiled][level]
    frame = store.size_level0.width / page.imagewidth * shrink
    for index, (x, y) in enumerate(store.xy_level0.tolist()):
        edges = [round(edge / frame) for edge in (x, y, x + store.tile_side_level0, y + store.tile_side_level0)]
        pixels = expected(data, page, tuple(edges), shrink)
        if pixels.shape[0] != store.tile_px:
            pixels = cv2.resize(pixels, (store.tile_px, store.tile_px), interpolation=cv2.INTER_AREA)
        assert np.array_equal(store[index], pixels), (path, index)
        if (x, y) in at and not np.array_equal(pixels, sound[at[x, y]]):
            counts["changed"] += 1
    return counts


def filled_in(store, sound) -> Counter:
    """Tiles of a slide that is read by a library that hides what it could not decode: changed ones, and gross fillings."""
    counts = Counter(tiles=len(store))
    at = {tuple(xy): index for index, xy in enumerate(sound.xy_level0.tolist())}
    for index, xy in enumerate(store.xy_level0.tolist()):
        if tuple(xy) not in at or store.tile_px != sound.tile_px:
            continue
        ours, theirs = store[index], sound[at[tuple(xy)]]
        if np.array_equal(ours, theirs):
            continue
        counts["changed"] += 1
        # Blocks of one colour where the sound slide has texture.
        side = 8 * (store.tile_px // 8)
        flat = [
            np.ptp(each[:side, :side].reshape(side // 8, 8, side // 8, 8, 3), axis=(1, 3)).max(axis=-1)
            for each in (ours, theirs)
        ]
        counts["filled"] += int(((flat[0] == 0) & (flat[1] > 8)).mean() > 0.1)
    return counts


def check(fuzz: Fuzz) -> Counter:
    """What must hold of any run over damaged slides, and what was seen."""
    assert "Traceback" not in fuzz.said
    assert "internal error" not in fuzz.said, fuzz.said
    assert "DOE" not in fuzz.said + json.dumps(fuzz.outcomes), "the name in the synthetic slides"
    assert set(fuzz.outcomes) == set(fuzz.copies)
    seen: Counter = Counter()
    for name, (path, kind) in fuzz.copies.items():
        outcome = fuzz.outcomes[name]
        seen[kind, outcome["status"]] += 1
        assert outcome["status"] in {"done", "empty", "failed"}
        assert (outcome["status"] == "done") == (not outcome["reason"]), outcome
        assert "\n" not in outcome["reason"]
        assert str(fuzz.folder) not in outcome["reason"]
        if outcome["status"] == "failed":
            assert not (fuzz.out / f"{name}.zarr").exists()
            seen["reason", outcome["reason"]] += 1
            continue
        store, sound = open_tiles(fuzz.out / f"{name}.zarr"), open_tiles(fuzz.sound_out / f"{path.stem}.zarr")
        look = check_tiles if store.attrs["reader"] == "direct" else lambda _, *stores: filled_in(*stores)
        for what, number in look(fuzz.folder / "copies" / name / f"slide{path.suffix}", store, sound).items():
            seen[store.attrs["reader"], what] += number
    return seen


SYNTHETIC = {
    "aperio": TiffOptions("aperio", Size(240, 240), shared_tables=True),
    "aperio-rgb": TiffOptions("aperio", Size(240, 240), "rgb"),
    "generic": TiffOptions(tile_px=Size(240, 240), colour="422", quality=90),
    "ome": TiffOptions("ome", Size(240, 240), big=True, shared_tables=True),
}


@pytest.fixture(scope="session")
def synthetic_slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    tissue = draw_slide(SyntheticSpec(size_px=Size(1560, 1120), seed=5))[0]
    for name, options in SYNTHETIC.items():
        write_pyramid(folder / f"{name}.{'svs' if 'aperio' in name else 'tif'}", pyramid(tissue, (1, 4)), options)
    return sorted(folder.iterdir())


@pytest.mark.long
def test_damaged_synthetic_slides(synthetic_slides, tmp_path):
    seen = check(fuzzed(synthetic_slides, 20, "stitched", tmp_path / "fuzz", 1))
    assert seen["direct", "tiles"] > 1000
    assert seen["direct", "changed"] > 0


REAL = {
    "passed through": ["slides/CMU-1-Small-Region.svs"],
    "shrunk": ["slides/CMU-1-Small-Region.svs"],
    "stitched": [
        "slides/TCGA-5P-A9K0_3.svs",
        "formats/her2st_B4_crop_jp2k.svs",
        "formats/boxes.tiff",
        "formats/cells.ome.tif",
        "formats/kidney-48-5-ihc.tif",
        "formats/orient3_gray_jpeg_3level.tif",
        "formats/rgba_lzw_2level.tiff",
        "formats/yb10kx5k.zstd.tiff",
        "formats/dicom/boxes/boxes_0.dcm",
        "formats/dicom/sm_image/sm_image.dcm",
        "formats/dicom/w2d-jpeg/jpeg.dcm",
        "formats/dicom/w2d-jpeg2000/jpeg2000.dcm",
        "formats/dicom/w2d-raw/raw.dcm",
    ],
}


@pytest.mark.long
@pytest.mark.parametrize(("way", "count"), [("passed through", 60), ("shrunk", 60), ("stitched", 180)])
def test_damaged_real_slides(shared_data, synthetic_slides, tmp_path, way, count):
    seen = check(fuzzed([*(shared_data / name for name in REAL[way]), *synthetic_slides], count, way, tmp_path / "fuzz", 2))
    report(f"{count} copies, {way}", seen)
    assert seen["direct", "tiles"] > 500
    # A run of zeros in pixels that are not compressed is a picture like any other.
    assert seen["openslide", "filled"] + seen["tiff", "filled"] <= 0.01 * (seen["openslide", "tiles"] + seen["tiff", "tiles"])


DAMAGE_ALONE = [f"--set=tile.filters.max_{name}=1" for name in ("white", "pen", "black")]
"""The damage column is the only reason left to drop a tile."""


def flip_tiles(path: Path, copy: Path, count: int, random: np.random.Generator) -> list[tuple[int, bytes, bytes]]:
    """Copies a slide with one bit flipped in the entropy-coded data of each of some whole stored tiles of its first level.

    Returns:
        Number, sound pixels and damaged pixels of each of these tiles; None for what the decoder refuses.
    """
    data = bytearray(path.read_bytes())
    sound = bytes(data)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
    columns, whole = -(-page.imagewidth // page.tilewidth), page.imagewidth // page.tilewidth
    rows = page.imagelength // page.tilelength
    numbers = np.array([row * columns + column for row in range(rows) for column in range(whole)])
    lengths = np.array([page.databytecounts[number] for number in numbers], dtype=float)
    chosen = sorted(int(number) for number in random.choice(numbers, count, replace=False, p=lengths / lengths.sum()))
    for number in chosen:
        start, length = page.dataoffsets[number], page.databytecounts[number]
        scan = sound.index(b"\xff\xda", start) - start + 14
        data[start + int(random.integers(scan, length - 2))] ^= 1 << int(random.integers(8))
    copy.write_bytes(data)
    pictures = []
    for number in chosen:
        try:
            damaged = strictly_decoded(bytes(data), page, number, 1)
        except ValueError:
            damaged = None
        pictures.append((number, strictly_decoded(sound, page, number, 1), damaged))
    return pictures


@pytest.mark.long
@pytest.mark.parametrize("name", ["CMU-1-Small-Region", "her2st_B4"])
def test_flipped_bits_that_decode_cleanly_are_few_and_gross_ones_are_dropped(shared_data, tmp_path, name):
    random, path = np.random.default_rng(3), shared_data / "slides" / f"{name}.svs"
    with tifffile.TiffFile(path) as tiff:
        side, columns = tiff.pages[0].tilewidth, -(-tiff.pages[0].imagewidth // tiff.pages[0].tilewidth)
    flips = {f"{number:02d}": flip_tiles(path, tmp_path / f"{number:02d}.svs", 20, random) for number in range(50)}
    slides = [(copy, tmp_path / f"{copy}.svs") for copy in flips]
    out, outcomes, said = tiled(slides, tmp_path / "run", ["--mpp=native", f"--tile-px={side}", *DAMAGE_ALONE])
    assert {row["status"] for row in outcomes.values()} == {"done"}, said
    seen: Counter = Counter()
    limits = FilterSettings(max_white=1, max_pen=1, max_black=1)
    for copy, tiles in flips.items():
        store = open_tiles(out / f"{copy}.zarr")
        assert store.attrs["passed_through"]
        at = {tuple(xy): index for index, xy in enumerate(store.xy_level0.tolist())}
        for number, sound, damaged in tiles:
            index = at.get((number % columns * side, number // columns * side))
            seen["flips"] += 1
            if damaged is None:
                assert index is None
                seen["refused by the decoder"] += 1
                continue
            error = np.abs(sound.astype(np.int16) - damaged).mean()
            size = "gross (mean error > 8)" if error > 8 else "slight" if error else "none"
            fate = "kept" if index is not None else removed_by(measure(damaged, 1.0), limits)
            assert fate, "a sound tile is missing"
            assert index is None or np.array_equal(store[index], damaged)
            seen["decodes cleanly"] += 1
            seen["decodes cleanly, change:", size, fate] += 1
    report(f"one flipped bit per stored tile, {name}", seen)
    kinds = {key: number for key, number in seen.items() if isinstance(key, tuple)}
    gross = {key[2]: number for key, number in kinds.items() if key[1].startswith("gross")}
    assert seen["refused by the decoder"] > 0.2 * seen["flips"]
    assert gross.get("kept", 0) <= 0.25 * sum(gross.values())


def report(title: str, seen: Counter) -> None:
    """The figures of docs/damage.md (pytest -s)."""
    print(f"\n{title}")
    for key, number in sorted(seen.items(), key=str):
        if not (isinstance(key, tuple) and key[0] == "reason"):
            print(f"  {number:6d}  {' '.join(key) if isinstance(key, tuple) else key}")
    print(f"  {len({key for key in seen if isinstance(key, tuple) and key[0] == 'reason'}):6d}  different reasons")
