"""``pathfm export encoder``: an encoder in one folder that others can use, with its model card, provenance and hashes."""

from __future__ import annotations

import csv
import datetime
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pathfm.config import fingerprint
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.log import say
from pathfm.store.commit import commit_dir, content_files
from pathfm.store.manifest import MANIFEST, file_digest, manifest_of
from pathfm.store.record import library_versions

if TYPE_CHECKING:
    from torch import nn

README, ONNX, RECORD = "README.md", "model.onnx", "record.json"
FILES, CONTENT = "files", "content"
"""Entries of the card of an exported encoder: SHA-256 of each file beside it, and a hash of all else that the card says."""
UNKNOWN_LICENCE = "not stated"
MODELS = ("teacher", "student")
NETWORKS = {"teacher": "EMA teacher", "student": "student", "untrained": "untrained"}
"""What is in the folders of an encoder, in the words of the model card."""


class Wanted(NamedTuple):
    """What goes into the folder: the student instead of the teacher, an ONNX file too, and the licence its card states."""

    student: bool = False
    onnx: bool = False
    licence: str = UNKNOWN_LICENCE


def export_encoder_folder(source: Path, out: Path, wanted: Wanted) -> ExitCode:
    """Writes an encoder to ``out``, whole or not at all: a timm folder, model card, manifest, by option ONNX.

    Args:
        source: a study file, its output folder, an encoder's folder with ``teacher/`` in it, or a timm folder.
        out: absent, empty, or an earlier export of the same weights.
        wanted: options.

    Raises:
        UsageError: there is no such encoder, there are several, or ``out`` holds something else.
        MissingExtraError: ONNX is wanted and its libraries are not installed.
        StoreError: the encoder is damaged, or the ONNX network differs from it.
    """
    from pathfm.models.checkpoints import CARD, CONFIG, WEIGHTS, load_encoder_folder

    if wanted.onnx:
        from pathfm.models.onnx_export import check_libraries

        check_libraries()
    folder = find_encoder(source, wanted.student)
    encoder = load_encoder_folder(folder)
    if not encoder.card:
        raise UsageError("an encoder without a card: not made by pathfm", where=str(folder), fix="name one that is")
    digest = file_digest(folder / WEIGHTS)
    _check_free(out, digest, folder)
    manifest, difference = manifest_of(folder), None
    card = {**encoder.card, **_stated(encoder.pretrained_cfg, manifest), "weights_sha256": digest, "licence": wanted.licence}
    card["network"] = NETWORKS.get(folder.name) or encoder.card.get("network", "encoder")
    with commit_dir(out) as temporary:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / name, temporary / name)
        if manifest:
            shutil.copyfile(manifest, temporary / MANIFEST)
        if wanted.onnx:
            card["onnx"], difference = _onnx(encoder.model, int(card["preprocessing"]["input_px"]), temporary)
        (temporary / README).write_text(model_card(card, encoder.model), encoding="utf-8")
        _write_json(temporary / CARD, _sealed(card, temporary))
        _write_json(temporary / RECORD, _record(difference))
    said = "" if difference is None else f", ONNX within {difference:.1g} of torch"
    say(f"export: {card['network']} of {folder} in {out}{said}")
    return ExitCode.DONE


def _sealed(card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The card with the hashes of the files beside it (``files``) and of all that it says itself (``content``)."""
    files = {path.relative_to(folder).as_posix(): file_digest(path) for path in content_files(folder)}
    sealed = {name: value for name, value in card.items() if name != CONTENT} | {FILES: files}
    return {**sealed, CONTENT: fingerprint(sealed)}


def find_encoder(source: Path, student: bool = False) -> Path:
    """The timm folder that a source means.

    Raises:
        UsageError: none, or several.
    """
    name = MODELS[student]
    if (source / "config.json").is_file():
        return source.parent / name if student and (source.parent / name).is_dir() else source
    if any((source / each).is_dir() for each in MODELS):
        found = [source / name] if (source / name / "config.json").is_file() else []
    else:
        found = sorted(folder.parent for folder in _out_folder(source).glob(f"encoder/*/{name}/config.json"))
    if not found:
        fix = "the student is kept when training ends" if student else "run `pathfm pretrain` to its end first"
        raise UsageError(f"no {name} of a pretrained encoder", where=str(source), fix=fix)
    if len(found) > 1:
        # Of several, the one that the settings mean as they are now.
        found = [folder for folder in found if folder.parent == _current_encoder(source)] or found
    if len(found) > 1:
        fix = f"name one of {', '.join(str(folder.parent) for folder in found)}"
        raise UsageError(f"{len(found)} encoders were pretrained here", where=str(source), fix=fix)
    return found[0]


def _current_encoder(source: Path) -> Path | None:
    from pathfm.pretraining import encoder_folder
    from pathfm.workflow import begin, open_study

    try:
        return encoder_folder(begin(open_study(source)))
    except (UsageError, StoreError):  # its slides may be elsewhere by now
        return None


def _out_folder(source: Path) -> Path:
    from pathfm.workflow import open_study

    return open_study(source).out


def _check_free(out: Path, digest: str, folder: Path) -> None:
    """Nothing is replaced but an earlier export of the same."""
    from pathfm.models.checkpoints import read_card

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    same = out.is_dir() and (read_card(out) or {}).get("weights_sha256") == digest
    if not same or out.resolve() == folder.resolve():
        raise UsageError("something else is there", where=str(out), fix="name another folder")


def _stated(prepared: dict[str, Any], manifest: Path | None) -> dict[str, Any]:
    """Preprocessing, and how many slides and patients the manifest lists."""
    recipe = {name: prepared.get(name) for name in ("mean", "std", "interpolation")}
    stated: dict[str, Any] = {"preprocessing": {"input_px": (prepared.get("input_size") or [224])[-1], **recipe}}
    if manifest:
        with manifest.open(encoding="ascii", newline="") as stream:
            lines = list(csv.DictReader(stream))
        patients = {line["patient"] for line in lines} - {""}
        stated["seen"] = {"slides": len(lines), "patients": len(patients)}
    return stated


def _record(difference: float | None) -> dict[str, Any]:
    """When, with what, and how near the ONNX file is to torch here: no content, it differs from machine to machine."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "stage": "export",
        "ended": now,
        "versions": library_versions(),
        "onnx_max_difference": difference,
        "outcomes": [],
    }


