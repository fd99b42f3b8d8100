"""Where files that other tools have really written are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import SHARED

CMU, CMU_MPP = "CMU-1-Small-Region", 0.499
"""The slide that most of them are of, and its micrometres per pixel."""


def interop_folder() -> Path:
    """Their folder; skips the test where there is none."""
    folder = Path(os.environ.get("PATHFM_TEST_INTEROP") or SHARED / "interop")
    if not folder.is_dir():
        pytest.skip(f"no files of other tools at {folder} (set PATHFM_TEST_INTEROP)")
    return folder
