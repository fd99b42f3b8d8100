"""What a study's own encoder depends on, as plain values: the slides of a frozen list, settings, and weights it starts from.

At its first pretraining a study freezes the list of its pretraining slides. From then on a new slide changes nothing: tiles and
features of the others stay current, and the encoder has not seen the new one. A slide that leaves the cohort counts for the
encoder that has learned from it, and takes no part in the next one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pathfm.config import fingerprint
from pathfm.pretrain_settings import PATH_SCHEMES, PretrainSettings
from pathfm.store.manifest import file_digest
from pathfm.store.pinned import Pinned

Stores = Mapping[str, str]
"""slide_id -> fingerprint of its tile store."""


def encoder_fingerprint(stores: Stores, facts: Mapping[str, Mapping[str, str]], settings: PretrainSettings) -> str:
    """Of everything that an encoder depends on.

    Args:
        stores: the slides that it is pretrained on.
        facts: columns of the cohort table by slide_id, for sampling weights; those of other slides do not count.
        settings: of pretraining; what they name by a path counts by content.
    """
    from pathfm.pretrain import VERSION

    known = {slide_id: dict(row) for slide_id, row in facts.items() if slide_id in stores}
    weights = origin_digests(settings)
    return fingerprint({"version": VERSION, "stores": dict(stores), "facts": known, "weights": weights}, settings.decisive())


def origin_digests(settings: PretrainSettings) -> list[str]:
    """Of what pretraining starts and learns from. Of where it starts nothing but the weights is taken; a teacher sees tiles."""
    return [_weights_digest(settings.init), encoder_digest(settings.teacher)]


def encoder_digest(name: str | None) -> str:
    """Of what lies behind a name that is a path: another encoder under the same name gives other features. Else empty.

    Raises:
        StoreError: the card of an encoder's folder is damaged.
    """
    scheme, _, rest = (name or "").partition(":")
    if scheme != "local-dir":
        return _weights_digest(name)
    from pathfm.models.encoder_folders import folder_digest

    return folder_digest(Path(rest))


def _weights_digest(name: str | None) -> str:
    scheme, _, rest = (name or "").partition(":")
    file = Path(rest, "model.safetensors") if scheme == "local-dir" else Path(rest)
    return file_digest(file) if scheme in PATH_SCHEMES and file.is_file() else ""


def counted(pinned: Pinned | None, present: Stores, tiling: str, held_out: Collection[str]) -> dict[str, str]:
    """The slides that the encoder in use counts on.

    Args:
        pinned: the list; None: there is none yet.
        present: slides of the cohort with tiles, without those held out.
        tiling: digest of the tile settings.
        held_out: slides that pretraining must not see.

    Returns:
        Without a list all that are present. Else those of the list, where one that is not present counts as it was, as long as
        tiles are made as they were.
    """
    if pinned is None or not pinned.slides:
        return dict(present)
    as_before = {slide_id: slide.store for slide_id, slide in pinned.slides.items() if pinned.tiling == tiling}
    listed = {slide_id: present.get(slide_id, as_before.get(slide_id, "")) for slide_id in pinned.slides}
    return {slide_id: store for slide_id, store in listed.items() if store and slide_id not in held_out}


def trainable(pinned: Pinned | None, present: Stores) -> dict[str, str]:
    """The slides that the next encoder is pretrained on: those of the list that are present, or all without a list."""
    return {
        slide_id: store
        for slide_id, store in present.items()
        if pinned is None or not pinned.slides or slide_id in pinned.slides
    }
