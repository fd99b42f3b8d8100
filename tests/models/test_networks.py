"""Networks by name: every source gives one with a card, weights come whole or not at all, and messages say what to do."""

import dataclasses
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from pathfm.errors import MissingExtraError, UsageError
from pathfm.models import hugging_face
from pathfm.models.cards import CARDS
from pathfm.models.checkpoints import export_encoder
from pathfm.models.encoder_folders import write_folder
from pathfm.models.networks import declared_input_px, load_network
from pathfm.models.vit import build_backbone
from pathfm.models.weights import to_official
from pathfm.pretrain_settings import PretrainSettings

TINY = {"img_size": 28, "num_classes": 0, "dynamic_img_size": True, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    """An empty cache, and a hub that must not be asked."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    return cache


@pytest.fixture
def tiny(monkeypatch):
    """Small networks in the place of some large ones: the same kinds, the same way."""
    small = {
        "uni": {"architecture": "vit_large_patch16_224", "arguments": TINY | {"patch_size": 14, "init_values": 1e-5}},
        "uni2-h": {"arguments": TINY | {"reg_tokens": 2, "no_embed_class": True, "mlp_ratio": 5.33334}},
        "openmidnight": {"arguments": TINY | {"mlp_ratio": 5.33334}},
        "phikon": {"arguments": {**HIDDEN, "image_size": 28, "patch_size": 14}},
        "phikon-v2": {"arguments": {**HIDDEN, "image_size": 28, "patch_size": 14}},
        "plip": {"arguments": {**HIDDEN, "image_size": 28, "patch_size": 14, "projection_dim": 16}},
    }
    for name, changes in small.items():
        for known in [name, *(rival for rival in CARDS if CARDS[rival].base == name and rival != name)]:
            card = dataclasses.replace(CARDS[known], input_px=28, resize_px=28, dim=24, **changes)
            monkeypatch.setitem(CARDS, known, card)
    return {name: CARDS[name] for name in small}


HIDDEN = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}


def random_network(card):
    torch.manual_seed(3)
    network = timm.create_model(card.architecture, **card.arguments).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def cached(cache, hub_id, **files):
    """A place of the hub as it lies in the cache after a download."""
    root = cache / f"models--{hub_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs/main").write_text("abc")
    folder = root / "snapshots/abc"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        if name.endswith("json"):
            file.write_text(json.dumps(content))
        elif name.endswith("safetensors"):
            save_file(content, file)
        else:
            torch.save(content, file)
    return folder


def assert_same(network, other):
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        assert torch.equal(network.eval().forward_features(images), other.eval().forward_features(images))


FAMILIES = {
    "vit_tiny_patch16_224": "cls+mean",
    "vit_small_patch16_dinov3": "cls+mean",
    "beit_base_patch16_224": "cls+mean",
    "xcit_nano_12_p16_224": "cls+mean",
    "resnet18": "average",
    "convnext_atto": "average",
    "swin_tiny_patch4_window7_224": "average",
    "maxvit_pico_rw_256": "average",
    "vit_medium_patch16_gap_256": "average",
    "mobilenetv3_small_050": "average",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_contract_holds_for_a_family(name):
    network = load_network(f"untrained:{name}")
    model, card = network.model.eval(), network.card
    with torch.inference_mode():
        output = model.forward_features(torch.zeros(1, 3, card.input_px, card.input_px))
        vectors = model.forward_head(output, pre_logits=True)
    assert vectors.ndim == 2 and network.name == f"untrained:{name}"
    assert card.pooling == FAMILIES[name] and card.resize_px == card.input_px
    if card.pooling == "cls+mean":
        patches = output.shape[1] - model.num_prefix_tokens
        assert output.ndim == 3 and round(patches**0.5) ** 2 == patches and card.dim == 2 * output.shape[2]
    else:
        assert card.dim == vectors.shape[1]


def test_the_global_random_generator_is_not_touched_and_untrained_is_always_the_same():
    state = torch.get_rng_state()
    first, second = (load_network("untrained:vit_tiny_patch16_224").model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_timms_own_recipe_has_its_crop_and_its_head():
    ours, theirs = (load_network(f"untrained:vit_tiny_patch16_224{suffix}").card for suffix in ("", "@timm"))
    assert (ours.resize_px, theirs.resize_px, theirs.input_px) == (224, 248, 224)
    assert (ours.pooling, ours.dim, theirs.pooling, theirs.dim) == ("cls+mean", 384, "average", 192)
    assert ours.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_another_side_makes_a_network_and_a_card_for_it(name):
    model, card, *_ = load_network(f"untrained:{name}", input_px=448)
    assert (card.input_px, card.resize_px) == (448, 448)
    with torch.inference_mode():
        model.eval().forward_features(torch.zeros(1, 3, 448, 448))


def test_a_crop_grows_with_the_side(tiny):
    assert load_network("untrained:vit_tiny_patch16_224@timm", input_px=448).card.resize_px == 496
    with pytest.raises(UsageError, match=r"extract.input_px: 225 px is not a whole number .*16 px\) \(use 224\)"):
        load_network("untrained:vit_tiny_patch16_224", input_px=225)
    with pytest.raises(UsageError, match=r"30 px is not a whole number of the encoder's patches \(14 px\)"):
        load_network("untrained:phikon-v2", input_px=30)


def test_a_card_untrained_keeps_its_recipe(tiny):
    model, card, name, _ = load_network("untrained:uni2-h")
    assert name == card.name == "untrained:uni2-h" and card.pooling == "cls" and card.precision == "bf16"
    assert model.num_prefix_tokens == 3
    assert load_network("untrained:uni2-h@slide2vec").card.precision == "fp16"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "teacher.backbone."])
def test_weights_from_a_file_come_whole(tiny, tmp_path, suffix, prefix, caplog):
    source = random_network(tiny["uni2-h"])
    state = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()} | {
        f"{prefix}head.weight": torch.ones(3)
    }
    file = tmp_path / f"w{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    with caplog.at_level(logging.WARNING, "pathfm"):
        network = load_network("uni2-h", weights=file)
    assert network.card == tiny["uni2-h"] and network.name == "uni2-h"
    assert_same(network.model, source)
    said = caplog.text
    assert "left out: head.weight" in said and ("was taken off" in said) == bool(prefix)


def test_weights_fill_a_network_of_timm(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    network = load_network("timm:vit_tiny_patch16_224", weights=tmp_path / "w.safetensors")
    assert all(torch.equal(network.model.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


def test_an_official_dinov2_checkpoint_is_translated(tiny, tmp_path):
    source = random_network(tiny["openmidnight"])
    official = to_official(source.state_dict())
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in official.items()}}, tmp_path / "w.pth")
    found = load_network("openmidnight", weights=tmp_path / "w.pth").model
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(found.eval().forward_features(images), source.forward_features(images))


def test_a_network_that_is_read_early_gives_that_stage(tmp_path):
    whole = timm.create_model("resnet50", num_classes=10).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    model, card, *_ = load_network("resnet50-trunc", weights=tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        features = model.eval().forward_features(images)
        stages = whole.forward_intermediates(images, intermediates_only=True)
    assert torch.equal(features, stages[3]) and model.forward_head(features).shape == (1, card.dim)


class Pickled:
    pass


WRONG = {
    "missing": (lambda state: state.pop("norm.weight"), r"extract.weights: w.pt: .*norm.weight nothing where \[24\] is needed"),
    "unexpected": (lambda state: state.update(extra=torch.ones(2)), r"extra \[2\] where nothing is needed .*name the network"),
    "shape": (lambda state: state.update({"norm.bias": torch.ones(5)}), r"norm.bias \[5\] where \[24\] is needed"),
    "twice": (lambda state: state.update({"model.norm.bias": torch.ones(24)}), "holds several networks"),
    "code": (lambda state: state.update(code=Pickled()), "more than tensors.*code in a file is never run.*state_dict"),
    "empty": (lambda state: state.clear(), "it holds no tensors"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_weights_are_one_clear_line(tiny, tmp_path, change, message):
    state = dict(random_network(tiny["uni2-h"]).state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=message) as error:
        load_network("uni2-h", weights=tmp_path / "w.pt")
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "absent.pt"])
def test_a_damaged_file_of_weights_is_refused(tiny, tmp_path, name):
    if name[0] == "w":
        (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(UsageError, match=r"extract\.weights"):
        load_network("uni2-h", weights=tmp_path / name)


@pytest.mark.parametrize("name", ["untrained:resnet18", "local-dir:x", "hf-hub:a/b", "python:a:b"])
def test_weights_go_with_names_of_networks_only(name, tmp_path):
    with pytest.raises(UsageError, match=r"has weights of its own \(name the network itself"):
        load_network(name, weights=tmp_path / "w.pt")


def test_what_lies_in_the_cache_is_used_without_a_network(tiny, no_network):
    source = random_network(tiny["uni2-h"])
    cached(no_network, "MahmoodLab/UNI2-h", pytorch_model__bin=source.state_dict())
    for name in ("uni2-h", "UNI2-h", "hf-hub:MahmoodLab/UNI2-h"):
        network = load_network(name)
        assert_same(network.model, source)
        assert network.name == "uni2-h", "a place on the hub that has a card is that card"
    assert hugging_face.is_here(CARDS["uni2-h"]) and not hugging_face.is_here(CARDS["uni"])


def test_a_timm_network_of_the_hub_is_its_configuration(no_network):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, patch_size=16)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 64},
        "num_classes": 0,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "interpolation": "bilinear",
        },
    }
    cached(no_network, "some/body", config__json=config, model__safetensors=source.state_dict())
    model, card, name, _ = load_network("hf-hub:some/body")
    assert name == card.name == "hf-hub:some/body" and (card.input_px, card.mean, card.interpolation) == (
        64,
        (0.1, 0.2, 0.3),
        "bilinear",
    )
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in source.state_dict().items())
    assert card.arguments == {"img_size": 64}


def test_a_published_timm_network_comes_from_the_cache(no_network):
    source = timm.create_model("resnet18", num_classes=1000)
    cached(no_network, "timm/resnet18.a1_in1k", model__safetensors=source.state_dict())
    model, card, *_ = load_network("timm:resnet18")
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert card.architecture == "resnet18.a1_in1k" and card.hub_id == "timm/resnet18.a1_in1k"


REFUSED = {
    "uni2-h": r"weights of uni2-h are not on this machine, and HF_HUB_OFFLINE is set \(accept its terms at "
    r"https://huggingface.co/MahmoodLab/UNI2-h .*pathfm encoders fetch uni2-h --out DIR .*local-dir:DIR .*set extract.weights",
    "gpfm": r"weights of gpfm are not .*\(run pathfm encoders fetch gpfm",
    "timm:resnet18": "weights of timm:resnet18 are not on this machine",
    "hf-hub:some/body": "weights of hf-hub:some/body are not on this machine",
    "uni2": r"unknown encoder 'uni2' \(did you mean .*uni2-h",
    "resnet18": r"did you mean timm:resnet18",
    "nonsense:x": "unknown encoder 'nonsense:x' .*timm:..., hf-hub:...",
    "timm:": "unknown encoder 'timm:'",
    "timm:resnet18x": "timm has no model 'resnet18x'.*did you mean|timm has no model 'resnet18x'",
    "timm:vit_giant_patch14_224": "timm has no weights of 'vit_giant_patch14_224'",
    "hibou-l": r"the network of hibou-l is code of others.*trust_remote_code.*returns it with {.card.: .hibou-l.}.*python:MOD",
    "ctranspath": "the network of ctranspath is code of others",
    "untrained:conch": "the network of conch is not described here",
    "local-dir:absent": "config.json is missing",
}


@pytest.mark.parametrize(("name", "message"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_had_is_one_line_with_the_way_out(name, message):
    with pytest.raises(UsageError, match=message) as error:
        load_network(name)
    assert "\n" not in str(error.value)


def gated(*_, **__):
    response = type("Response", (), {"headers": {}, "status_code": 403, "request": None})()
    raise huggingface_hub.errors.GatedRepoError("403\nrestricted", response=response)


def unreachable(*_, **__):
    raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nat all")


@pytest.mark.parametrize(("answer", "why"), [(gated, "its licence has to be accepted first"), (unreachable, "does not answer")])
def test_a_hub_that_refuses_is_one_line_too(monkeypatch, answer, why):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    with pytest.raises(
        UsageError, match=rf"weights of uni2-h cannot be had from the hub: .*{why}.*accept its terms at"
    ) as error:
        load_network("uni2-h")
    assert "\n" not in str(error.value)


def test_an_export_of_ours_says_what_it_was_trained_on(tmp_path):
    settings = PretrainSettings(backbone="vit_tiny_patch16_224", patch_px=8)
    export_encoder(
        build_backbone(settings, 32).eval(), settings, 32, {"mpp": 0.5, "tile_px": 64, "step": 1}, tmp_path / "teacher"
    )
    model, card, name, _ = load_network(f"local-dir:{tmp_path / 'teacher'}")
    assert name == "local-dir:teacher" and (card.mpp, card.tile_px, card.input_px) == ((0.5,), 64, 32)
    assert card.pooling == "cls+mean" and card.dim == 2 * model.num_features
    assert load_network(f"local-dir:{tmp_path / 'teacher'}", input_px=64).card.input_px == 64
    shutil.copytree(tmp_path / "teacher", tmp_path / "elsewhere/mine")
    places = ("teacher", None), ("teacher", 64), ("elsewhere/mine", None)
    assert len({load_network(f"local-dir:{tmp_path / place}", side).digest() for place, side in places}) == 1
    (tmp_path / "teacher/model.safetensors").write_bytes(b"other")
    with pytest.raises(UsageError, match="the weights are not those the card was written for"):
        load_network(f"local-dir:{tmp_path / 'teacher'}")


@pytest.mark.parametrize(
    "name", ["untrained:uni2-h", "untrained:resnet50-trunc", "untrained:resnet18@timm", "untrained:phikon"]
)
def test_a_folder_keeps_network_and_recipe(tiny, tmp_path, name):
    if "phikon" in name:
        pytest.importorskip("transformers")
    model, card, *_ = load_network(name)
    write_folder(model, card, tmp_path / "e")
    found = load_network(f"local-dir:{tmp_path / 'e'}")
    assert found.card == card and found.name == "local-dir:e" and found.digest() == load_network(name).digest()
    assert all(torch.equal(found.model.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert declared_input_px(f"local-dir:{tmp_path / 'e'}") == card.input_px


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("uni2-h", {"model_args": {"act_layer": "quick_gelu"}}),
        ("phikon", {"hidden_act": "relu"}),
        ("phikon", {"num_attention_heads": 2}),
    ],
)
def test_a_changed_configuration_is_another_network_with_the_same_weights(tiny, tmp_path, name, change):
    if name == "phikon":
        pytest.importorskip("transformers")
    network = load_network(f"untrained:{name}")
    write_folder(network.model, network.card, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert load_network(f"local-dir:{tmp_path}").digest() == network.digest(), "the order of keys plays no role"
    change = {key: config[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert load_network(f"local-dir:{tmp_path}").digest() != network.digest()


def test_the_digest_of_a_network_sees_how_it_is_built_and_not_the_side_of_images():
    names = [
        "resnet18",
        "resnet18@timm",
        "resnet34",
        "vit_tiny_patch16_224",
        "vit_tiny_patch16_224.augreg_in21k",
        "coat_lite_tiny",
    ]
    resnet, same, *others = (load_network(f"untrained:{name}").digest() for name in names)
    assert resnet == same and len(resnet) == 16 and len({resnet, *others}) == 4
    network = load_network("untrained:resnet18", 64)
    assert network.digest() == resnet
    assert network._replace(card=dataclasses.replace(network.card, stage=2)).digest() != resnet


def test_plain_timm_loads_a_written_folder(tiny, tmp_path):
    model, card, *_ = load_network("untrained:uni2-h")
    write_folder(model, card, tmp_path / "e")
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True), model)


def test_a_folder_with_a_pickle_only_says_how_to_use_it(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"set extract.weights to .*pytorch_model.bin"):
        load_network(f"local-dir:{tmp_path}")


TRANSFORMERS = {"phikon": ("ViTModel", 1), "phikon-v2": ("Dinov2Model", 1), "plip": ("CLIPVisionModelWithProjection", 1)}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_networks_of_transformers_keep_the_contract(tiny, tmp_path, no_network, name):
    transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
    kind, prefix = TRANSFORMERS[name]
    card, made = tiny[name], getattr(transformers, TRANSFORMERS[name][0])
    pooler = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    torch.manual_seed(5)
    source = made(made.config_class(**card.arguments), **pooler).eval()
    folder = cached(no_network, card.hub_id)
    source.save_pretrained(folder)
    model, found, *_ = load_network(name)
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        tokens, wanted = model.eval().forward_features(images), source(images)
        vectors = model.forward_head(tokens, pre_logits=True)
        larger = load_network(name, input_px=56).model.eval().forward_features(torch.randn(1, 3, 56, 56))
    assert torch.equal(tokens, wanted.last_hidden_state) and model.num_prefix_tokens == prefix and found == card
    assert torch.equal(vectors, wanted.image_embeds if name == "plip" else tokens[:, 0])
    assert larger.shape[1] == prefix + 16
    by_file = load_network(name, weights=folder / "model.safetensors")
    assert torch.equal(
        by_file.model.state_dict()["network." + next(iter(source.state_dict()))], next(iter(source.state_dict().values()))
    )


def test_transformers_weights_that_lack_something_are_refused(tiny, no_network):
    transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
    source = transformers.ViTModel(transformers.ViTConfig(**tiny["phikon"].arguments), add_pooling_layer=False)
    folder = cached(no_network, "owkin/phikon")
    source.save_pretrained(folder)
    state = source.state_dict()
    state.pop("layernorm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"the weights lack layernorm\.weight"):
        load_network("phikon")
    with pytest.raises(UsageError, match=r"transformers cannot load other.bin alone \(name model.safetensors"):
        load_network("phikon", weights=folder / "other.bin")


def test_without_transformers_the_extra_is_named(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"phikon needs transformers \(pip install 'pathfm\[transformers\]'\)"):
        load_network("untrained:phikon")


MODULE = """
import torch

class Tokens(torch.nn.Module):
    def __init__(self, registers=0):
        super().__init__()
        self.count, self.linear = 5 + registers, torch.nn.Linear(3, 8)
    def forward(self, x):
        return self.linear(x.mean(dim=(2, 3)))[:, None].expand(-1, self.count, -1)

class Vectors(torch.nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.linear = torch.nn.Linear(3, dim)
    def forward(self, x):
        return self.linear(x.mean(dim=(2, 3)))

def vectors(): return Vectors()
def tokens(): return Tokens(4), {"pooling": "cls+mean", "prefix_tokens": 5, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2],
                                 "input_px": 32, "mpp": [0.5, 1.0], "precision": "bf16"}
def hibou(): return Vectors(1024), {"card": "hibou-l"}
def narrow(): return Vectors(), {"card": "hibou-l"}
def unknown(): return Vectors(), {"maen": [0.5, 0.5, 0.5]}
def nocard(): return Vectors(), {"card": "hibu"}
def nothing(): return 3
def sums():
    class Odd(torch.nn.Module):
        def forward(self, x): return x.sum()
    return Odd()
def listed():
    class Listed(torch.nn.Module):
        def forward_features(self, x): return [x]
        def forward_head(self, x, pre_logits): return x
    return Listed()
def timms():
    import timm
    return timm.create_model("vit_tiny_patch16_224", num_classes=0)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)


