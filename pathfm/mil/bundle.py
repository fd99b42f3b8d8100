"""A locked classifier as a folder: everything that ``pathfm mil predict`` needs, and the hash of every byte of it.

Specified in ``docs/bundle.md``. The same training gives the same bytes: no time, host or path is inside.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from pathfm import __version__
from pathfm.errors import ExitCode, StoreError
from pathfm.faults import crash_point
from pathfm.mil.card import encoder_licence, model_card, without_names
from pathfm.mil_settings import MilSettings
from pathfm.store.commit import commit_dir, read_json, recover
from pathfm.store.interop.label_tables import spellings
from pathfm.study import ExtractSettings, TileSettings

FORMAT, VERSION = "pathfm-bundle", 1
FILE, METRICS, MODEL_CARD, MEMBERS, ENCODER = "bundle.json", "metrics.json", "MODEL_CARD.md", "members", "encoder"
DRIFT = "drift.json"
MEMBER_FACTS = ("fold", "member", "network", "aggregator_code", "precision", "tasks", "states", "sha256")
"""What of a kept network's facts goes into the bundle."""
ENCODER_SUFFIXES = frozenset({".json", ".safetensors", ".csv", ".md", ".txt", ""})
"""Files of an encoder folder that are copied: weights, configuration, manifest, licence; nothing that could be run."""
OF_ONE_COHORT = ("features", "split")
"""Settings of training that name files of its cohort."""
PLACES = (("coords",), ("tissue", "annotations"))
"""Tile settings that name folders of one cohort. A bundle keeps none of them, but says that they are needed."""


class BundleError(StoreError):
    """A bundle that must not be used: nothing has been done with it."""

    exit_code = ExitCode.USAGE


@dataclass(frozen=True)
class TrainingSlide:
    """One slide that networks, thresholds or calibration were fitted on.

    Attributes:
        slide_id: from the cohort table.
        patient_id: whom it belongs to (the slide_id where each slide is its own patient).
        identity: hash of the slide's content, as its tile store has it; empty where unknown.
        tiles: in its bag.
        mpp: of its tiles [um per px], None where unknown.
    """

    slide_id: str
    patient_id: str
    identity: str
    tiles: int
    mpp: float | None


@dataclass(frozen=True)
class EncoderFacts:
    """What made the features.

    Attributes:
        name: as reports call it, without a path.
        identity: what must agree before features are mixed: the recipe with the hash of the weights, as text.
        dim: length of a feature vector.
        folder: the encoder's own folder, which is copied; None for public ones, which are named by their weights' hash.
        licence: as its card says; empty where unknown.
    """

    name: str
    identity: Mapping[str, str]
    dim: int
    folder: Path | None = None
    licence: str = ""


