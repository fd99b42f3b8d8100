"""Half precision and merged tokens are used only where features stay close; what happens is said."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from torch import nn

from pathfm.errors import UsageError
from pathfm.models import fidelity
from pathfm.models.calibration import calibration_tiles
from pathfm.models.encoders import TileEncoder, load_encoder
from pathfm.models.fidelity import Forward, least_cosine, wanted_precision
from pathfm.models.networks import Network
from pathfm.models.timm_networks import timm_card
from pathfm.study import ExtractSettings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bf16(monkeypatch):
    monkeypatch.setattr(fidelity, "cpu_has_bf16", lambda: True)


def load(name="untrained:test_vit", **settings):
    return load_encoder(name, ExtractSettings(**{"input_px": 64} | settings), CPU)


class Cancelling(nn.Module):
    """Its features are small differences of large numbers, which half precision loses."""

    num_features = 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Conv2d(3, 16, 16, 16)
        self.register_buffer("large", torch.full((1, 16, 1, 1), 3000.0))
        nn.init.constant_(self.proj.bias, 3000.0)

    def forward_features(self, images):
        return self.proj(images) - self.large

    def forward_head(self, output, pre_logits=False):
        return output.mean((2, 3))


def cancelling(**settings):
    model, like = Cancelling(), timm.create_model("test_resnet", num_classes=0)
    card = dataclasses.replace(timm_card(like, "cancelling"), input_px=64, resize_px=64)
    return TileEncoder(Network(model, card, "cancelling"), ExtractSettings(**settings), CPU)


@pytest.mark.parametrize("name", ["untrained:test_vit", "untrained:test_resnet", "untrained:test_convnext"])
def test_bf16_is_used_and_its_fidelity_kept_where_it_is_close(name):
    half, tiles = load(name), calibration_tiles(12, 64)
    assert half.recipe.precision == "bf16" and 0.999 <= half.fidelity < 1
    features = half(tiles)
    assert features.dtype == np.float32
    plain = load(name, precision="fp32")
    assert plain.fidelity is None and plain.recipe.precision == "fp32"
    assert least_cosine(torch.from_numpy(features), torch.from_numpy(plain(tiles))) > 0.999
    assert not np.array_equal(features, plain(tiles))


@pytest.mark.parametrize("asked", ["auto", "bf16"])
def test_the_gate_falls_back_to_fp32_and_says_so(asked, capsys):
    ours, tiles = cancelling(precision=asked), calibration_tiles(2, 64)
    assert ours.recipe.precision == "fp32" and ours.fidelity is None
    assert np.array_equal(ours(tiles), cancelling(precision="fp32")(tiles))
    said = capsys.readouterr().out
    assert said.count("cancelling: features in bf16 agree with fp32 only to a cosine of") == 1 and "fp32 is used" in said
    assert cancelling(precision=asked, min_fidelity=0.0).recipe.precision == "bf16"


@pytest.mark.parametrize(("asked", "arithmetic"), [("fp32", "plain"), ("bf16", "mixed"), ("auto", "mixed")])
def test_the_arithmetic_is_on_record_and_another_precision_can_be_refused(asked, arithmetic):
    ours = load(precision=asked)
    assert ours.recipe.arithmetic == arithmetic and not ours.recipe.compiled
    ours.check_precision()


def test_a_precision_that_was_asked_for_and_is_not_used_can_be_refused():
    cancelling(precision="auto").check_precision()
    with pytest.raises(UsageError, match="cancelling is to run in bf16, and here it runs in fp32"):
        cancelling(precision="bf16").check_precision()
    with pytest.raises(UsageError, match="is to run in fp16, and here it runs in bf16"):
        load(precision="fp16").check_precision()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_without_weights_runs(precision):
    class Blocks(nn.Module):
        num_features = 3

        def forward_features(self, images):
            return nn.functional.avg_pool2d(images, 16)

        def forward_head(self, output, pre_logits=False):
            return output.mean((2, 3))

    card = dataclasses.replace(timm_card(timm.create_model("test_resnet"), "blocks"), input_px=64, resize_px=64)
    ours = TileEncoder(Network(Blocks(), card, "blocks"), ExtractSettings(precision=precision), CPU)
    assert ours(calibration_tiles(2, 64)).shape == (2, 3)


@pytest.mark.parametrize("mixed", [False, True])
def test_networks_that_mix_number_types_are_left_in_fp32(mixed):
    class Strict(Cancelling):
        def forward_features(self, images):
            return nn.functional.conv2d(images, self.proj.weight.double())

    images = torch.zeros(1, 3, 64, 64)
    lower = Forward(Strict().eval(), "average").lowered("bf16", mixed)
    assert fidelity._cosine_if_it_runs(lower, images, torch.zeros(1, 16)) == -1.0 or mixed


def test_lowering_leaves_the_plain_network_alone():
    plain = Forward(timm.create_model("test_vit", num_classes=0).eval(), "cls")
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        before = plain(images)
        for mixed in (False, True):
            lower = plain.lowered("bf16", mixed)
            assert least_cosine(lower(images), before) > 0.999
            assert lower.dtype == (torch.float32 if mixed else torch.bfloat16)
        assert torch.equal(plain(images), before)
    assert lower.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert lower.model.blocks[0].norm1.weight.dtype == torch.float32


def test_features_that_are_not_finite_never_pass():
    good = torch.ones(2, 3)
    assert not least_cosine(torch.tensor([[1.0, 1, 1], [torch.inf, 1, 1]]), good) >= 0
    assert least_cosine(good, good) == pytest.approx(1)


@pytest.mark.parametrize(
    ("asked", "card", "native", "used"),
    [
        ("auto", None, True, "bf16"),
        ("auto", None, False, "fp32"),
        ("auto", "fp32", True, "fp32"),
        ("auto", "fp16", True, "bf16"),
        ("auto", "fp16", False, "fp32"),
        ("fp16", None, True, "bf16"),
        ("fp16", "fp32", False, "fp32"),
        ("bf16", "fp32", False, "bf16"),
        ("fp32", "fp16", True, "fp32"),
    ],
)
def test_what_a_processor_computes_in(asked, card, native, used, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "cpu_has_bf16", lambda: native)
    assert wanted_precision(asked, card, CPU, "net") == used
    assert (f"net: fp16 is not for processors; {used} is used" in capsys.readouterr().out) == (asked == "fp16")


def merging(**settings):
    """A small transformer whose tokens differ much from each other."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    card = dataclasses.replace(timm_card(model, "net"), input_px=64, resize_px=64)
    return TileEncoder(Network(model, card, "net"), ExtractSettings(**{"precision": "fp32"} | settings), CPU)


