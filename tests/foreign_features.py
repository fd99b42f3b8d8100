"""One small cohort of features, written in the layout of each tool."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import zarr

from pathfm.models.pt_files import write_pt
from pathfm.store.feature_file import FeatureFile, open_features, write_features
from pathfm.store.interop.feature_writers import write_clam_features, write_stamp_features, write_trident_features

DIM, SIDE = 8, 256
ATTRS = {
    "fingerprint": "f",
    "encoder": "uni",
    "recipe_encoder": "uni",
    "recipe_hash": "1c0ffee5c0ffee",
    "tile_px": 256,
    "tile_side_level0": float(SIDE),
    "tile_height_level0": float(SIDE),
    "mpp": 0.5,
    "objective": 20.0,
    "slide_width_level0": 4096,
    "slide_height_level0": 4096,
}


@dataclass(frozen=True)
class Sample:
    """A slide."""

    slide_id: str
    patient_id: str
    label: str
    file: FeatureFile


def samples(folder: Path, patients: int = 12, seed: int = 0) -> list[Sample]:
    """Patients with one or two slides; tumours have a tile that no other slide has. Values that float16 holds exactly."""
    rng, made = np.random.default_rng(seed), []
    for patient in range(patients):
        tumour = patient % 2 == 1
        for number in range(1 + patient % 3 % 2):
            count = int(rng.integers(4, 8))
            values = rng.normal(size=(count, DIM))
            values[rng.integers(count), :2] += 4.0 * tumour
            cells = rng.permutation(16)[:count]
            xy = np.stack([cells % 4, cells // 4], axis=1).astype(np.int64) * SIDE
            path = folder / f"S{patient:02d}-{number}.h5"
            write_features(path, values.astype(np.float16), xy, ATTRS)
            made.append(Sample(path.stem, f"p{patient:02d}", "tumour" if tumour else "normal", open_features(path)))
    return made


def _clam(folder: Path, slide: Sample) -> None:
    for name in ("h5_files", "pt_files"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_clam_features(folder / "h5_files" / f"{slide.slide_id}.h5", slide.slide_id, slide.file)
    write_pt(folder / "pt_files" / f"{slide.slide_id}.pt", slide.file.features)


def _clam_pt(folder: Path, slide: Sample) -> None:
    (folder / "pt_files").mkdir(parents=True, exist_ok=True)
    write_pt(folder / "pt_files" / f"{slide.slide_id}.pt", slide.file.features)


def _trident(folder: Path, slide: Sample) -> None:
    place = folder / "20x_256px_0px_overlap/features_uni"
    place.mkdir(parents=True, exist_ok=True)
    write_trident_features(place / f"{slide.slide_id}.h5", slide.slide_id, slide.file)


def _trident_pt(folder: Path, slide: Sample) -> None:
    place = folder / "20x_256px_0px_overlap/features_uni"
    place.mkdir(parents=True, exist_ok=True)
    torch.save(slide.file.features, place / f"{slide.slide_id}.pt")


def _stamp(folder: Path, slide: Sample) -> None:
    place = folder / "uni-1c0ffee5" / slide.label
    place.mkdir(parents=True, exist_ok=True)
    write_stamp_features(place / f"{slide.slide_id}.h5", slide.slide_id, slide.file)


def _slide2vec(folder: Path, slide: Sample) -> None:
    place = folder / "tile_embeddings"
    place.mkdir(parents=True, exist_ok=True)
    features = slide.file.features.astype(np.float32)
    np.savez(place / f"{slide.slide_id}.npz", features=features, tile_index=np.arange(len(features)))
    meta = {"encoder_name": "uni", "num_tiles": len(features), "feature_dim": DIM}
    (place / f"{slide.slide_id}.meta.json").write_text(json.dumps(meta))


def _atlaspatch(folder: Path, slide: Sample) -> None:
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    facts = {"patch_size": 256, "patch_size_level0": SIDE, "level0_magnification": 20, "target_magnification": 20, "mpp": 0.5}
    with h5py.File(folder / "patches" / f"{slide.slide_id}.h5", "w") as file:
        file["features/uni"] = slide.file.features.astype(np.float32)
        sizes = np.tile([SIDE, SIDE, 0], (len(slide.file.coords), 1))
        file["coords"] = np.concatenate([slide.file.coords, sizes], axis=1).astype(np.int32)
        file.attrs.update(facts)


def _lazyslide(folder: Path, slide: Sample) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pathfm[interop]")
    import pyarrow

    store, count = folder / f"{slide.slide_id}.zarr", len(slide.file.coords)
    root = zarr.open_group(store, mode="w")
    root.attrs.update(
        {
            "tile_spec": {"tiles": {"width": 256, "height": 256, "base_downsample": 1}},
            "slide_properties": {"mpp": 0.5, "shape": [4096, 4096]},
        }
    )
    table = root.create_group("tables/uni_tiles")
    table.attrs.update({"region": "tiles", "instance_key": "tile_id"})
    table.create_array("X", data=slide.file.features.astype(np.float32))
    table.create_array("obs/tile_id", data=np.arange(count))
    shapes = store / "shapes/tiles"
    shapes.mkdir(parents=True)
    polygons = [_polygon(*corner) for corner in slide.file.coords.tolist()]
    columns = {"geometry": pyarrow.array(polygons, pyarrow.binary()), "tile_id": list(range(count))}
    parquet.write_table(pyarrow.table(columns), shapes / "shapes.parquet")


def _polygon(x: int, y: int) -> bytes:
    ring = [(x, y), (x + SIDE, y), (x + SIDE, y + SIDE), (x, y + SIDE), (x, y)]
    return struct.pack("<BIII", 1, 3, 1, len(ring)) + b"".join(struct.pack("<dd", *point) for point in ring)


def _pathfm(folder: Path, slide: Sample) -> None:
    write_features(folder / f"{slide.slide_id}.h5", slide.file.features, slide.file.coords, slide.file.attrs)


LAYOUTS = {
    "pathfm": _pathfm,
    "clam": _clam,
    "clam-pt": _clam_pt,
    "trident": _trident,
    "trident-pt": _trident_pt,
    "stamp": _stamp,
    "slide2vec": _slide2vec,
    "atlaspatch": _atlaspatch,
    "lazyslide": _lazyslide,
}
"""Writes a slide into a folder as a tool does."""


def write_layout(layout: str, folder: Path, slides: list[Sample]) -> Path:
    """All slides in the layout of a tool."""
    folder.mkdir(parents=True, exist_ok=True)
    for slide in slides:
        LAYOUTS[layout](folder, slide)
    return folder
