"""Writes slides of the TIFF family from pictures or ready JPEG tiles, as scanners and converters lay them out.

tifffile refuses JPEG without the optional imagecodecs, even for tiles that are encoded already; the format needs few words.
Layout: TIFF 6.0, the BigTIFF design of 2007 (8-byte offsets), TIFF Technical Note 2 (abbreviated JPEG streams), the
pyramids of OME-TIFF 6 (SubIFDs), and the pages of Aperio's SVS in the order in which its scanners write them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import cv2
import numpy as np

from pathfm.geometry import Mpp, Size, fit_within, scale_length
from pathfm.jpeg import Pixels
from pathfm.slides.synthetic_streams import Colour, encode_stream, split_tables

Values = tuple[int, ...] | bytes
Tags = dict[int, tuple[int, Values]]
"""Tag -> type and values; rationals are numerators and denominators in turn."""

ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 2, 3, 4, 5, 7, 16
FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q"}
NO_COMPRESSION, JPEG = 1, 7
RGB, YCBCR = 2, 6
CENTIMETRE = 3
REDUCED = 1
SUBFILES = {"thumbnail": 0, "label": 1, "macro": 9}
"""NewSubfileType of the pages that are no level, as Aperio writes it."""
RATIONAL_SCALE = 1000
UM_PER_CM = 10_000
TILE, STRIP_ROWS = Size(256, 256), 64
FORTYFOLD = Mpp(0.25, 0.25)
SAMPLING = {"420": (2, 2), "422": (2, 1), "444": (1, 1), "rgb": (1, 1)}
"""YCbCrSubSampling of each kind of JPEG colour."""
THUMBNAIL_PX = 768
PATIENT = "DOE JANE 1948-02-29"
"""Stands on the label and macro pictures and in the Aperio descriptions: nothing that reads a slide may ever let it out."""

PictureKind = Literal["thumbnail", "label", "macro"]


@dataclass(frozen=True)
class TiffOptions:
    """How a slide is laid out.

    Attributes:
        dialect: generic: every level a page; aperio: SVS, with thumbnail, label and macro pages; ome: lower levels are SubIFDs.
        tile_px: width and height of a tile, multiples of 16; None: strips of ``STRIP_ROWS`` rows (a flat TIFF).
        colour: JPEG with chroma subsampled or not, or with RGB components and, as Aperio writes them, no marker that says so;
            raw: no compression.
        quality: of the JPEG.
        shared_tables: tiles are abbreviated streams, whose tables stand in the tag JPEGTables.
        share_tiles: tiles with the same bytes are stored once.
        mpp: micrometres per pixel of the first level, None for none. Aperio knows one value for both axes.
        objective: magnification, where the dialect has a place for it.
        big: BigTIFF.
        byte_order: of the file.
        comment: put into every JPEG stream as a comment marker, where scanners leave names and dates.
        icc: colour profile.
    """

    dialect: Literal["generic", "aperio", "ome"] = "generic"
    tile_px: Size | None = TILE
    colour: Colour | Literal["raw"] = "420"
    quality: int = 80
    shared_tables: bool = False
    share_tiles: bool = False
    mpp: Mpp | None = FORTYFOLD
    objective: float = 40
    big: bool = False
    byte_order: Literal["little", "big"] = "little"
    comment: str = ""
    icc: bytes = b""


Block = list[tuple[int, list[list[bytes]]]]
"""Downsample and rows of encoded tiles of each level of a picture."""


class TiffFile:
    """A TIFF under construction: data and directories, one after the other."""

    def __init__(self, path: Path, *, big: bool, byte_order: Literal["little", "big"]) -> None:
        self._file = path.open("wb")
        self._order, mark = ("<", b"II") if byte_order == "little" else (">", b"MM")
        self._offset, self._count, self._entry = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")
        self._inline = 8 if big else 4
        self.offset_type = LONG8 if big else LONG
        self._file.write(mark + (self._pack("HHHQ", 43, 8, 0, 0) if big else self._pack("HI", 42, 0)))
        self._link = 8 if big else 4

    def write(self, data: bytes) -> int:
        """Appends data and tells its place."""
        place = self._file.tell()
        self._file.write(data)
        return place

    def write_directory(self, tags: Tags, *, linked: bool = True) -> int:
        """Appends a directory, with values too long for it put before, and tells its place.

        Args:
            tags: its tags.
            linked: the next page of the file; else a SubIFD, which another directory names.
        """
        entries = b""
        for tag, (kind, values) in sorted(tags.items()):
            data = values if isinstance(values, bytes) else self._pack(f"{len(values)}{FORMATS[kind]}", *values)
            if len(data) > self._inline:
                place = self._align()
                self._file.write(data)
                data = self._pack(self._offset, place)
            count = len(values) // 2 if kind == RATIONAL else len(values)
            entries += self._pack(self._entry, tag, kind, count) + data.ljust(self._inline, b"\0")
        start = self._align()
        head = self._pack(self._count, len(tags))
        self._file.write(head + entries + self._pack(self._offset, 0))
        if linked:
            self._file.seek(self._link)
            self._file.write(self._pack(self._offset, start))
            self._link = start + len(head) + len(entries)
            self._file.seek(0, 2)
        return start

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _pack(self, kinds: str, *values: int) -> bytes:
        return struct.pack(self._order + kinds, *values)

    def _align(self) -> int:
        """Pads to a multiple of 8 bytes, as offsets should be, and tells the place."""
        self._file.write(b"\0" * (-self._file.tell() % 8))
        return self._file.tell()


class SlideWriter:
    """A slide under construction: levels are written one after the other, finest first, so that no level is held in memory.

    Args:
        path: the file to write.
        options: its layout.
    """

    def __init__(self, path: Path, options: TiffOptions) -> None:
        if options.dialect == "aperio" and options.mpp and options.mpp.x != options.mpp.y:
            raise ValueError("an Aperio slide has one mpp for both axes")
        self._options = options
        self._tiff = TiffFile(path, big=options.big, byte_order=options.byte_order)
        self._size: Size | None = None
        self._main: Tags = {}
        self._lower: list[int] = []

    def write_level(self, tiles: Iterable[bytes], size: Size, downsample: float = 1.0) -> None:
        """Appends a level.

        Args:
            tiles: its tiles, each a whole JPEG stream (or pixels, for ``raw``), row by row; written as they come. Empty bytes
                make a tile that the file does not have.
            size: width and height of the level [px].
            downsample: level-0 pixels per pixel, of which only the resolution tags of ``generic`` speak.
        """
        options = self._options
        first, self._size = self._size is None, self._size or size
        places, tables = self._write_segments(tiles)
        tags = _picture_tags(size, options, places, self._tiff.offset_type) | _scale_tags(options, downsample)
        # Aperio marks no lower level as a reduced image.
        tags[254] = (LONG, (0 if first or options.dialect == "aperio" else REDUCED,))
        if options.dialect == "aperio":
            tags[270] = _text(_aperio_text(self._size, size, options))
        if tables:
            tags[347] = (UNDEFINED, tables)
        if options.icc:
            tags[34675] = (UNDEFINED, options.icc)
        if options.dialect != "ome":
            self._tiff.write_directory(tags)
        elif first:
            # It names the lower levels, so it is written last.
            self._main = tags | {270: _text(_ome_text(size, options))}
        else:
            self._lower.append(self._tiff.write_directory(tags, linked=False))

    def write_picture(self, kind: PictureKind, picture: Pixels) -> None:
        """Appends a page that is no level (Aperio): pixels [H, W, 3] in one strip. A thumbnail is the second page."""
        size = Size(picture.shape[1], picture.shape[0])
        options = TiffOptions(tile_px=None, colour="raw" if kind == "label" else "420")
        strips = [picture.tobytes() if kind == "label" else encode_stream(picture, "420", 80)]
        places, _ = self._write_segments(strips, whole=True)
        tags = _picture_tags(size, options, places, self._tiff.offset_type)
        words = f"{kind} {size.width}x{size.height}"
        if kind == "thumbnail" and self._size:
            words = f"{self._size.width}x{self._size.height} -> {size.width}x{size.height} - |Filename = {PATIENT}"
        tags[254] = (LONG, (SUBFILES[kind],))
        tags[270] = _text(f"Aperio Image Library v12.0.15 \n{words}")
        tags[278] = (LONG, (size.height,))
        self._tiff.write_directory(tags)

    def write_labels(self) -> None:
        """Appends the pages with a patient's name on them, which Aperio puts last."""
        self.write_picture("label", label_picture(Size(387, 463)))
        self.write_picture("macro", label_picture(Size(1280, 431)))

    def close(self) -> None:
        """Writes what names other parts of the file, and ends it."""
        if self._main:
            lower = {330: (self._tiff.offset_type, tuple(self._lower))} if self._lower else {}
            self._tiff.write_directory(self._main | lower)
        self._tiff.close()

    def _write_segments(self, streams: Iterable[bytes], whole: bool = False) -> tuple[list[tuple[int, int]], bytes]:
        """Offset and length of each stream, and the tables that they share."""
        split = self._options.shared_tables and self._options.colour != "raw" and not whole
        known: dict[bytes, tuple[int, int]] = {b"": (0, 0)}
        places: list[tuple[int, int]] = []
        shared = b""
        for stream in streams:
            place = known.get(stream)
            if place is None:
                tables, data = split_tables(stream) if split else (b"", stream)
                if shared and tables != shared:
                    raise ValueError("tiles of one level with different tables")
                shared = tables
                place = (self._tiff.write(data), len(data))
                if self._options.share_tiles:
                    known[stream] = place
            places.append(place)
        return places, shared

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_pyramid(path: Path, levels: Sequence[Pixels], options: TiffOptions) -> None:
    """Writes pictures [H, W, 3], finest first, as a slide; an Aperio one gets its thumbnail, label and macro pages."""
    width = levels[0].shape[1]
    with SlideWriter(path, options) as slide:
        for number, level in enumerate(levels):
            size = Size(level.shape[1], level.shape[0])
            slide.write_level(encode_tiles(level, options), size, width / size.width)
            if options.dialect == "aperio" and not number:
                slide.write_picture("thumbnail", shrink(levels[-1], fit_within(size, THUMBNAIL_PX)[0]))
        if options.dialect == "aperio":
            slide.write_labels()


