"""What all tests share: where real data and golden files are, and settings that make runs repeatable and quick."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch: many small tests are slowed down by many threads

import hypothesis
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("repeatable")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real slides and cohorts."""
    return _present(Path(os.environ.get("PATHFM_TEST_DATA") or SHARED / "data"), "real test data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden numbers, computed elsewhere."""
    data = os.environ.get("PATHFM_TEST_DATA")
    return _present((Path(data).parent if data else SHARED) / "golden", "golden files")


def _present(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        pytest.skip(f"no {what} at {folder} (set PATHFM_TEST_DATA)")
    return folder