def test_a_function_of_the_users_own_gives_a_network_and_facts(own_module):
    paths = list(sys.path)
    model, card, name, _ = load_network("python:own_networks:tokens")
    assert sys.path == paths and name == card.name == "python:own_networks:tokens"
    assert (card.dim, card.input_px, card.resize_px, card.mpp, card.pooling) == (16, 32, 32, (0.5, 1.0), "cls+mean")
    assert model.num_prefix_tokens == 5 and card.mean == (0.5, 0.5, 0.5) and card.precision == "bf16"
    model, card, *_ = load_network("python:own_networks:vectors", input_px=64)
    assert model.forward_features(torch.zeros(2, 3, 64, 64)).shape == (2, 8, 1, 1) and (card.dim, card.input_px) == (8, 64)
    assert "ImageNet" in card.note
    card = load_network("python:own_networks:hibou").card
    assert (card.name, card.mean) == ("hibou-l", CARDS["hibou-l"].mean)
    assert load_network("python:own_networks:timms").card.mean == (0.5, 0.5, 0.5)


OWN_MISTAKES = {
    "narrow": r"the network gives 8 numbers per tile, the card hibou-l has 1024",
    "unknown": r"states 'maen', which no recipe has \(did you mean mean\?\)",
    "nocard": "names the card 'hibu', which does not exist",
    "nothing": "returns int",
    "listed": "the head of Listed does not give one vector per tile",
    "sums": r"the network gives \[\]",
    "absent": "no function own_networks:absent",
}


