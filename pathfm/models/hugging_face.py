"""Files of the Hugging Face hub: from this machine where they lie here, else over the network, else a line on what to do.

What is here is used as it is, and then no network is touched; with ``HF_HUB_OFFLINE=1`` none is touched at all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from pathfm.errors import UsageError
from pathfm.models.cards import EncoderCard, card_of_hub

WHERE = "extract.encoder"
CONFIG_NAMES = ("config.json",)
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")


def weight_names(card: EncoderCard) -> tuple[str, ...]:
    """What the file with a card's weights may be called, best first."""
    return (card.weights_file,) if card.weights_file else WEIGHT_NAMES


def is_here(card: EncoderCard) -> bool:
    """Whether the weights of an encoder lie in this machine's cache; looks at no network."""
    return bool(card.hub_id) and _cached(card.hub_id, weight_names(card)) is not None


def hub_file(hub_id: str, names: Sequence[str], encoder: str) -> Path:
    """The first of some files that a place on the hub has, on this machine.

    Args:
        hub_id: ORG/NAME, or ORG/NAME@REVISION.
        names: of the files, best first.
        encoder: how the user calls it, for messages.

    Raises:
        UsageError: it is not here and cannot be had: there is no network, no permission, or no such file.
    """
    found = _cached(hub_id, names)
    if found is not None:
        return found
    if _is_offline():
        raise UsageError(
            f"the weights of {encoder} are not on this machine, and HF_HUB_OFFLINE is set",
            where=WHERE,
            fix=_advice(hub_id, encoder),
        )
    repository, _, revision = hub_id.partition("@")
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None))
        except LocalEntryNotFoundError as error:  # no answer; also an EntryNotFoundError, so it must come first
            raise _refusal("the hub does not answer", hub_id, encoder) from error
        except EntryNotFoundError:
            continue
        except GatedRepoError as error:
            raise _refusal("its licence has to be accepted first", hub_id, encoder) from error
        except RepositoryNotFoundError as error:
            raise _refusal("the hub has no such place, or it is private", hub_id, encoder) from error
        except (OSError, ValueError) as error:
            raise _refusal(_first_line(error), hub_id, encoder) from error
    raise _refusal(f"none of {', '.join(names)} lies there", hub_id, encoder)


def hub_folder(hub_id: str, names: Sequence[str], encoder: str) -> Path:
    """A folder with the configuration and the weights of one revision; arguments and errors as of ``hub_file``."""
    # What is fetched may be newer than what lay here: the last file is then of the newer revision.
    files = [hub_file(hub_id, wanted, encoder) for wanted in (names, CONFIG_NAMES, names)]
    return files[-1].parent


def _cached(hub_id: str, names: Sequence[str]) -> Path | None:
    repository, _, revision = hub_id.partition("@")
    for name in names:
        found = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _refusal(why: str, hub_id: str, encoder: str) -> UsageError:
    return UsageError(f"the weights of {encoder} cannot be had from the hub: {why}", where=WHERE, fix=_advice(hub_id, encoder))


def _advice(hub_id: str, encoder: str) -> str:
    place = hub_id.partition("@")[0]
    card = card_of_hub(place)
    terms = (
        f"accept its terms at https://huggingface.co/{place} and log in (hf auth login)" if card is None or card.gated else ""
    )
    elsewhere = f"run pathfm encoders fetch {encoder} --out DIR where there is a network, then use local-dir:DIR here"
    return f"{f'{terms}; or ' if terms else ''}{elsewhere}; or set extract.weights to the file"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
