"""``pathfm encoders``: which encoders are known by name, folders of them for machines without a network, and whether an encoder
gives here the features that it gave elsewhere.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.log import say
from pathfm.models.cards import CARDS, EncoderCard
from pathfm.store.commit import read_json, write_json

Features = npt.NDArray[np.float32]
ENCODER_FILES = {"config.json", "model.safetensors", "card.json"}
"""What a fetched folder holds; whatever holds anything else is left alone."""
FORMAT = "pathfm-features-1"
RECORDED = Path(__file__).parent / "models" / "recorded"
"""Features that come with pathfm: of networks whose random weights everybody can make. None is of published weights."""
TILES, TILE_PX = 4, 256
MAX_RELATIVE_ERROR = 1e-3
"""Largest difference to recorded float32 features, relative to their length; other machines round differently, far below."""
_LEGEND = (
    "here: the weights lie in this machine's cache. 256>224: resized to 256 px, of which the middle 224 px are seen.",
    "bring it: the network is code of others, which is not run from here; a function of yours, python:MODULE:FUNCTION,",
    "loads it and returns it with the card's name.",
    "Also: timm:NAME (any network of timm), hf-hub:ORG/NAME, local-dir:PATH, untrained:NAME.",
)


def list_encoders() -> str:
    """Tables of all encoders known by name, at most 120 columns wide. Touches no network and does not load torch."""
    from pathfm.models.hugging_face import is_here

    own = [card for card in CARDS.values() if card.name == card.base]
    others = [card for card in CARDS.values() if card.name != card.base]
    rows = [[*_facts(card), "bring it" if card.loader == "python" else "here" if is_here(card) else "-"] for card in own]
    heads = ("name", "dim", "input px", "trained at mpp", "pooling", "arithmetic", "licence", "gated", "weights")
    differing = [
        (card.name, str(card.dim), _input(card), card.pooling, card.precision or "-", card.interpolation) for card in others
    ]
    return "\n".join(
        [
            *_table(heads, rows),
            "",
            "As other tools compute them:",
            *_table(("name", "dim", "input px", "pooling", "arithmetic", "resize"), differing),
            "",
            *_LEGEND,
        ]
    )


def _facts(card: EncoderCard) -> list[str]:
    mpp = ", ".join(f"{value:g}" for value in sorted(card.mpp)) or "-"
    gated = "yes" if card.gated else "-"
    return [card.name, str(card.dim), _input(card), mpp, card.pooling, card.precision or "-", card.licence[:27], gated]


def _input(card: EncoderCard) -> str:
    return str(card.input_px) if card.resize_px == card.input_px else f"{card.resize_px}>{card.input_px}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]]


def fetch(name: str, out: Path) -> None:
    """Writes a folder with an encoder's weights and recipe that ``local-dir:`` takes on machines without a network.

    Args:
        name: as in ``extract.encoder``.
        out: the folder, which is absent, empty or holds nothing but an earlier encoder.

    Raises:
        UsageError: there is no such encoder, its weights are not to be had, or the folder holds something else.
        StoreError: the drive fails.
    """
    if out.exists() and not (out.is_dir() and all(_is_replaceable(path) for path in out.iterdir())):
        raise UsageError("there is something else already", where=str(out), fix="name a folder that is absent or empty")
    from pathfm.models.encoder_folders import write_folder
    from pathfm.models.networks import load_network

    if name.startswith("python:"):
        raise UsageError("a network of your own comes from your own files", where=name, fix="copy them")
    network = load_network(name)
    digest = write_folder(network.model, network.card, out)
    terms = f"; its licence goes with it: {network.card.licence}" if network.card.licence else ""
    say(f"{out}: {network.name}, weights {digest[:12]}{terms}. Use it as local-dir:{out}")


def _is_replaceable(path: Path) -> bool:
    return path.name in ENCODER_FILES and path.is_file()


def verify(name: str, against: Path | None = None, record: bool = False) -> ExitCode:
    """Computes features of built-in tiles in float32 on the processor, and compares them with recorded ones.

    Args:
        name: as in ``extract.encoder``.
        against: file of recorded features; None: those that come with pathfm (when recording: NAME.features.json here).
        record: write the file instead, on a machine whose features are right.

    Returns:
        SOME_FAILED when the features differ.

    Raises:
        UsageError: there is no such encoder, or nothing to compare with.
        StoreError: the file is damaged or of other tiles.
    """
    stem = Path(name).name.replace(":", "-")
    file = against or (Path(f"{stem}.features.json") if record else RECORDED / f"{stem}.json")
    if not record and not file.is_file():
        known = ", ".join(sorted(read_json(path)["encoder"] for path in RECORDED.glob("*.json"))) or "none"
        fix = f"make one with --record where the weights are, and name it with --against; recorded here: {known}"
        raise UsageError(f"no recorded features of {name}", where=str(file), fix=fix)
    from pathfm.models.calibration import calibration_tiles

    tiles = calibration_tiles(TILES, TILE_PX)
    recipe, features_ND = _computed(name, tiles)
    tiles_sha256 = hashlib.sha256(tiles.tobytes()).hexdigest()
    if record:
        write_json(file, _record(name, recipe, features_ND, tiles_sha256))
        say(f"{file}: {TILES} vectors of {features_ND.shape[1]} numbers, weights {recipe['weights_sha256'][:12]}")
        return ExitCode.DONE
    said = read_json(file)
    recorded_ND = _recorded(said, file, tiles_sha256)
    return _compared(name, recipe, features_ND, said["recipe"], recorded_ND)


def _computed(name: str, tiles: npt.NDArray[np.uint8]) -> tuple[dict[str, Any], Features]:
    import torch

    from pathfm.models.encoders import load_encoder
    from pathfm.study import ExtractSettings

    encoder = load_encoder(name, ExtractSettings(encoder=name, precision="fp32"), torch.device("cpu"))
    return dataclasses.asdict(encoder.recipe), encoder(tiles)


def _record(name: str, recipe: dict[str, Any], features_ND: Features, tiles_sha256: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "encoder": name,
        "recipe": recipe,
        "tiles_sha256": tiles_sha256,
        "shape": list(features_ND.shape),
        "features": base64.b64encode(features_ND.astype("<f4").tobytes()).decode("ascii"),
        "versions": {library: importlib.metadata.version(library) for library in ("timm", "torch")},
    }


def _recorded(said: dict[str, Any], file: Path, tiles_sha256: str) -> Features:
    if said.get("format") != FORMAT or not {"features", "shape", "recipe", "tiles_sha256"} <= said.keys():
        raise StoreError("no recorded features", where=str(file), fix="make them with pathfm encoders verify NAME --record")
    if said["tiles_sha256"] != tiles_sha256:
        raise StoreError("features of other tiles", where=str(file), fix="record them again with this version of pathfm")
    try:
        values = np.frombuffer(base64.b64decode(said["features"]), "<f4")
        return values.reshape(said["shape"]).astype(np.float32)
    except ValueError as error:
        raise StoreError(f"recorded features are damaged ({error})", where=str(file), fix="record them again") from error


def _compared(
    name: str, recipe: dict[str, Any], features_ND: Features, before: dict[str, Any], recorded_ND: Features
) -> ExitCode:
    # A recipe from a file has lists where it had tuples.
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.items()}
    names = {"encoder", "card", "weights_sha256", "network"}
    other = [
        f"{key} {before.get(key)}, here {value}"
        for key, value in plain.items()
        if key not in names and before.get(key, value) != value
    ]
    if other or features_ND.shape != recorded_ND.shape:
        say(f"{name}: another recipe ({'; '.join(other) or 'another dimension'})")
        return ExitCode.SOME_FAILED
    errors = np.linalg.norm(features_ND - recorded_ND, axis=1) / np.linalg.norm(recorded_ND, axis=1)
    cosines = (features_ND * recorded_ND).sum(1) / np.linalg.norm(features_ND, axis=1) / np.linalg.norm(recorded_ND, axis=1)
    same = plain["weights_sha256"] == before.get("weights_sha256")
    agrees = bool(np.all(errors <= MAX_RELATIVE_ERROR))
    weights = "the same" if same else "other"
    figures = f"largest relative error {errors.max():.1e}, least cosine {cosines.min():.7f}, {weights} weights"
    say(f"{name}: {'the recorded features' if agrees else 'OTHER FEATURES'} ({figures})")
    return ExitCode.DONE if agrees else ExitCode.SOME_FAILED
