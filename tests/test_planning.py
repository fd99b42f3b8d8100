"""The plan counts what a step really has, warns of what will go wrong, and touches nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm.cli import app
from pathfm.config import load_study
from pathfm.errors import UsageError
from pathfm.planning import make_plan, plan_text, sustained_flops
from pathfm.pretrain.views import fitting_crops
from pathfm.pretrain_settings import CropSettings, PretrainSettings
from pathfm.study import CohortSettings, ComputeSettings, ExtractSettings, Study, TileSettings
from pathfm.tile.check import keep_note
from pathfm.tiling import say_keep_note
from pathfm.workflow import tile

COMPUTE = ComputeSettings(device="cpu", threads=1)


def study(pretrain=None, **changes) -> Study:
    return Study(pretrain=PretrainSettings(**(pretrain or {})), compute=COMPUTE, **changes)


def said(made: Study) -> str:
    return plan_text(make_plan(made, device_flops=1e11))


@pytest.mark.parametrize("crop_px", [112, 160, 224, 256, 400])
def test_the_keep_px_that_is_named_is_the_smallest_with_room(crop_px):
    crops = CropSettings(global_px=crop_px, local_px=16)
    note = keep_note(study({"crops": crops}, tile=TileSettings(tile_px=64)))
    wanted = int(note.split("tile.keep_px=")[1].split(",")[0])
    assert fitting_crops(crops, wanted, 16) == crops
    assert fitting_crops(crops, wanted - 1, 16) != crops
    assert keep_note(study({"crops": crops}, tile=TileSettings(tile_px=64, keep_px=wanted))) == ""
    assert keep_note(study({"crops": crops}, tile=TileSettings(tile_px=wanted))) == ""


def test_no_keep_px_where_none_is_wanted():
    assert "tile.keep_px=247" in keep_note(study())
    assert keep_note(study({"preset": "dinov2"})) == "", "crops that are shares of the tile fit any tile"
    assert keep_note(study(extract=ExtractSettings(encoder="timm:vit_tiny_patch16_224"))) == ""
    assert keep_note(study(cohort=CohortSettings(folder_of_tiles=True))) == "", "tiles that are cut already"
    assert "tile.keep_px=423" in keep_note(study({"high_resolution": {"start": 0.9}}))


def test_tiling_speaks_of_pretraining_only_where_the_study_does(capsys):
    say_keep_note(study())
    assert capsys.readouterr().out == ""
    say_keep_note(study({"steps": 77}))
    assert "tile.keep_px=247" in capsys.readouterr().out


def test_crops_shrink_to_the_tiles_and_the_plan_says_so():
    text = said(study({"steps": 5000}))
    assert "2 of 192 px" in text and "crops are 192 and 96 px" in text and "tile.keep_px=247" in text
    roomy = said(study({"steps": 5000}, tile=TileSettings(keep_px=247)))
    assert "2 of 224 px" in roomy and "keep_px" not in roomy


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"warmup_steps": 100, "steps": 100}, "warmup_steps >= steps"),
        ({"batch_size": 64, "accumulate": 8}, "KDE, Sinkhorn see 8 tiles at a time"),
        ({"preset": "dinov2", "batch_size": 8}, "KoLeo see 8 tiles"),
        ({"batch_size": 64}, "0.99 is steadier"),
        ({"preset": "distill", "teacher": "timm:vit_tiny_patch16_224"}, "learned from is not counted"),
    ],
)
def test_what_will_go_wrong_is_warned_of(changes, warned):
    assert warned in said(study({"backbone": "vit_tiny_patch16_224", **changes}))


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"init": "local-dir:nowhere"}, "pretrain.init: nowhere", "no such file"),
        ({"init": "dinov2:nowhere.pth"}, "pretrain.init: nowhere.pth", "no such file"),
        ({"init": "vit_small"}, "pretrain.init", "unknown weights 'vit_small'"),
        ({"preset": "distill", "teacher": "local-dir:nowhere"}, "pretrain.teacher: nowhere", "no such file"),
        ({"health": {"probe": "nowhere.csv"}}, "pretrain.health.probe: nowhere.csv", "no such file"),
        ({"high_resolution": {"start": 0.9}}, "pretrain.high_resolution.global_px", "no room for crops of 384 px"),
        ({"high_resolution": {"start": 0.9, "global_px": 300}}, "pretrain.high_resolution.global_px", "no whole number"),
        ({"high_resolution": {"start": 0, "global_px": 224}, "preset": "dinov2"}, "pretrain.high_resolution", "not larger"),
    ],
)
def test_what_the_run_would_refuse_the_plan_refuses(changes, where, what):
    with pytest.raises(UsageError) as caught:
        said(study({"backbone": "vit_tiny_patch16_224", **changes}))
    assert caught.value.where.startswith(where) and what in caught.value.what


def test_weights_that_are_there_or_elsewhere_are_no_matter(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for init in (f"local-dir:{tmp_path}", f"dinov2:{tmp_path / 'model.safetensors'}", "timm:vit_tiny_patch16_224"):
        assert "vit_tiny_patch16_224" in said(study({"backbone": "vit_tiny_patch16_224", "init": init}))


def test_a_high_resolution_phase_is_said_and_counted():
    tile = TileSettings(tile_px=512)
    plain, late = (
        make_plan(study({"backbone": "vit_tiny_patch16_224", "steps": 1000, **changes}, tile=tile), device_flops=1e11)
        for changes in ({}, {"high_resolution": {"start": 0.75}})
    )
    assert "from step 750 on 2 of 384 px, 8 of 160 px" in plan_text(late)
    assert "from step" not in plan_text(plain)
    assert late.places[0].memory_gb > 2 * plain.places[0].memory_gb
    all_late = study({"backbone": "vit_tiny_patch16_224", "crops": {"global_px": 384, "local_px": 160}}, tile=tile)
    larger = make_plan(all_late, device_flops=1e11)
    mean = 0.75 * plain.cost.flops_per_tile + 0.25 * larger.cost.flops_per_tile
    assert late.cost.flops_per_tile == pytest.approx(mean)
    assert late.places[0].memory_gb == pytest.approx(larger.places[0].memory_gb)


def one_slide(folder, *settings):
    """A study of one picture of 320 px."""
    pixels = np.random.default_rng(0).integers(60, 200, (320, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    plain = ["tile.mpp=native", "tile.tile_px=64", "tile.tissue.method=off", "tile.filters.max_pen=1"]
    tiny = ["pretrain.crops.global_px=48", "pretrain.crops.local_px=32", "pretrain.batch_size=5", "pretrain.steps=20"]
    return load_study(None, [f"cohort.slides=[{folder / 'a.png'}]", f"out={folder / 'out'}", *plain, *tiny, *settings])


def test_wrong_sampling_weights_are_named_as_such_and_not_as_absent_tiles(tmp_path):
    column, value = (one_slide(tmp_path, f"pretrain.sampling.weights={each}") for each in ("{stain: {A: 1}}", "{site: {A: 1}}"))
    with pytest.raises(UsageError, match="no column 'stain'") as caught:
        said(column)
    assert caught.value.where == "pretrain.sampling.weights"
    assert "no slide has tiles" in said(value), "which values slides have is known with the tiles"
    assert tile(value) == 0
    with pytest.raises(UsageError, match="no slide has site 'A'"):
        said(value)


def test_a_study_with_tiles_is_planned_from_them(tmp_path):
    made = one_slide(tmp_path)
    assert "no slide has tiles" in said(made)
    assert not (tmp_path / "out").exists(), "a look writes nothing"
    assert tile(made) == 0
    before = sorted(path for path in (tmp_path / "out").rglob("*"))
    text = said(made)
    assert "25 of 64 px on 1 slides" in text and "20 of 5 tiles = 4 epochs" in text
    assert sorted(path for path in (tmp_path / "out").rglob("*")) == before


def test_this_device_is_measured():
    settings = PretrainSettings(backbone="vit_tiny_patch16_224", crops=CropSettings(global_px=64, local_px=32))
    state = torch.get_rng_state()
    assert 1e8 < sustained_flops(settings, COMPUTE) < 1e15
    assert torch.equal(state, torch.get_rng_state())


def test_the_command_says_the_plan(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(
        "pretrain: {backbone: vit_tiny_patch16_224, preset: dino, crops: {global_px: 64, local_px: 32}}\n"
    )
    with pytest.raises(SystemExit) as ended:
        app(["pretrain", str(tmp_path / "study.yaml"), "--dry-run", "--set", "compute.device=cpu"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for words in (
        "preset",
        "dino, with backbone=vit_tiny_patch16_224",
        "GB per process",
        "this CPU",
        "8 x H100",
        "checkpoints",
    ):
        assert words in told
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]
