"""Named crash points, so that tests can kill a run exactly where a kill would hurt most.

``PATHFM_CRASH_AT=store.commit.before_rename`` kills the process with SIGKILL when it first reaches that point;
``PATHFM_CRASH_AT=pretrain.step:17`` at the 17th time. Without the variable a crash point costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Kill this process with SIGKILL if ``PATHFM_CRASH_AT`` names this point (and, after a colon, this pass)."""
    wanted = os.environ.get("PATHFM_CRASH_AT")
    if not wanted:
        return
    point, _, count = wanted.partition(":")
    if point != name:
        return
    _passed[name] += 1
    if _passed[name] >= int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
