"""The end of a training: networks, thresholds and everything they depend on, locked as a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pathfm.errors import StoreError
from pathfm.mil.bundle import BundleFacts, EncoderFacts, TrainingSlide, open_bundle, write_bundle
from pathfm.mil.drift import DriftReference, fit_reference, slide_facts
from pathfm.mil.inputs import Deploy, MilInputs
from pathfm.mil.plan import Plan
from pathfm.mil.trust import Trust
from pathfm.store.tile_store import open_tiles

FOLDER = "bundle"


def lock(plan: Plan, inputs: MilInputs, deploy: Deploy, trust: Mapping[str, Trust], metrics: Mapping[str, Any]) -> str:
    """Writes ``bundle/`` in the mil folder; its digest comes back.

    Args:
        plan: who was learned from.
        inputs: where the networks are.
        deploy: how features of new slides are made.
        trust: by task name, fitted on all out-of-fold answers.
        metrics: content of ``metrics.json``.
    """
    first = plan.gathered.slides[plan.units[0].slide_ids[0]]
    facts = BundleFacts(
        mil=plan.settings,
        tasks=plan.tasks.record(),
        trust={name: found.record() for name, found in trust.items()},
        members=inputs.mil_dir / "models",
        encoder=EncoderFacts(inputs.main_name, first.encoder, first.dim, deploy.encoder_folder),
        tile=deploy.tile,
        extract=deploy.extract,
        slides=training_slides(plan),
        metrics=metrics,
        names=frozenset(plan.patients) | frozenset(plan.patients.values()),
        drift=training_drift(plan, metrics).record(),
    )
    return write_bundle(inputs.mil_dir / FOLDER, facts)


def is_locked(inputs: MilInputs) -> bool:
    """Whether the bundle of an earlier run is there, and whole."""
    try:
        open_bundle(inputs.mil_dir / FOLDER)
    except StoreError:
        return False
    return True


def training_slides(plan: Plan) -> list[TrainingSlide]:
    """Every slide that networks, thresholds or calibration were fitted on."""
    found = []
    for slide_id, facts in sorted(plan.gathered.slides.items()):
        store = plan.gathered.stores.get(slide_id)
        identity = str(store.attrs.get("identity") or "") if store else ""
        mpp = store.mpp if store else None
        found.append(TrainingSlide(slide_id, plan.patients[slide_id], identity, len(facts), mpp))
    return found


def training_drift(plan: Plan, metrics: Mapping[str, Any]) -> DriftReference:
    """What later slides are compared with: aggregates over all slides that were learned from and have a tile store."""
    slides = [slide_id for slide_id in sorted(plan.gathered.slides) if slide_id in plan.gathered.stores]
    means = [plan.gathered.slides[slide_id].mean_D for slide_id in slides]
    # Opened anew, because a store keeps the thumbnail that it was asked for.
    facts = [
        slide_facts(open_tiles(plan.gathered.stores[slide_id].path), mean[None])
        for slide_id, mean in zip(slides, means, strict=True)
    ]
    decisions = (metrics.get("trust") or {}).get("decisions") or {}
    patients = [plan.patients[slide_id] for slide_id in slides]
    return fit_reference(facts, means, patients, decisions.get("counts") or {}, metrics.get("positive") or "")
