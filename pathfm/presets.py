"""Presets of pretraining as data: what each differs in from the settings page, whose defaults are dinov2-path.

Sources: DINO (Caron et al. 2021), iBOT (Zhou et al. 2022), DINOv2 (Oquab et al. 2023; the values of its short configuration),
DINOv3 (Simeoni et al. 2025), Virchow2 (Zimmermann et al. 2024: ECT crops, KDE), and Virchow2G-Mini for distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NATURAL_CROPS: dict[str, Any] = {
    "scale_of": "tile",
    "global_scale": (0.32, 1.0),
    "local_scale": (0.05, 0.32),
    "aspect": (3 / 4, 4 / 3),
    "flips": "horizontal",
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "hed": 0.0,
    "hed_probability": 0.0,
    "blur_probability": (1.0, 0.1, 0.5),
    "solarize_probability": (0.0, 0.2, 0.0),
}
_DINO: dict[str, Any] = {
    "registers": 0,
    "centering": "softmax",
    "kde_weight": 0.0,
    "crops": _NATURAL_CROPS,
    "sampling": {"slide_power": 1.0},
}
_DINOV2: dict[str, Any] = {**_DINO, "koleo_weight": 0.1, "drop_path": 0.3, "prototypes": 65_536}

PRESETS: dict[str, dict[str, Any]] = {
    "dino": {
        **_DINO,
        "ibot_weight": 0.0,
        "mask_probability": 0.0,
        "layer_scale": 0.0,
        "prototype_norm": "fixed",
        "drop_path": 0.1,
        "prototypes": 65_536,
        "lr": 2e-3,
        "layer_decay": 1.0,
        "patch_embed_lr": 1.0,
        "ema": (0.996, 1.0),
        "crops": {**_NATURAL_CROPS, "global_scale": (0.25, 1.0), "local_scale": (0.05, 0.25)},
    },
    "ibot": {
        **_DINO,
        "layer_scale": 0.0,
        "drop_path": 0.1,
        "lr": 2e-3,
        "layer_decay": 1.0,
        "patch_embed_lr": 1.0,
        "ema": (0.996, 1.0),
    },
    "dinov2": _DINOV2,
    "dinov2-as-released": {**_DINOV2, "crops": {**_NATURAL_CROPS, "blur_probability": (0.0, 0.9, 0.5)}},
    "dinov2-path": {},
    "dinov3": {
        **_DINO,
        "registers": 4,
        "positions": "rope",
        "separate_ibot_head": True,
        "prototype_norm": "none",
        "centering": "sinkhorn",
        "koleo_weight": 0.1,
        "mask_ratio": (0.5, 0.5),
        "schedule": "constant",
        "lr": 2e-4,
        "weight_decay": (0.04, 0.04),
        "layer_decay": 0.98,
        "beta2": 0.99,
        "ema": (0.994, 0.994),
        "clip_norm": 30.0,
        "gram": {"start": 0.8},
        "crops": {**_NATURAL_CROPS, "flips": "none"},
    },
    "distill": {
        "registers": 0,
        "mask_probability": 0.0,
        "kde_weight": 0.0,
        "lr": 1e-3,
        "layer_decay": 1.0,
        "crops": {"local_count": 0},
    },
}


def filled_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the values of their preset where they name none; an unknown preset fills in nothing."""
    return _merged(PRESETS.get(str(given.get("preset", "dinov2-path")), {}), given)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key, value in below.items():
        over = above.get(key, value)
        if isinstance(value, Mapping) and isinstance(over, Mapping):
            merged[key] = _merged(value, over)
    return merged
