"""What a night batch is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathfm.batch.stop import Stop
    from pathfm.store.lease import Lease
    from pathfm.store.pseudonyms import Pseudonyms


@dataclass(frozen=True)
class BatchOptions:
    """How a night batch works; but for the pseudonyms, nothing here changes a result.

    Attributes:
        watch: go on until told to stop, else end when nothing is left to do.
        settle_s: a slide is whole when it was unchanged for so long [s].
        sentinel: instead, a slide is whole when a file of its name with this at the end is there.
        round: slides worked on together.
        min_free_gb: no work is begun with less free space in the outbox [10^9 bytes].
        new_bundle: another bundle than before is meant.
        pseudonym_key: file with the key by which names of slides become pseudonyms.
        dicom: also write DICOM objects.
    """

    watch: bool = False
    settle_s: float = 30.0
    sentinel: str = ""
    round: int = 8
    min_free_gb: float = 5.0
    new_bundle: bool = False
    pseudonym_key: Path | None = None
    dicom: bool = False


class Control(NamedTuple):
    """What a run is told by others: its options, the wish to stop, the right to write, and pseudonyms, if any."""

    options: BatchOptions
    stop: Stop
    lease: Lease
    names: Pseudonyms | None = None
