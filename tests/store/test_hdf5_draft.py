"""New HDF5 files: the bytes that HDF5 itself would write, with gaps; a full disk is an error like any other."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathfm.errors import StoreError
from pathfm.store import hdf5_draft
from pathfm.store.feature_file import FeatureWriter, open_features
from pathfm.store.hdf5_draft import write_hdf5
from pathfm.store.slide_vectors import write_slide_vector

ATTRS = {f"recipe_{number}": "word" * number for number in range(30)}


def _fill(file):
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    created.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    created.set_obj_track_times(False)
    space = h5py.h5s.create_simple((2**14, 2**12))
    made = h5py.h5d.create(file.id, b"large", h5py.h5t.NATIVE_FLOAT, space, created)
    file.create_dataset("small", data=np.arange(5), track_times=False)
    file.attrs.update(ATTRS)
    return made.get_offset()


@pytest.mark.parametrize("libver", ["latest", ("v110", "v110")])
@pytest.mark.parametrize("memory", [hdf5_draft.MEMORY, Path("/absent")])
def test_the_bytes_are_those_of_hdf5_and_gaps_take_no_room(tmp_path, monkeypatch, libver, memory):
    monkeypatch.setattr(hdf5_draft, "MEMORY", memory)
    with h5py.File(tmp_path / "plain.h5", "w", libver=libver) as file:
        start = _fill(file)
    assert write_hdf5(tmp_path / "a.h5", libver, _fill) == start
    with (tmp_path / "plain.h5").open("rb") as plain, (tmp_path / "a.h5").open("rb") as made:
        while block := plain.read(2**24):
            assert made.read(2**24) == block
        assert not made.read()
    size = (tmp_path / "a.h5").stat()
    assert size.st_blocks * 512 < 2**20 < 2**28 < size.st_size


@pytest.mark.parametrize("full", ["write", "truncate", "close"])
def test_a_full_disk_is_told_in_one_line_and_hdf5_goes_on(tmp_path, monkeypatch, full):
    def fail(self, *_):
        io.FileIO.close(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    kind, plain_open = type("Full", (io.FileIO,), {full: fail}), Path.open

    def opened(path, mode="r", *args, **options):
        return kind(path, mode) if mode == "wb" else plain_open(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    coords = np.zeros((3, 2), np.int64)
    with pytest.raises(StoreError, match=r"a\.h5: the disk is full \(make room"):
        FeatureWriter(tmp_path / "a.h5", 3, 4, "float16", coords, ATTRS)
    with pytest.raises(StoreError, match=r"v\.h5: the disk is full \(make room"):
        write_slide_vector(tmp_path / "v.h5", np.zeros(3, np.float32), ATTRS)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0
    with FeatureWriter(tmp_path / "a.h5", 3, 4, "float16", coords, ATTRS) as writer:
        writer.write(0, np.ones((3, 4), np.float32))
    assert open_features(tmp_path / "a.h5").features.all()


def test_no_room_for_the_draft_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_draft, "MEMORY", Path("/absent"))
    monkeypatch.setattr(hdf5_draft.tempfile, "gettempdir", lambda: "/absent/too")
    with pytest.raises(StoreError, match="/absent/too: temporary files cannot be written"):
        write_hdf5(tmp_path / "a.h5", "latest", _fill)
    assert list(tmp_path.iterdir()) == []
