"""JPEG streams as scanners write them into TIFFs: RGB components that nothing declares, abbreviated streams, comments.

Streams follow ITU-T T.81; abbreviated ones, whose tables stand elsewhere in the file, TIFF Technical Note 2.
"""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image

from pathfm.jpeg import DHT, DQT, DRI, SOS, Pixels, segments

Colour = Literal["420", "422", "444", "rgb"]
"""YCbCr with chroma subsampled or not, or RGB components."""
BASELINE, COMMENT = 0xC0, b"\xff\xfe"


def encode_stream(picture: Pixels, colour: Colour, quality: int, comment: str = "") -> bytes:
    """A picture [H, W, 3] as a whole JPEG stream.

    Args:
        picture: its pixels.
        colour: of the stream; nothing in an ``rgb`` one says that it is RGB, as in Aperio's files.
        quality: of the JPEG.
        comment: put into a comment marker.
    """
    subsampling = {"420": "4:2:0", "422": "4:2:2"}.get(colour, "4:4:4")
    target = io.BytesIO()
    Image.fromarray(picture).save(target, "JPEG", quality=quality, subsampling=subsampling, keep_rgb=colour == "rgb")
    data = _undeclared(target.getvalue()) if colour == "rgb" else target.getvalue()
    note = comment.encode()
    return data[:2] + COMMENT + (2 + len(note)).to_bytes(2, "big") + note + data[2:] if note else data


def split_tables(stream: bytes) -> tuple[bytes, bytes]:
    """A whole stream as its tables alone and as an abbreviated stream without them (and without application markers)."""
    tables, rest, length = b"", b"", 2
    for kind, part in segments(stream):
        length += len(part)
        if kind in {DQT, DHT}:
            tables += part
        elif not 0xE0 <= kind <= 0xEF:
            rest += part
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest + stream[length:]


def _undeclared(stream: bytes) -> bytes:
    """An RGB stream without what tells a decoder so: its markers, and components named R, G, B; Aperio numbers them 0, 1, 2."""
    head, length = b"\xff\xd8", 2
    for kind, part in segments(stream):
        length += len(part)
        renamed = bytearray(part)
        if kind == BASELINE:
            renamed[10::3] = bytes(range(3))
        if kind == SOS:
            renamed[5:11:2] = bytes(range(3))
        if kind in {BASELINE, SOS, DQT, DHT, DRI}:
            head += renamed
    return head + stream[length:]
