"""Cards: what they state holds for the networks they name, and other tools' recipes differ as those tools do."""

import dataclasses
import json

import pytest
import timm
import torch

from pathfm.models.cards import CARDS, card_of_hub, find_card, similar_cards

TIMM = {card.name: card for card in CARDS.values() if card.loader == "timm" and card.architecture and card.name == card.base}
# Millions as model cards, papers and registries state them, and half of the last digit stated.
PUBLISHED_MILLIONS = {
    "uni": (303.4, 0.05),
    "uni2-h": (681.4, 0.05),
    "virchow": (631, 0.5),
    "virchow2": (631, 0.5),
    "gigapath": (1135, 0.5),
    "h-optimus-0": (1130, 5),
    "h0-mini": (85.7, 0.05),
    "gpfm": (303, 0.5),
    "lunit-s8": (21.7, 0.05),
    "mstar": (303.4, 0.05),
    "dinov3-7b16": (6716, 0.5),
    "midnight": (1140, 5),
    "plip": (87.8, 0.05),
}


def built(card):
    with torch.device("meta"):
        return timm.create_model(card.architecture, **card.arguments)


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_card_builds_with_its_dimension_and_parameter_count(name):
    card = TIMM[name]
    network = built(card)
    assert sum(parameter.numel() for parameter in network.parameters()) == card.parameters
    if card.stage is not None:
        width = network.feature_info[card.stage]["num_chs"]
    else:
        width = network.num_features * (2 if card.pooling == "cls+mean" else 1)
        patch_px = network.patch_embed.patch_size[0]
        assert card.input_px % patch_px == 0 and network.cls_token is not None
    assert width == card.dim


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_the_parameter_counts_are_those_that_are_published(name):
    millions, tolerance = PUBLISHED_MILLIONS[name]
    assert CARDS[name].parameters / 1e6 == pytest.approx(millions, abs=tolerance)


def test_plain_arguments_build_what_the_model_cards_build_with_classes_of_layers():
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "init_values": 1e-5, "num_classes": 0}
    uni2 = {"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2}
    as_published = {
        "uni2-h": ("vit_giant_patch14_224", uni2 | {"no_embed_class": True, "reg_tokens": 8}),
        "virchow": ("vit_huge_patch14_224", {"img_size": 224, "mlp_ratio": 5.3375, "global_pool": ""}),
        "virchow2": ("vit_huge_patch14_224", {"img_size": 224, "mlp_ratio": 5.3375, "global_pool": "", "reg_tokens": 4}),
    }
    for name, (architecture, arguments) in as_published.items():
        with torch.device("meta"):
            published = timm.create_model(architecture, dynamic_img_size=True, **gated, **arguments)
        ours = built(CARDS[name])
        shapes, our_shapes = ({key: value.shape for key, value in net.state_dict().items()} for net in (published, ours))
        assert repr(published) == repr(ours) and shapes == our_shapes, name
        assert published.no_embed_class == ours.no_embed_class and published.num_prefix_tokens == ours.num_prefix_tokens


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_card_is_whole(card):
    assert json.loads(json.dumps(dict(card.arguments))) == dict(card.arguments), "arguments must go into a folder as JSON"
    assert card.resize_px >= card.input_px > 0 and card.licence and card.source and card.dim > 0
    assert all(0 < value < 1 for value in (*card.mean, *card.std))
    assert card.loader != "python" or card.note, "how to bring it must be said"
    assert card.pooling in {"cls", "cls+mean", "average"}
    assert dataclasses.replace(card) == card and hash(card)


def test_no_name_hides_a_network_of_timm():
    assert not [name for name in CARDS if timm.is_model(name)]


def test_other_tools_recipes_differ_as_the_tools_do():
    virchow2 = CARDS["virchow2"]
    assert (virchow2.dim, CARDS["virchow2@trident"].dim, CARDS["virchow2@stamp"].dim) == (2560, 2560, 1280)
    assert CARDS["virchow2@stamp"].pooling == "cls" and CARDS["virchow2@stamp"].hub_id == virchow2.hub_id
    assert (CARDS["midnight"].dim, CARDS["midnight@trident"].dim) == (3072, 1536)
    assert (CARDS["h0-mini@trident"].dim, CARDS["h0-mini@slide2vec"].dim) == (768, 1536)
    assert (CARDS["musk@trident"].dim, CARDS["musk@slide2vec"].dim) == (1024, 2048)
    assert CARDS["lunit-s8"].mean != CARDS["lunit-s8@trident"].mean
    assert [CARDS[f"h-optimus-1@{tool}"].interpolation for tool in ("trident", "slide2vec")] == ["bilinear", "bicubic"]
    precisions = {name: [CARDS[f"{name}@{tool}"].precision for tool in ("trident", "slide2vec")] for name in ("uni2-h", "gpfm")}
    assert precisions == {"uni2-h": ["bf16", "fp16"], "gpfm": ["fp16", "fp32"]}


def test_names_are_found_and_near_misses_are_guessed():
    assert find_card("UNI2-h") is CARDS["uni2-h"] and find_card("nonsense") is None
    assert card_of_hub("mahmoodlab/uni2-H") is CARDS["uni2-h"] and card_of_hub("somebody/else") is None
    assert similar_cards("uni2h")[0] == "uni2-h" and similar_cards("hoptimus0")[0] == "h-optimus-0"
    assert similar_cards("zzzzzzzz") == []
