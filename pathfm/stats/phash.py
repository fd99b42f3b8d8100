"""Perceptual hashes: pictures that look alike get bits that are nearly alike, however they were saved.

A picture is shrunk to 64 x 64 grey values; the signs of its 256 coarsest cosine coefficients (without the mean) are its bits.
Measured on whole slides, folders of tiles and single tiles: another JPEG quality, size or format changes at most 26 of the 256
bits, cutting off 1 % of a slide at most 36, and different slides differ in 80 or more, whichever way they are turned.

Legend: Q queries, S stored hashes, W words of a hash, B bits of a hash (in ``near_hashes``: hashes of a block).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

BITS = 256
WORDS = BITS // 64
SAME_PICTURE_BITS = 48
"""Hashes that differ in no more bits are of one picture."""
SIDE_PX = 64
LEAST_CONTRAST = 4.0
"""Median size of the coefficients below which a picture is blank: the signs of nothing are noise, and all nothings alike."""
BLOCK_PAIRS = 1 << 18
"""Pairs compared at a time, so that what is in between stays in the processor's cache."""

_ROW, _COLUMN = np.mgrid[:SIDE_PX, :SIDE_PX]
# Coarsest first, and each coefficient beside the one across the diagonal, so that transposing leads from one to another.
_COARSEST = np.lexsort([key.ravel() for key in (_ROW, np.maximum(_ROW, _COLUMN), _ROW**2 + _COLUMN**2)])[1 : BITS + 1]
_DOWN, _ACROSS = (_COARSEST // SIDE_PX % 2).astype(np.uint8), (_COARSEST % 2).astype(np.uint8)
_PLACE = {int(number): place for place, number in enumerate(_COARSEST)}
_TRANSPOSED = np.array([_PLACE[number % SIDE_PX * SIDE_PX + number // SIDE_PX] for number in _COARSEST.tolist()])


class Near(NamedTuple):
    """Two hashes of one picture, by their places in what was compared, and the number of bits in which they differ."""

    query: int
    stored: int
    bits: int


def picture_hash(picture: Pixels) -> Words | None:
    """The hash [W] of a picture [H, W, 3]; None when there is nothing to see on it."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    coefficient_B = cv2.dct(small).ravel()[_COARSEST]
    if float(np.median(np.abs(coefficient_B))) < LEAST_CONTRAST:
        return None
    words: Words = _words((coefficient_B > 0)[None].astype(np.uint8))[0]
    return words


def turned_hashes(hash_SW: Words) -> Words:
    """The hashes [8, S, W] of the same pictures turned and mirrored in all eight ways, found without the pictures.

    Mirroring a picture changes the sign of every coefficient that is odd along that side; transposing swaps rows and columns.
    """
    bits_SB = np.unpackbits(hash_SW.astype(">u8").view(np.uint8).reshape(len(hash_SW), BITS // 8), axis=1)
    turned = [
        chosen_SB ^ (down * _DOWN + across * _ACROSS) % 2
        for chosen_SB in (bits_SB, bits_SB[:, _TRANSPOSED])
        for down in (0, 1)
        for across in (0, 1)
    ]
    return np.stack([_words(bits) for bits in turned])


def near_hashes(query_QW: Words, stored_SW: Words, most_bits: int = SAME_PICTURE_BITS) -> Iterator[Near]:
    """All pairs that differ in at most ``most_bits`` bits, in blocks: memory does not grow with the product."""
    step = max(1, BLOCK_PAIRS // max(1, len(stored_SW)))
    stored_WS = np.ascontiguousarray(stored_SW.T)
    half = WORDS // 2
    for start in range(0, len(query_QW), step):
        query_WB1 = np.ascontiguousarray(query_QW[start : start + step].T)[:, :, None]
        coarse_BS = _distance(query_WB1[:half], stored_WS[:half, None])
        # Few pairs are near in the coarser half; only they are looked at in full.
        queries, places = np.nonzero(coarse_BS <= most_bits)
        bits = coarse_BS[queries, places] + _distance(query_WB1[half:, queries, 0], stored_WS[half:, places])
        for index in np.flatnonzero(bits <= most_bits):
            yield Near(start + int(queries[index]), int(places[index]), int(bits[index]))


def _distance(left: Words, right: Words) -> npt.NDArray[np.uint8]:
    """Bits that differ, added up over the words of half a hash (the first axis)."""
    total = np.bitwise_count(left[0] ^ right[0])
    for mine, theirs in zip(left[1:], right[1:], strict=True):
        total += np.bitwise_count(mine ^ theirs)
    return np.asarray(total)


def _words(bits_SB: npt.NDArray[np.uint8]) -> Words:
    words: Words = np.ascontiguousarray(np.packbits(bits_SB, axis=1)).view(">u8").astype(np.uint64)
    return words
