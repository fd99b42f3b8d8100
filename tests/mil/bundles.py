"""A small bundle, made without training: two untrained networks, thresholds fitted on made-up scores, an encoder of text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save

from pathfm.mil.bundle import BundleFacts, EncoderFacts, TrainingSlide
from pathfm.mil.network import build_network, spec_of
from pathfm.mil.tasks import make_tasks
from pathfm.mil.trust import fit_trust
from pathfm.study import ExtractSettings, MilSettings, TileSettings

DIM = 8
IDENTITY = {"recipe_weights_sha256": "ab" * 32, "recipe_precision": "fp32", "recipe_input_px": "64"}
METRICS = {
    "format": 2,
    "fingerprint": "f" * 64,
    "primary": "encoder",
    "label": "label",
    "kind": "binary",
    "classes": ["normal", "tumour"],
    "positive": "tumour",
    "level": "patient",
    "n_slides": 40,
    "n_patients": 40,
    "models": {"encoder": {"auroc": {"value": 0.9, "low": 0.8, "high": 0.95, "method": "DeLong"}, "transductive": False}},
    "splits": {"scheme": "folds", "hash": "c0ffee"},
    "flow": {"slides": {"cohort": 42, "failed": 2, "used": 40}, "patients": {"cohort": 41, "failed": 1, "used": 40}},
    "subgroups": [{"column": "site", "value": "A|B", "n_patients": 20, "n_positive": 9, "auroc": None}],
    "comparisons": [{"model": "encoder", "other": "tile count", "metric": "auroc", "verdict": "not significantly different"}],
    "notes": ["a note", "sp07: its mask cannot be read", "patients p01, p02 share a file"],
    "leaks": [{"kind": "file", "slides": ["sp01", "sp02"], "patients": ["p01", "p02"], "detail": "sp01 is sp02"}],
}
SETTINGS = MilSettings(hidden=4, attention=2, ensemble=2)


def facts_in(folder, settings=SETTINGS, patients=40):
    """Networks in ``folder/models``, an encoder in ``folder/teacher``, and everything else that a bundle needs."""
    rows = [{"label": name} for name in ("normal", "tumour")] * (patients // 2)
    tasks, rng = make_tasks(settings, rows), np.random.default_rng(0)
    for number in range(2):
        spec = spec_of(settings, DIM, tasks.outputs)
        network = build_network(spec)
        network.draw_weights(torch.Generator().manual_seed(number))
        data = save({name: value.contiguous() for name, value in sorted(network.state_dict().items())})
        said = {"fold": number, "member": 0, "network": spec.record(), "tasks": tasks.record()}
        said |= {"states": {"label": {}}, "sha256": hashlib.sha256(data).hexdigest(), "host": "nobody's business"}
        path = folder / "models" / f"fold-{number}" / "member-0.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".json").write_text(json.dumps(said))
    teacher = folder / "teacher"
    teacher.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "card.json", "manifest.csv", "record.json", "run.py"):
        (teacher / name).write_text(name)
    target = tasks.encode(rows)
    score = np.clip(0.5 + 0.3 * (target[:, 0] - 0.5) + 0.1 * rng.normal(size=patients), 0.01, 0.99)
    names = [f"p{number:02d}" for number in range(patients)]
    mean = rng.normal(size=(patients, DIM))
    trust, _ = fit_trust(
        tasks.main, np.stack([1 - score, score], 1), target, names, [n % 5 for n in range(patients)], mean, settings.numbers
    )
    slides = tuple(TrainingSlide(f"s{name}", name, f"id-{name}", 20 + place, 0.5) for place, name in enumerate(names))
    return BundleFacts(
        mil=settings,
        tasks=tasks.record(),
        trust={"label": trust.record()},
        members=folder / "models",
        encoder=EncoderFacts("pretrained", IDENTITY, DIM, teacher),
        tile=TileSettings(tile_px=64),
        extract=ExtractSettings(precision="auto", also=("uni",)),
        slides=slides,
        metrics=METRICS,
        names=frozenset(name for slide in slides for name in (slide.slide_id, slide.patient_id)),
    )


def public(facts):
    """The same with an encoder that everybody can name."""
    encoder = replace(facts.encoder, name="timm:resnet10t.c3_in1k", folder=None)
    return replace(facts, encoder=encoder, extract=ExtractSettings(encoder="timm:resnet10t.c3_in1k"))