def test_merging_passes_the_gate_or_is_refused_with_what_would_do():
    tiles = calibration_tiles(3, 64)
    merged = merging(merge_tokens=0.4, min_fidelity=0.0)
    assert merged.recipe.merge_tokens == 0.4 and merged.fidelity < 0.99999 and merged(tiles).shape == (3, 128)
    assert not np.allclose(merged(tiles), merging()(tiles), atol=1e-3)
    half = merging(merge_tokens=0.4, min_fidelity=0.5, precision="bf16")
    assert half.recipe.precision == "bf16" and half.fidelity == pytest.approx(merged.fidelity, abs=0.05)
    within = (merged.fidelity + merging(merge_tokens=0.1, min_fidelity=0.0).fidelity) / 2
    with pytest.raises(
        UsageError, match=r"with 0\.4 of the tokens merged, features agree only to a cosine of 0\.\d+"
    ) as refused:
        merging(merge_tokens=0.4, min_fidelity=within)
    share = float(refused.value.fix.split()[0])
    assert 0 < share < 0.4 and merging(merge_tokens=share, min_fidelity=within).fidelity >= within
    with pytest.raises(UsageError) as refused:
        merging(merge_tokens=0.4, min_fidelity=1.0)
    assert refused.value.fix == "set extract.merge_tokens: 0"


def test_calibration_tiles_are_the_same_everywhere():
    import hashlib

    tiles = calibration_tiles(3, 224)
    assert tiles.shape == (3, 224, 224, 3) and tiles.dtype == np.uint8
    assert np.array_equal(tiles[:2], calibration_tiles(2, 224)) and not np.array_equal(tiles[0], tiles[1])
    assert hashlib.sha256(tiles.tobytes()).hexdigest() == "7ce92a1dfa7680597a821b9b5c914fee6861ce09bd8172ad20e326bfebfe3416"
    red, green, blue = tiles.mean((0, 1, 2))
    assert red > blue > green > 90  # pink and violet, not white and not black