def _onnx(model: nn.Module, input_px: int, folder: Path) -> tuple[dict[str, Any], float]:
    from pathfm.models.onnx_export import write_onnx

    difference = write_onnx(model, input_px, folder / ONNX)
    hashes = {path.name: file_digest(path) for path in sorted(folder.glob(f"{ONNX}*"))}
    return {"sha256": hashes, "input": "images", "outputs": ["cls", "patch_mean"]}, difference


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


CARD_TEXT = """---
library_name: timm
license: {licence_tag}
tags: [timm, feature-extraction, pathology]
---
# {title}

Vision transformer for tissue tiles, {parameters:.1f} M parameters, {features} features. Made by pathfm ({preset}).

```python
import timm, torch
model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
images = torch.rand(1, 3, {input_px}, {input_px})  # RGB in 0..1, then (images - mean) / std
tokens = model.forward_features(images)            # [1, {tokens}, {features}]
features = torch.cat([tokens[:, 0], tokens[:, {prefix}:].mean(1)], 1)  # class token and mean patch
```

## Input

{input_lines}

## Training

{training_lines}

## Files

{file_lines}

## Limits

Trained without labels. Nothing here says that it suits a task: compare it with the controls of `pathfm mil`, on patients that
it has not seen ({manifest_words}). Not a medical device.

Licence: {licence}
"""


def model_card(card: dict[str, Any], model: nn.Module) -> str:
    """The model card as Markdown with the header that model hubs read; everything in it is in ``card`` too."""
    recipe = card["preprocessing"]
    prefix, patch_px = int(model.num_prefix_tokens), int(model.patch_embed.patch_size[0])  # type: ignore[arg-type,union-attr,index]
    inputs = {
        "resolution": f"{card['mpp']} um per px" if card.get("mpp") else "not one (see the tile stores)",
        "tiles": f"{card['tile_px']} px" if card.get("tile_px") else None,
        "input": f"{recipe['input_px']} px, any multiple of {patch_px} px",
        "mean": recipe["mean"],
        "std": recipe["std"],
        "resized by": recipe["interpolation"],
    }
    training = {name: card.get(name) for name in ("network", "preset", "differs", "steps", "step", "batch_size")}
    seen = card.get("seen")
    training |= {
        "init": card.get("init"),
        "slides": card.get("slides"),
        "listed in the manifest": f"slides: {seen['slides']}, patients: {seen['patients']}" if seen else None,
        "digest of the tile stores": card.get("stores_digest"),
        "fingerprint of the settings": card.get("settings_fingerprint"),
    }
    files = {"model.safetensors": card["weights_sha256"], **card.get("onnx", {}).get("sha256", {})}
    known = card["licence"] != UNKNOWN_LICENCE
    return CARD_TEXT.format(
        licence=card["licence"],
        licence_tag=card["licence"] if known else "other",
        title=f"{card.get('architecture', 'encoder')} ({card['network']})",
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        features=int(model.num_features),  # type: ignore[arg-type]
        preset=card.get("preset", "unknown preset"),
        input_px=recipe["input_px"],
        tokens=prefix + (recipe["input_px"] // patch_px) ** 2,
        prefix=prefix,
        input_lines=_listed(inputs),
        training_lines=_listed(training),
        file_lines=_listed({name: f"SHA-256 `{digest}`" for name, digest in files.items()}),
        manifest_words=f"`{MANIFEST}` says which those are" if seen else "no manifest says which those are",
    )


def _listed(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value not in (None, {}, ""))