def test_a_users_code_is_part_of_what_a_network_is(own_module, tmp_path, monkeypatch):
    def digest(change=("", "")):
        (tmp_path / "own_networks.py").write_text(MODULE.replace(*change))
        importlib.invalidate_caches()
        sys.modules.pop("own_networks", None)
        return load_network("python:own_networks:tokens").digest()

    first = digest()
    assert digest() == first == load_network("python:own_networks:tokens", input_px=64).digest()
    assert (
        len(
            {
                first,
                digest(("x.mean(dim=(2, 3))", "2 * x.mean(dim=(2, 3))")),
                digest(('"prefix_tokens": 5', '"prefix_tokens": 4')),
            }
        )
        == 3
    )
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.syspath_prepend(tmp_path)
    assert digest() == first, "where the file lies plays no role"


@pytest.mark.parametrize(("function", "message"), OWN_MISTAKES.items(), ids=OWN_MISTAKES)
def test_mistakes_in_a_users_function_are_one_line(own_module, function, message):
    with pytest.raises(UsageError, match=message):
        load_network(f"python:own_networks:{function}")


def test_code_of_the_hub_is_never_run(no_network):
    """A place on the hub whose configuration asks for its own code is refused before anything is imported."""
    config = {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}}
    folder = cached(no_network, "evil/one", config__json=config, model__safetensors={"x": torch.ones(1)})
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UsageError, match="is no network of timm, and its recipe is unknown"):
        load_network("hf-hub:evil/one")
    with pytest.raises(UsageError, match="does not say how its images are prepared"):
        load_network(f"local-dir:{folder}")


def test_the_side_of_an_encoder_is_known_without_its_weights():
    assert declared_input_px("gigapath") == 224 and declared_input_px("untrained:conch") == 448
    assert declared_input_px("timm:maxvit_tiny_rw_224@timm") == 224 and declared_input_px("hf-hub:xiangjx/musk") == 384
    assert declared_input_px("hf-hub:some/body") is None and declared_input_px("python:a:b") is None
    assert declared_input_px("nonsense") is None and declared_input_px("local-dir:absent") is None


def test_the_modules_are_small_to_load_until_they_are_needed():
    heavy = "{'torch', 'timm', 'transformers'}"
    code = f"import sys, pathfm.models.cards, pathfm.models.hugging_face; print({heavy} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert output.stdout.strip() == "set()"
