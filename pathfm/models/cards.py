"""The cards of public encoders by name. Nothing here loads torch."""

from __future__ import annotations

import difflib

from pathfm.models.card_python import BRING_YOUR_OWN
from pathfm.models.card_rivals import rivals
from pathfm.models.card_table import PUBLIC
from pathfm.models.encoder_card import IMAGENET_MEAN, IMAGENET_STD, EncoderCard

__all__ = ["CARDS", "IMAGENET_MEAN", "IMAGENET_STD", "EncoderCard", "card_of_hub", "find_card", "similar_cards"]

_OWN = {card.name: card for card in sorted((*PUBLIC, *BRING_YOUR_OWN), key=lambda card: card.name)}
CARDS: dict[str, EncoderCard] = {**_OWN, **rivals(_OWN)}
"""Every encoder by name; names with an @ are other tools' recipes."""


def find_card(name: str) -> EncoderCard | None:
    """The card of that name, in whatever case; None: there is none."""
    return CARDS.get(name.lower())


def card_of_hub(hub_id: str) -> EncoderCard | None:
    """The card of the encoder that lies at ORG/NAME on the hub; the case does not matter there. None: there is none."""
    wanted = hub_id.lower()
    return next((card for card in CARDS.values() if card.name == card.base and card.hub_id.lower() == wanted), None)


def similar_cards(name: str) -> list[str]:
    """At most three names that somebody who wrote ``name`` may have meant, best first."""
    plain = {known.replace("-", ""): known for known in CARDS}
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), plain, n=3, cutoff=0.6)
    return [plain[found] for found in close]