@dataclass(frozen=True)
class BundleFacts:
    """What a training hands over to be locked.

    Attributes:
        mil: how it was trained; what is done about labels of new slides follows from it.
        tasks: record of the ``TaskSet``.
        trust: by task name, the record of its ``Trust``.
        members: folder of the main model's networks, ``fold-K/member-M.safetensors`` with ``.json`` beside each.
        encoder: what made the features.
        tile: how tiles were made.
        extract: how features were made.
        slides: everyone who was learned from, in any order.
        metrics: content of ``metrics.json``.
        names: ids of all slides and patients of the cohort, which the bundle must not name.
        drift: record of the ``DriftReference``; None: new slides are not compared with the training's.
    """

    mil: MilSettings
    tasks: Mapping[str, Any]
    trust: Mapping[str, Any]
    members: Path
    encoder: EncoderFacts
    tile: TileSettings
    extract: ExtractSettings
    slides: Sequence[TrainingSlide]
    metrics: Mapping[str, Any]
    names: Collection[str]
    drift: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte has been checked.

    Attributes:
        folder: where it lies.
        digest: SHA-256 of ``bundle.json``, which holds the hashes of all other files: the name of this classifier.
        facts: content of ``bundle.json``.
    """

    folder: Path
    digest: str
    facts: Mapping[str, Any]

    @property
    def member_names(self) -> list[str]:
        """Files of weights, in the order in which networks are asked."""
        return sorted(name for name in self.facts["files"] if name.startswith(f"{MEMBERS}/") and name.endswith(".safetensors"))

    @property
    def settings(self) -> MilSettings:
        """How it was trained, but for files of its cohort."""
        return MilSettings.model_validate(self.facts["mil"])

    @property
    def encoder_dir(self) -> Path | None:
        """The encoder inside, None for public ones."""
        return self.folder / ENCODER if self.facts["encoder"]["inside"] else None

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked again, so that what is used is what was promised.

        Raises:
            BundleError: it has changed since the bundle was opened.
        """
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise _refused(f"{name} cannot be read ({error.strerror})", self.folder) from error
        if hashlib.sha256(data).hexdigest() != self.facts["files"][name]:
            raise _refused(f"{name} is not the file that was locked", self.folder)
        return data

    def read_member(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights by name, and the facts beside them.

        Raises:
            BundleError: not a usable network.
        """
        try:
            return load(self.read(name)), json.loads(self.read(name.removesuffix(".safetensors") + ".json"))
        except (KeyError, ValueError, SafetensorError) as error:
            raise _refused(f"{name} is no usable network ({error})", self.folder) from error

    def trained_on(self, patient: str, identity: str) -> str:
        """``same patient``, ``same file``, or nothing: whether the networks learned from this slide's patient.

        Args:
            patient: patient_id, or the slide_id where there is none.
            identity: hash of the slide's content; empty where unknown.
        """
        known = self.facts["trained_on"]
        if identity and salted(known["salt"], "slide", identity) in known["slides"]:
            return "same file"
        names = {salted(known["salt"], "patient", name) for name in spellings(patient)}
        return "same patient" if names.intersection(known["patients"]) else ""


def salted(salt: str, kind: str, name: str) -> str:
    """How a name stands in a bundle: 128 bits of HMAC-SHA256 under the bundle's salt.

    Case, spaces around it and the way accents are written do not count. The salt keeps bundles from being compared with each
    other or with tables made before; whoever has the bundle and can list all possible names can still find one.
    """
    plain = unicodedata.normalize("NFC", name).strip().casefold()
    return hmac.new(bytes.fromhex(salt), f"{kind}\0{plain}".encode(), "sha256").hexdigest()[:32]


def write_bundle(folder: Path, facts: BundleFacts) -> str:
    """Writes the bundle, whole or not at all; the same facts give the same bytes.

    Returns:
        its digest.

    Raises:
        StoreError: there are no networks, one is damaged or of other tasks, or the drive fails.
    """
    with commit_dir(folder) as temporary:
        _copy_members(temporary, facts)
        _copy_encoder(temporary, facts.encoder.folder)
        metrics = without_names(facts.metrics, facts.names)
        _write(temporary / METRICS, _json(metrics))
        if facts.drift is not None:
            _write(temporary / DRIFT, _json(facts.drift))
        about = _about(facts, hash_files(temporary))
        _write(temporary / MODEL_CARD, model_card(about, metrics).encode())
        content = _json({**about, "files": hash_files(temporary)})
        _write(temporary / FILE, content)
        crash_point("mil.bundle.before_commit")
    return hashlib.sha256(content).hexdigest()


def open_bundle(folder: Path) -> Bundle:
    """Opens a bundle after checking every byte of it.

    Raises:
        BundleError: no bundle, one of a newer version, or a file that is changed, missing or too many, by its name.
    """
    recover(folder)
    if not (folder / FILE).is_file():
        fix = "name the folder that `pathfm mil train` wrote (OUT/mil/bundle)"
        raise BundleError(f"there is no bundle here ({FILE} is missing)", where=str(folder), fix=fix)
    try:
        facts = read_json(folder / FILE)
    except StoreError as error:
        raise _refused(f"{FILE} is {error.what}", folder) from error
    version = facts.get("version")
    if facts.get("format") != FORMAT or not isinstance(version, int) or not isinstance(facts.get("files"), dict):
        raise _refused(f"{FILE} does not describe a bundle", folder)
    if version > VERSION:
        what = f"the bundle is of version {version}, and this pathfm knows versions up to {VERSION}"
        raise BundleError(what, where=str(folder), fix=f"use pathfm {facts.get('code', '')} or newer")
    _check_files(folder, facts["files"])
    return Bundle(folder, hashlib.sha256((folder / FILE).read_bytes()).hexdigest(), facts)


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but ``bundle.json``, by its name from there; links count as strangers (no hash)."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }
    return {name: "" if path.is_symlink() else _digest(path) for name, path in found.items() if name != FILE}


def _check_files(folder: Path, wanted: Mapping[str, str]) -> None:
    found = hash_files(folder)
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} does not belong to it" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is not the file that was locked" for name in sorted(wanted) if name in found and found[name] != wanted[name]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise _refused("; ".join(problems[:5]) + more, folder)


def _copy_members(folder: Path, facts: BundleFacts) -> None:
    paths = sorted(facts.members.glob("fold-*/member-*.safetensors"))
    if not paths:
        raise StoreError("there are no finished networks", where=str(facts.members), fix="run `pathfm mil train` first")
    (folder / MEMBERS).mkdir()
    for path in paths:
        data, said = path.read_bytes(), read_json(path.with_suffix(".json"))
        if hashlib.sha256(data).hexdigest() != said.get("sha256") or _json(said.get("tasks")) != _json(facts.tasks):
            raise StoreError("a network is not the one that was trained", where=str(path), fix="run `pathfm mil train` again")
        name = f"fold-{int(said['fold']):03d}-member-{int(said['member']):03d}"
        _write(folder / MEMBERS / f"{name}.safetensors", data)
        _write(folder / MEMBERS / f"{name}.json", _json({key: said.get(key) for key in MEMBER_FACTS}))


def _copy_encoder(folder: Path, source: Path | None) -> None:
    if source is None:
        return
    (folder / ENCODER).mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in ENCODER_SUFFIXES and not path.name.startswith((".", "record")):
            _write(folder / ENCODER / path.name, path.read_bytes())


def _about(facts: BundleFacts, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Everything ``bundle.json`` says but the hashes of the files."""
    # What was assumed of the training's files is not known of others.
    encoder, tile, needs = facts.encoder, facts.tile.model_dump(mode="json") | {"assume_mpp": None}, []
    for *above, last in PLACES:
        table = tile[above[0]] if above else tile
        if table[last] is not None:
            needs.append(".".join(["tile", *above, last]))
        table[last] = None
    resolved = {"precision": encoder.identity.get("recipe_precision", facts.extract.precision), "also": [], "controls": False}
    is_path = facts.extract.encoder.startswith(("pretrained", "local-dir:"))
    resolved |= {"dense": False, "slide_vectors": [], "weights": None}
    resolved |= {"encoder": "pretrained"} if is_path else {}
    known_mpp = [slide.mpp for slide in facts.slides if slide.mpp is not None]
    return {
        "format": FORMAT,
        "version": VERSION,
        "code": __version__,
        "level": facts.mil.level,
        "mil": facts.mil.model_dump(mode="json", exclude=set(OF_ONE_COHORT)),
        "tasks": facts.tasks,
        "trust": facts.trust,
        "encoder": {
            "name": encoder.name,
            "identity": dict(encoder.identity),
            "dim": encoder.dim,
            "licence": encoder.licence or encoder_licence(facts.extract.encoder, encoder.folder),
            "inside": encoder.folder is not None,
        },
        "tile": tile,
        "extract": {**facts.extract.model_dump(mode="json"), **resolved},
        "needs": needs,
        "trained_with": {
            "mpp": [min(known_mpp), max(known_mpp)] if known_mpp else None,
            "fewest_tiles": min((slide.tiles for slide in facts.slides), default=0),
        },
        "trained_on": _trained_on(facts.slides, hashes),
    }


def _trained_on(slides: Sequence[TrainingSlide], hashes: Mapping[str, str]) -> dict[str, Any]:
    """Salted hashes, sorted, so that their order tells nothing. The salt comes from the weights: no chance is in a bundle."""
    salt = hashlib.sha256(_json({name: value for name, value in hashes.items() if name.startswith(MEMBERS)})).hexdigest()[:32]
    return {
        "salt": salt,
        "patients": _sorted(salted(salt, "patient", slide.patient_id) for slide in slides),
        "slides": _sorted(salted(salt, "slide", slide.identity) for slide in slides if slide.identity),
    }


def _sorted(hashes: Iterable[str]) -> list[str]:
    return sorted(set(hashes))


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _refused(what: str, folder: Path) -> BundleError:
    return BundleError(f"the bundle is not whole: {what}", where=str(folder), fix="copy it again from where it was made")


def locked_settings(bundle: Bundle, places: Mapping[str, str]) -> tuple[TileSettings, ExtractSettings]:
    """The settings by which new slides are treated as the training's were; pixels of tiles are not stored.

    Args:
        bundle: opened.
        places: folders that ``needs`` asks for, by setting; and what is assumed of new slides without mpp, if anything is.

    Raises:
        BundleError: a folder that is needed is not given.
    """
    missing = [name for name in bundle.facts["needs"] if not places.get(name)]
    if missing:
        what = f"its tiles were chosen with {missing[0]}, which new slides need too"
        raise BundleError(what, where=str(bundle.folder), fix=f"add --set {missing[0]}=FOLDER")
    tile = {**bundle.facts["tile"], "codec": "none", "assume_mpp": places.get("tile.assume_mpp")}
    tile["coords"] = places.get("tile.coords")
    tile["tissue"] = {**tile["tissue"], "annotations": places.get("tile.tissue.annotations")}
    return TileSettings.model_validate(tile), ExtractSettings.model_validate(bundle.facts["extract"])


def check_encoder(bundle: Bundle, identity: Mapping[str, str], dim: int, where: str) -> None:
    """Refuses features of another encoder, before hours of work or slide by slide.

    Raises:
        BundleError: what differs.
    """
    wanted = bundle.facts["encoder"]
    if dim != wanted["dim"]:
        what = f"{dim} features per tile, but the networks were trained on {wanted['dim']}"
        raise BundleError(what, where=where, fix=f"use the encoder {wanted['name']}")
    different = sorted(
        key for key in wanted["identity"].keys() | identity.keys() if wanted["identity"].get(key) != identity.get(key)
    )
    if different:
        name = different[0]
        what = f"another encoder than the networks were trained with: {name.removeprefix('recipe_')} is {identity.get(name)!r}"
        raise BundleError(
            f"{what}, not {wanted['identity'].get(name)!r}",
            where=where,
            fix=f"use the encoder {wanted['name']} and its weights",
        )
