"""What is to be extracted: the encoder of the study and its controls, each with its recipe and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pathfm.config import fingerprint
from pathfm.errors import UsageError
from pathfm.extract.colour import LEVELS, colour_histogram
from pathfm.extract.stream import DeviceEncode
from pathfm.extract.tiles import HostEncode
from pathfm.geometry import effective_mpp
from pathfm.models.cards import find_card
from pathfm.models.encoders import TileEncoder, check_pinned, load_encoder
from pathfm.store.dense_store import read_dense_attrs
from pathfm.store.feature_file import read_feature_attrs
from pathfm.store.layout import Layout
from pathfm.store.record import library_versions
from pathfm.store.tile_store import TileStore
from pathfm.study import ExtractSettings, Study

VERSION = 2
"""Raised whenever the features of the same tiles change."""
COLOUR = "colour-histogram"
MAIN, UNTRAINED, COLOURS, DENSE, ALSO = "main", "untrained", "colour", "dense", "also"
POOLED = {"pooling", "symmetry", "scales", "dim", "compiled"}
"""What of a recipe does not concern patch tokens."""
LIBRARIES = ("pathfm", "torch", "timm")
"""Whose versions every feature file names."""


@dataclass(frozen=True)
class FeatureSet:
    """One kind of features of a run and where they go.

    Attributes:
        role: main, untrained, colour, dense, or also with a number.
        name: what reports call it.
        recipe: everything that decides the features, for the attributes and the fingerprint.
        folder: its files, one per slide.
    """

    role: str
    name: str
    recipe: Mapping[str, Any]
    folder: Path

    @property
    def digest(self) -> str:
        """Hash of the recipe."""
        return fingerprint({"version": VERSION, "recipe": dict(self.recipe)})

    def path(self, slide_id: str) -> Path:
        """The features of a slide."""
        return self.folder / f"{slide_id}{'.zarr' if self.role == DENSE else '.h5'}"

    def fingerprint(self, store: TileStore) -> str:
        """What the features of a slide depend on."""
        return fingerprint({"version": VERSION, "recipe": dict(self.recipe), "store": store.fingerprint})

    def is_current(self, store: TileStore) -> bool:
        """Whether the features of these tiles are there, whole, and what would be made now."""
        read = read_dense_attrs if self.role == DENSE else read_feature_attrs
        attrs = read(self.path(store.slide_id))
        return attrs is not None and attrs.get("fingerprint") == self.fingerprint(store)

    def attributes(self, store: TileStore) -> dict[str, str | int | float | bool]:
        """What a file says of its features besides them; specified in ``docs/feature-file.md``."""
        mpp, input_px = store.mpp, int(self.recipe.get("input_px", store.tile_px))
        seen = effective_mpp(mpp, store.tile_px, int(self.recipe.get("resize_px", input_px)))
        unknown = float("nan")
        return {
            "slide_id": store.slide_id,
            "encoder": self.name,
            "recipe_hash": self.digest,
            "fingerprint": self.fingerprint(store),
            "store_fingerprint": store.fingerprint,
            "tile_px": store.tile_px,
            "tile_side_level0": store.tile_sides_level0[0],
            "tile_height_level0": store.tile_sides_level0[1],
            "slide_width_level0": store.size_level0.width,
            "slide_height_level0": store.size_level0.height,
            "mpp": unknown if mpp is None else mpp,
            "effective_mpp": unknown if seen is None else seen,
            "coords_synthetic": store.coords_synthetic,
            **({"objective": float(store.attrs["objective"])} if store.attrs.get("objective") else {}),
            **{f"version_{name}": version for name, version in library_versions().items() if name in LIBRARIES},
            **{f"recipe_{key}": _plain(value) for key, value in self.recipe.items()},
        }


def _plain(value: object) -> str | int | float | bool:
    return value if isinstance(value, (str, int, float, bool)) else str(value)


@dataclass(frozen=True)
class FeatureSets:
    """All features of a run.

    Attributes:
        sets: numbered from 0; the main one is the first.
        device: by number, what computes those that a device computes.
        host: by number, length and function of those that the decoding threads compute.
        main: the study's encoder.
        asked: the main one and the further ones, whose recipes must suit the tiles.
    """

    sets: tuple[FeatureSet, ...]
    main: TileEncoder
    asked: tuple[TileEncoder, ...] = ()
    device: Mapping[int, DeviceEncode] = field(default_factory=dict)
    host: Mapping[int, tuple[int, HostEncode]] = field(default_factory=dict)

    def stale(self, store: TileStore) -> tuple[int, ...]:
        """Numbers of the sets that are to be made of these tiles."""
        return tuple(number for number, features in enumerate(self.sets) if not features.is_current(store))

    @property
    def by_role(self) -> dict[str, FeatureSet]:
        """The sets by what they are for."""
        return {features.role: features for features in self.sets}


def load_sets(study: Study, layout: Layout, own: Path | None, device: torch.device) -> FeatureSets:
    """Loads the encoders.

    Args:
        study: all settings.
        layout: where features go.
        own: folder of the study's own encoder, for ``extract.encoder=pretrained``.
        device: where encoders run.

    Raises:
        UsageError: no such encoder, or its weights are not to be had here or not those that the settings name by hash, or the
            study has none of its own yet.
    """
    settings = study.extract
    make = partial(_feature_set, layout=layout, dtype=settings.dtype)
    sets: list[FeatureSet] = []
    encoders: dict[str, TileEncoder] = {}
    for role, (label, name) in _encoder_names(settings, own).items():
        if role == MAIN and (pinned := settings.encoder_sha256):
            check_pinned(name, pinned)
        encoders[role] = load_encoder(name, _settings_of(role, settings), device, compiled=study.compute.compile)
        sets.append(make(role, label, {**asdict(encoders[role].recipe), "encoder": label}))
    on_device: dict[int, DeviceEncode] = {number: encoder.features for number, encoder in enumerate(encoders.values())}
    if settings.dense:
        on_device[len(sets)] = encoders[MAIN].dense
        unpooled = {name: value for name, value in sets[0].recipe.items() if name not in POOLED}
        sets.append(make(DENSE, sets[0].name, unpooled))
    host: dict[int, tuple[int, HostEncode]] = {}
    if settings.controls:
        host[len(sets)] = LEVELS**3, colour_histogram
        sets.append(make(COLOURS, COLOUR, {"encoder": COLOUR, "dim": LEVELS**3}))
    asked = tuple(encoder for role, encoder in encoders.items() if role != UNTRAINED)
    return FeatureSets(tuple(sets), encoders[MAIN], asked, on_device, host)


def _settings_of(role: str, settings: ExtractSettings) -> ExtractSettings:
    """What is asked of the main encoder holds for its control, but for weights and merging; others have their own recipe."""
    if role == MAIN:
        return settings
    changed: dict[str, object] = {"weights": None, "merge_tokens": 0.0}
    if role.startswith(ALSO):
        changed |= {"pooling": "recipe", "input_px": None}
    return settings.model_copy(update=changed)


def _feature_set(role: str, name: str, recipe: Mapping[str, Any], layout: Layout, dtype: str) -> FeatureSet:
    whole = {**recipe, "dtype": dtype}
    digest = fingerprint({"version": VERSION, "recipe": whole})
    return FeatureSet(role, name, whole, layout.features(f"{name}{'-dense' if role == DENSE else ''}", digest))


def _encoder_names(settings: ExtractSettings, own: Path | None) -> dict[str, tuple[str, str]]:
    """By role: what folders and reports call the encoder, and the name it is loaded by. The main one is the first."""
    if settings.encoder == "pretrained":
        names = _own_names(settings, own)
    else:
        names = {MAIN: (_label(settings.encoder), settings.encoder)}
        if settings.controls and (untrained := _untrained_name(settings.encoder)):
            names[UNTRAINED] = (untrained, untrained)
    others = [name for name in dict.fromkeys(settings.also) if name != settings.encoder]
    return names | {f"{ALSO} {number}": (_label(name), name) for number, name in enumerate(others)}


def _label(name: str) -> str:
    scheme, _, rest = name.partition(":")
    card = find_card(name)
    # A folder is named without its path: where it lies is nobody's business, and its weights are hashed anyway.
    return f"{scheme}:{Path(rest).name}" if scheme == "local-dir" else card.name if card else name


def _own_names(settings: ExtractSettings, own: Path | None) -> dict[str, tuple[str, str]]:
    if own is None or not (own / "teacher" / "config.json").is_file():
        raise UsageError(
            "the study has no encoder yet", where=str(own or ""), fix="run `pathfm pretrain`, or set extract.encoder=timm:NAME"
        )
    names = {MAIN: ("pretrained", f"local-dir:{own / 'teacher'}")}
    if settings.controls:
        names[UNTRAINED] = ("untrained", f"local-dir:{own / 'untrained'}")
    return names


def _untrained_name(encoder: str) -> str:
    """The same network without its training; empty where it cannot be built without its weights."""
    if encoder.startswith("timm:"):
        return encoder.replace("timm:", "untrained:", 1)
    card = find_card(encoder)
    return f"untrained:{encoder}" if card is not None and card.loader == "timm" else ""
