import copy
import json

import pytest
import timm
import torch

from pathfm.errors import UsageError
from pathfm.models.vit import MaskedViT, build_backbone, timm_recipe
from pathfm.pretrain_settings import PretrainSettings

KINDS = [
    {},
    {"registers": 3},
    {"registers": 3, "layer_scale": 0.1, "mlp": "swiglu"},
    {"positions": "rope", "registers": 2, "layer_scale": 0.1},
    {"positions": "rope", "mlp": "swiglu"},
]


def settings(**changes):
    plain = {"backbone": "vit_tiny", "patch_px": 8, "registers": 0, "layer_scale": 0, "drop_path": 0.0}
    return PretrainSettings.model_validate(plain | changes)


def small(depth=2, **changes):
    """A network of few blocks whose weights, biases and tokens all matter."""
    torch.manual_seed(0)
    vit = build_backbone(settings(**changes), 32).eval()
    vit.blocks = vit.blocks[:depth]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return vit


def crops(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randn(n, 3, px, px, generator=generator, dtype=dtype) for n, px in [(3, 32), (5, 16), (2, 48)]]
    return pictures, [torch.rand(3, 16, generator=generator) > 0.5, None, None]


def passed(net, pictures, masks):
    """All features of a pass as one vector."""
    return torch.cat([part.flatten() for tokens in net(pictures, masks) for part in tokens])


@pytest.mark.parametrize("changes", KINDS)
def test_tokens_without_a_mask_are_those_of_plain_timm(changes):
    vit = small(**changes)
    name, arguments = timm_recipe(settings(**changes), 32)
    plain = timm.create_model(name, **json.loads(json.dumps(arguments))).eval()
    plain.blocks = plain.blocks[:2]
    plain.load_state_dict(vit.state_dict())
    prefix = plain.num_prefix_tokens
    net = MaskedViT(vit)
    for side in (32, 48):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            expected = plain.forward_features(images)
            found = net.tokens(images)
            assert torch.equal(vit.forward_features(images), expected)  # the changed blocks still do what timm does
        torch.testing.assert_close(found.cls_ND, expected[:, 0])
        torch.testing.assert_close(found.patches_NPD, expected[:, prefix:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("changes", KINDS)
def test_a_packed_pass_is_that_of_every_size_alone(changes, dtype, tolerance):
    net = MaskedViT(small(**changes).to(dtype)).to(dtype).train()
    net.mask_token.data.normal_()
    pictures, masks = crops(dtype)
    found, gradients = [], []
    for packs in (True, False):
        net.packs = packs
        net.zero_grad()
        found.append(passed(net, pictures, masks))
        found[-1].sin().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=tolerance * 3)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * float(gradients[1].abs().max()))
    alone = torch.cat([part.flatten() for pair in zip(pictures, masks, strict=True) for part in net.tokens(*pair)])
    assert torch.equal(alone, found[1])


@pytest.mark.parametrize("packs", [False, True])
def test_every_branch_of_a_deep_net_runs_for_its_share_of_the_images_only(packs):
    net = MaskedViT(small(drop_path=0.4, layer_scale=0.1)).train()
    net.packs = packs
    seen = []
    for block in net.blocks:
        block.norm1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel() // 192))
        block.norm2.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel() // 192))
    with torch.no_grad():
        net([torch.randn(10, 3, 32, 32), torch.randn(4, 3, 16, 16)], [None, None])
        assert seen == ([6 * 17 + 2 * 5] * 4 if packs else [6 * 17] * 4 + [2 * 5] * 4)
        seen.clear()
        net.eval().tokens(torch.randn(10, 3, 32, 32))
        assert seen == [10 * 17] * 4


@pytest.mark.parametrize("packs", [False, True])
def test_stochastic_depth_keeps_the_mean_and_either_leaves_an_image_or_scales_its_branch(packs):
    net = MaskedViT(small(depth=1, drop_path=0.5).double()).double()
    net.packs = packs
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)  # one of three images is kept: branches count three times
    inputs = net._embedded(images, None)
    block = net.blocks[0]
    attended = block.attn(block.norm1(inputs))
    outputs = []
    block.register_forward_hook(lambda _, __, output: outputs.append(output.view(-1, 5, 192)[:3]))
    with torch.no_grad():
        for _ in range(200):
            net.train()([images, images], [None, None])
    fed = [
        [start + 3 * block.mlp(block.norm2(start)) for start in (inputs, inputs + 3 * attended)],
        [inputs, inputs + 3 * attended],
    ]
    counts = torch.zeros(3, 2, 2)
    for output in outputs[: 200 if packs else 400 : 1 if packs else 2]:
        for image in range(3):
            fits = [
                (int(a), int(f))
                for a in (0, 1)
                for f in (0, 1)
                if torch.allclose(output[image], fed[1 - f][a][image], atol=1e-9)
            ]
            assert len(fits) == 1
            counts[image][fits[0]] += 1
    assert (counts.sum((1, 2)) == 200).all()
    drawn = counts / 200
    torch.testing.assert_close(drawn[:, 1].sum(-1), torch.full((3,), 1 / 3), rtol=0, atol=0.12)
    torch.testing.assert_close(drawn[:, :, 1].sum(-1), torch.full((3,), 1 / 3), rtol=0, atol=0.12)