def write_repeated_slide(path: Path, size: Size, block: Block, options: TiffOptions) -> None:
    """Writes a slide of any size at the cost of one block, which it repeats: the file holds each tile of the block once.

    Args:
        path: the file to write.
        size: width and height of level 0 [px].
        block: from ``encode_block``.
        options: its layout.
    """
    assert options.tile_px, "only tiles can be repeated"
    with SlideWriter(path, options) as slide:
        for downsample, rows in block:
            level_size = Size(size.width // downsample, size.height // downsample)
            across, down = (-(-length // side) for length, side in zip(level_size, options.tile_px, strict=True))
            tiles = (rows[y % len(rows)][x % len(rows[0])] for y in range(down) for x in range(across))
            slide.write_level(tiles, level_size, downsample)
        if options.dialect == "aperio":
            slide.write_labels()


def encode_block(picture: Pixels, downsamples: Sequence[int], options: TiffOptions) -> Block:
    """The levels of a picture [H, W, 3] whose sides are whole tiles at every level, for ``write_repeated_slide``."""
    assert options.tile_px, "only tiles can be repeated"
    block: Block = []
    for downsample in downsamples:
        size = Size(picture.shape[1] // downsample, picture.shape[0] // downsample)
        if any(length % side for length, side in zip(size, options.tile_px, strict=True)):
            raise ValueError(f"a level of {size.width} x {size.height} px is not whole tiles")
        tiles, columns = list(encode_tiles(shrink(picture, size), options)), size.width // options.tile_px.width
        block.append((downsample, [tiles[start : start + columns] for start in range(0, len(tiles), columns)]))
    return block


def shrink(picture: Pixels, size: Size) -> Pixels:
    """A picture [H, W, 3] at another size, by area."""
    if picture.shape[1::-1] == size:
        return picture
    return np.asarray(cv2.resize(picture, tuple(size), interpolation=cv2.INTER_AREA))


def encode_tiles(picture: Pixels, options: TiffOptions) -> Iterator[bytes]:
    """The tiles (or strips) of a picture [H, W, 3], row by row; those over its edges are filled with its last pixels."""
    height, width = picture.shape[:2]
    side = options.tile_px or Size(width, STRIP_ROWS)
    for top in range(0, height, side.height):
        for left in range(0, width, side.width):
            tile = picture[top : top + side.height, left : left + side.width]
            if options.tile_px:
                missing = ((0, side.height - tile.shape[0]), (0, side.width - tile.shape[1]), (0, 0))
                tile = np.pad(tile, missing, mode="edge")
            if options.colour == "raw":
                yield tile.tobytes()
            else:
                yield encode_stream(tile, options.colour, options.quality, options.comment)


def label_picture(size: Size) -> Pixels:
    """A label with a patient's name on it, on a yellow that no tissue has [size.height, size.width, 3]."""
    picture = np.full((size.height, size.width, 3), (250, 235, 20), dtype=np.uint8)
    for row, words in enumerate(PATIENT.rsplit(" ", 1)):
        cv2.putText(picture, words, (12, 60 + 50 * row), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (10, 10, 10), 3)
    return picture


def _picture_tags(size: Size, options: TiffOptions, places: list[tuple[int, int]], offset_type: int) -> Tags:
    """What any page says of its pixels and their place."""
    ycbcr = options.colour not in {"rgb", "raw"}
    offsets, counts = (offset_type, tuple(place for place, _ in places)), (offset_type, tuple(count for _, count in places))
    tags: Tags = {
        256: (LONG, (size.width,)),
        257: (LONG, (size.height,)),
        258: (SHORT, (8, 8, 8)),
        259: (SHORT, (NO_COMPRESSION if options.colour == "raw" else JPEG,)),
        262: (SHORT, (YCBCR if ycbcr else RGB,)),
        277: (SHORT, (3,)),
        284: (SHORT, (1,)),
    }
    if options.tile_px:
        tags |= {322: (LONG, (options.tile_px.width,)), 323: (LONG, (options.tile_px.height,)), 324: offsets, 325: counts}
    else:
        tags |= {273: offsets, 278: (LONG, (STRIP_ROWS,)), 279: counts}
    return tags | {530: (SHORT, SAMPLING[options.colour])} if ycbcr else tags


def _scale_tags(options: TiffOptions, downsample: float) -> Tags:
    if options.dialect != "generic" or not options.mpp:
        return {}
    x, y = ((scale_length(UM_PER_CM * RATIONAL_SCALE, 1 / (mpp * downsample)), RATIONAL_SCALE) for mpp in options.mpp)
    return {282: (RATIONAL, x), 283: (RATIONAL, y), 296: (SHORT, (CENTIMETRE,))}


def _text(words: str) -> tuple[int, bytes]:
    return ASCII, words.encode() + b"\0"


def _aperio_text(size_level0: Size, size: Size, options: TiffOptions) -> str:
    tile = options.tile_px or size
    shrunk = "" if size == size_level0 else f" -> {size.width}x{size.height}"
    codec = "RGB" if options.colour == "rgb" else "YCC"
    words = f"Aperio Image Library v12.0.15 \r\n{size_level0.width}x{size_level0.height} [0,0 {size_level0.width}x"
    words += f"{size_level0.height}] ({tile.width}x{tile.height}){shrunk} JPEG/{codec} Q={options.quality}"
    words += f"|AppMag = {options.objective:g}|Filename = {PATIENT}|User = {PATIENT}"
    return words + (f"|MPP = {options.mpp.x:.6g}" if options.mpp else "")


def _ome_text(size: Size, options: TiffOptions) -> str:
    scale = ""
    if options.mpp:
        x, y = options.mpp
        scale = f' PhysicalSizeX="{x:.8g}" PhysicalSizeXUnit="µm" PhysicalSizeY="{y:.8g}" PhysicalSizeYUnit="µm"'
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0" Name="slide"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeZ="1" SizeT="1"'
        f' SizeC="3" SizeX="{size.width}" SizeY="{size.height}" Interleaved="true"{scale}>'
        '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )
