"""How other tools compute features "of the same encoder": NAME@TOOL, where they differ from one another.

As read in TRIDENT, slide2vec and STAMP; what is not named here is as on the encoder's own card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pathfm.models.encoder_card import IMAGENET_MEAN, IMAGENET_STD, EncoderCard

_CLS_1280 = {"pooling": "cls", "dim": 1280, "precision": "fp32"}
_RIVALS: dict[str, dict[str, Any]] = {
    "virchow2@trident": {"precision": "fp16"},
    "virchow2@slide2vec": {"precision": "fp16", "mpp": (0.5, 1.0, 2.0)},
    "virchow2@stamp": _CLS_1280,
    "virchow@trident": {"precision": "fp16"},
    "virchow@slide2vec": {"precision": "fp16"},
    "virchow@stamp": _CLS_1280,
    "uni2-h@trident": {"precision": "bf16"},
    "uni2-h@slide2vec": {"precision": "fp16"},
    "midnight@trident": {"pooling": "cls", "dim": 1536},
    "midnight@slide2vec": {},
    "h-optimus-0@trident": {"interpolation": "bilinear"},
    "h-optimus-0@slide2vec": {"interpolation": "bicubic"},
    "h-optimus-1@trident": {"interpolation": "bilinear"},
    "h-optimus-1@slide2vec": {"interpolation": "bicubic"},
    "h0-mini@trident": {
        "pooling": "cls",
        "dim": 768,
        "note": "resize and normalisation as its hub's timm configuration says; here the values expected there",
    },
    "h0-mini@slide2vec": {},
    "lunit-s8@trident": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    "gpfm@trident": {"precision": "fp16"},
    "gpfm@slide2vec": {"precision": "fp32"},
    "mstar@stamp": {"precision": "fp32"},
    "mstar@slide2vec": {"resize_px": 248, "interpolation": "bicubic"},
    "hibou-b@slide2vec": {"precision": "fp16"},
    "hibou-l@trident": {"precision": "fp32"},
    "hibou-l@slide2vec": {"precision": "fp16"},
    "genbio-pathfm@trident": {"precision": "bf16"},
    "genbio-pathfm@slide2vec": {"precision": "fp32", "interpolation": "bicubic"},
    "musk@trident": {},
    "musk@slide2vec": {"dim": 2048, "note": "package musk, with ms_aug"},
}
_TOOLS = {"trident": "TRIDENT", "slide2vec": "slide2vec", "stamp": "STAMP"}


def rivals(own: Mapping[str, EncoderCard]) -> dict[str, EncoderCard]:
    """The cards of other tools' recipes, made from the encoders' own cards."""
    return {
        name: dataclasses.replace(
            own[name.partition("@")[0]], **{"name": name, "source": _TOOLS[name.partition("@")[2]], **changes}
        )
        for name, changes in _RIVALS.items()
    }