def test_one_seed_gives_one_stochastic_depth():
    net = MaskedViT(small(drop_path=0.3)).train()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(passed(net, *crops()))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("packs", [False, True])
def test_activations_computed_again_change_nothing(packs):
    net = MaskedViT(small(drop_path=0.3)).train()
    net.packs = packs
    gradients = []
    for again in (False, True):
        for block in net.blocks:
            block.recomputes = again
        net.zero_grad()
        torch.manual_seed(0)
        passed(net, *crops()).sin().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it, but not as an error
def test_blocks_compile_whole_and_copies_are_free():
    net = MaskedViT(small(drop_path=0.3, positions="rope")).train()
    net.packs = True
    expected = []
    for compiled in (False, True):
        if compiled:
            net = copy.deepcopy(net)
            for block in net.blocks:
                block.compile(backend="eager", fullgraph=True)
        torch.manual_seed(0)
        expected.append(passed(net, *crops()))
    torch.testing.assert_close(*expected)
    assert list(net.vit.state_dict()) == list(small(positions="rope").state_dict())


@pytest.mark.parametrize("changes", KINDS)
def test_bf16_autocast_stays_near(changes):
    net = MaskedViT(small(**changes))
    net.packs = True
    with torch.no_grad():
        expected = passed(net, *crops())
        with torch.autocast("cpu", torch.bfloat16):
            found = passed(net, *crops())
    assert found.isfinite().all() and (found.float() - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_a_mask_replaces_embeddings_by_the_mask_token():
    net = MaskedViT(small())
    net.mask_token.data.normal_()
    images, everything = torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        hidden, plain = net.tokens(images, everything), net.tokens(images)
        torch.testing.assert_close(hidden.cls_ND[0], hidden.cls_ND[1])
        assert torch.equal(net.tokens(images, ~everything).cls_ND, plain.cls_ND)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "vit_tiny_patch16_223"},
            r"pretrain.backbone: timm has no model 'vit_tiny_patch16_223' \(perhaps vit_tiny_patch16_224",
        ),
        ({"backbone": "vit_smal"}, r"timm has no model 'vit_smal' \(perhaps vit_small"),
        ({"backbone": "resnet18"}, "'resnet18' is not a plain vision transformer"),
        ({"backbone": "vit_so400m_patch14_siglip_224"}, "not a plain vision transformer with a class token"),
        ({"backbone": "vit_base_patch16_rpn_224"}, "not a plain vision transformer with a class token"),
        ({"backbone": "vit_small_patch16_dinov3"}, r"has rotary positions \(set pretrain.positions to rope\)"),
        ({"patch_px": 16, "backbone": "vit_tiny_patch16_224"}, "patches of 16 px do not divide an image of 40 px"),
    ],
)
def test_an_impossible_backbone_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        build_backbone(settings(**changes), 40)


@pytest.mark.parametrize(
    ("backbone", "dims"),
    [
        ("vit_tiny", (192, 12, 3, 16)),
        ("vit_small", (384, 12, 6, 16)),
        ("vit_base", (768, 12, 12, 16)),
        ("vit_large", (1024, 24, 16, 16)),
        ("vit_huge", (1280, 32, 16, 14)),
        ("vit_giant", (1536, 40, 24, 14)),
    ],
)
def test_short_names_have_the_sizes_of_the_papers(backbone, dims):
    changes = {"backbone": backbone, "patch_px": None, "registers": 4}
    with torch.device("meta"):
        vit = build_backbone(settings(**changes), 224)
    found = (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads, vit.patch_embed.patch_size[0])
    assert found == dims and vit.num_prefix_tokens == 5
    assert vit.blocks[0].mlp.fc2.in_features == (4096 if backbone == "vit_giant" else 4 * dims[0])


@pytest.mark.parametrize(
    ("backbone", "positions", "width"),
    [("vit_tiny", "learned", 512), ("vit_tiny", "rope", 512), ("vit_huge", "rope", 3416)],
)
def test_swiglu_is_as_wide_as_the_official_one(backbone, positions, width):
    """Official: (int(4 D x 2 / 3) + 7) // 8 * 8."""
    with torch.device("meta"):
        vit = build_backbone(settings(backbone=backbone, patch_px=14, mlp="swiglu", positions=positions), 224)
    assert vit.blocks[0].mlp.fc2.in_features == width


def test_no_layer_scale_is_none():
    for mlp in ("gelu", "swiglu"):
        assert not [
            name for name in small(mlp=mlp, backbone="vit_small_patch14_dinov2", patch_px=16).state_dict() if "ls1" in name
        ]
    assert (build_backbone(settings(positions="rope"), 32).blocks[0].gamma_1 == 1).all()
