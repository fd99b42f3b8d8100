"""Receipts: groups that new slides do not change, and files that tell when they were altered."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import StoreError
from pathfm.store.cohort import SlideRow, shard_of
from pathfm.store.receipts import (
    Receipt,
    SlideReceipt,
    group_count,
    groups_of,
    read_receipt,
    receipt_path,
    write_receipt,
)


def _rows(names):
    return [SlideRow(slide_id=name, path=Path(name), line=0) for name in names]


names = st.lists(st.text("abcdef0123", min_size=1, max_size=8), min_size=1, max_size=60, unique=True)


@given(names, st.integers(1, 20))
def test_every_slide_is_in_one_group_whatever_the_order(found, per_group):
    groups = groups_of(_rows(found), per_group)
    assert sorted(row.slide_id for rows in groups.values() for row in rows) == sorted(found)
    shuffled = found[:]
    random.Random(0).shuffle(shuffled)
    again = groups_of(_rows(shuffled), per_group)
    assert {group: {row.slide_id for row in rows} for group, rows in again.items()} == {
        group: {row.slide_id for row in rows} for group, rows in groups.items()
    }
    for group, rows in groups.items():
        assert shard_of(_rows(found), group) == rows


def test_a_new_slide_changes_its_own_group_only():
    before, after = _rows(f"s{number}" for number in range(100)), _rows(f"s{number}" for number in range(101))
    old, new = groups_of(before, 10), groups_of(after, 10)
    assert old.keys() == new.keys()
    assert sum(old[group] != new[group] for group in old) == 1


@pytest.mark.parametrize(("slides", "count"), [(1, 1), (64, 1), (65, 2), (129, 4), (10_000, 256)])
def test_groups_hold_at_most_about_what_was_asked(slides, count):
    assert group_count(slides, 64) == count


def test_a_receipt_comes_back_and_an_altered_one_is_refused(tmp_path):
    slides = (
        SlideReceipt("a", "done", fingerprint="f", artifacts={"tiles/x/a.zarr": "0" * 64}),
        SlideReceipt("b", "failed", "torn"),
    )
    receipt = Receipt("tile", "1-of-2", "abc", {"mpp": 0.5}, {"a": "1"}, slides, {"tiles/x": "9"}, {"where": "tiles"})
    write_receipt(tmp_path, receipt)
    path = receipt_path(tmp_path, "tile", "1-of-2")
    assert read_receipt(path) == receipt
    assert [slide.slide_id for slide in receipt.failed] == ["b"]
    assert receipt.all_artifacts == {"tiles/x/a.zarr": "0" * 64, "tiles/x": "9"}
    found = json.loads(path.read_text())
    found["slides"][0]["artifacts"]["tiles/x/a.zarr"] = "1" * 64
    path.write_text(json.dumps(found))
    with pytest.raises(StoreError, match="altered"):
        read_receipt(path)
    path.write_text('{"format": 1}')
    with pytest.raises(StoreError, match="not a receipt"):
        read_receipt(path)
    path.write_text('{"format": 99}')
    with pytest.raises(StoreError, match="another version"):
        read_receipt(path)
    assert read_receipt(tmp_path / "none.json") is None
