import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pathfm.models.cost import process_memory, step_cost
from pathfm.models.lora import add_lora, train_last
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain.head import DinoHead
from pathfm.pretrain_settings import PretrainSettings
from pathfm.study import ComputeSettings

KINDS = [
    {},
    {"registers": 4, "mlp": "swiglu"},
    {"positions": "rope", "mlp": "swiglu"},
    {"positions": "rope", "layer_scale": 0},
    {"drop_path": 0.5, "separate_ibot_head": True},
    {"layer_scale": 0, "prototype_norm": "none", "mask_probability": 0.0},
]
TILES, MASKED = 2, 12  # 2 tiles x 2 crops x 16 patches x probability 0.5 x ratio 0.375


def settings(**changes):
    plain = {
        "preset": "dinov2",
        "backbone": "vit_tiny",
        "patch_px": 8,
        "batch_size": TILES,
        "drop_path": 0.0,
        "prototypes": 512,
        "head_hidden": 64,
        "head_bottleneck": 32,
        "mask_ratio": (0.375, 0.375),
        "crops": {"global_px": 32, "local_px": 16, "local_count": 4},
    }
    return PretrainSettings.model_validate(plain | changes)


def networks(given):
    backbone = MaskedViT(build_backbone(given, given.crops.global_px)).train()
    heads = [DinoHead(backbone.embed_dim, given) for _ in range(1 + given.separate_ibot_head)]
    return backbone, heads


def crops(given, tiles=TILES):
    views = given.crops
    return [torch.randn(tiles * n, 3, px, px) for n, px in ((2, views.global_px), (views.local_count, views.local_px))]


@pytest.mark.parametrize("changes", KINDS)
def test_flops_are_those_that_torch_counts_in_a_step(changes):
    given = settings(**changes)
    backbone, heads = networks(given)
    masked = MASKED if given.mask_probability else 0
    pictures = crops(given)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        seen, local = backbone(pictures, [None, None])
        rows = torch.cat([seen.cls_ND, local.cls_ND, seen.patches_NPD.flatten(0, 1)[:masked]])
        heads[0](rows).sum().backward()
        with torch.no_grad():
            targets = backbone.eval().tokens(pictures[0])
            heads[0](torch.cat([targets.cls_ND, targets.patches_NPD.flatten(0, 1)[:masked]]))
    assert step_cost(given).flops_per_tile * TILES == pytest.approx(counted.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("changes", KINDS)
def test_parameters_are_counted_to_the_last_one(changes):
    given = settings(**changes)
    backbone, heads = networks(given)
    cost = step_cost(given)
    assert cost.backbone_parameters == sum(p.numel() for p in backbone.parameters())
    assert cost.block_parameters == sum(p.numel() for p in backbone.blocks[0].parameters())
    assert cost.head_parameters == sum(p.numel() for head in heads for p in head.parameters())
    assert cost.trained_parameters == cost.backbone_parameters + cost.head_parameters


@pytest.mark.parametrize("part", ["last", "lora"])
def test_parts_that_are_trained_are_counted(part):
    given = settings(init="timm:x", train=part, train_blocks=2, lora_rank=3)
    backbone, _ = networks(given)
    if part == "last":
        train_last(backbone, 2)
    else:
        add_lora(backbone.vit, 3)
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    cost = step_cost(given)
    assert cost.trained_parameters - cost.head_parameters == trained


def kept_bytes(backbone, given, tiles):
    """What autograd keeps of a pass besides parameters: their casts to half precision are in it, whatever the batch."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16"),
    ):
        out = backbone(crops(given, tiles), [None, None])
    assert out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("precision", "fused"), [("bf16", True), ("bf16", False), ("fp32", True)])
@pytest.mark.parametrize("changes", KINDS[1:5])
def test_activations_are_those_that_autograd_keeps(changes, precision, fused, monkeypatch):
    """A GPU's attention is fused; so is torch's own on a processor, which stands for it here."""
    if fused:
        monkeypatch.setattr("pathfm.models.vit.attention", functional.scaled_dot_product_attention)
    larger = {"global_px": 64, "local_px": 32, "local_count": 4}
    few, many = (
        settings(**changes, precision=precision, batch_size=tiles, crops=larger).model_copy(update={"prototypes": 0})
        for tiles in (2, 4)
    )
    backbone = MaskedViT(build_backbone(few, 64)).train()
    found = kept_bytes(backbone, many, 4) - kept_bytes(backbone, few, 2)
    estimated = [process_memory(given, ComputeSettings(), 1, on_gpu=fused) for given in (few, many)]
    assert estimated[1] - estimated[0] == pytest.approx(found, rel=0.06)


def test_memory_falls_with_sharing_and_recomputing():
    given = settings(backbone="vit_small", batch_size=64, precision="bf16")

    def memory(processes=1, **compute):
        return process_memory(given, ComputeSettings.model_validate(compute), processes, on_gpu=True)

    states = 20 * (step_cost(given).backbone_parameters + step_cost(given).head_parameters)
    assert memory() > memory(checkpoint_activations=True) > states
    assert memory(4) < memory()
    assert memory(4, strategy="fsdp") < memory(4) - 0.6 * states
    assert process_memory(given, ComputeSettings(), 1, on_gpu=False) > memory() - 1e9
    parts = settings(backbone="vit_small", batch_size=64, precision="bf16", accumulate=4)
    assert process_memory(parts, ComputeSettings(), 1, on_gpu=True) < memory()


@pytest.mark.parametrize(
    ("backbone", "changes", "teraflops"),
    [
        ("vit_small", {"drop_path": 0.1}, 0.115),
        ("vit_base", {"drop_path": 0.1}, 0.41),
        ("vit_large", {"drop_path": 0.3}, 1.155),
        (
            "vit_giant",
            {"drop_path": 0.4, "registers": 4, "prototypes": 131_072, "head_bottleneck": 384, "crops": {"local_px": 98}},
            5.22,
        ),
    ],
)
def test_published_sizes_cost_what_others_compute(backbone, changes, teraflops):
    given = PretrainSettings.model_validate({"preset": "dinov2", "backbone": backbone, **changes})
    assert step_cost(given).flops_per_tile / 1e12 == pytest.approx(teraflops, rel=0.03)


def test_estimates_draw_nothing():
    state = torch.get_rng_state()
    step_cost(settings())
    assert torch.equal(torch.get_rng_state(), state)
