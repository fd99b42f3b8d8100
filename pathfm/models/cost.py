"""What a step of pretraining costs: parameters, arithmetic and memory, from sizes alone.

FLOPs count a multiplication and an addition as two. Everything that is trained or looked at is in them: student and teacher,
backbones and heads, with what stochastic depth saves; optimiser, norms and losses are left out (under 2 %). With ``train:
last`` or ``lora`` they are an upper bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain_settings import PretrainSettings
from pathfm.study import ComputeSettings

FP32_BYTES = 4
NUMBER_BYTES = {"fp32": 4, "bf16": 2}
"""Of what linear layers and fused attention take and give."""
LOGIT_BYTES = {"student": 12, "teacher": 8}
"""Logits, their log-softmax or targets, and gradients, per prototype and row."""
RUNTIME_BYTES = {"cpu": 0.6e9, "gpu": 1.5e9}
"""Libraries, and on a GPU its context and workspaces."""


class StepCost(NamedTuple):
    """Sizes of a run.

    Attributes:
        backbone_parameters: of one backbone.
        head_parameters: of one network's projection heads.
        block_parameters: of one block.
        trained_parameters: what the optimiser moves, backbone and heads.
        flops_per_tile: arithmetic of a step per tile of the batch.
    """

    backbone_parameters: int
    head_parameters: int
    block_parameters: int
    trained_parameters: int
    flops_per_tile: float

    @property
    def checkpoint_bytes(self) -> int:
        """Student, teacher and two moments of the optimiser."""
        return 2 * FP32_BYTES * (self.backbone_parameters + self.head_parameters + self.trained_parameters)


class _Shape(NamedTuple):
    """A backbone: blocks, features, attention heads; a block's weights in linear layers, and the numbers that autograd keeps
    per token in it (of queries, keys and values; of the rest); weights and side of patches; tokens that are no patches.
    """

    blocks: int
    features: int
    heads: int
    block_weights: int
    patch_weights: int
    kept_qkv: int
    kept_rest: int
    prefix: int
    patch_px: int

    def tokens(self, img_px: float) -> float:
        """Of an image of this side."""
        return self.prefix + (img_px // self.patch_px) ** 2

    def block_flops(self, img_px: float) -> float:
        """Of all blocks, forward, for one image."""
        tokens = self.tokens(img_px)
        attention = 4 * tokens * self.features  # queries by keys, scores by values
        return tokens * self.blocks * (2 * self.block_weights + attention)

    def patch_flops(self, img_px: float) -> float:
        """Of the patch embedding, forward, for one image."""
        return 2 * (self.tokens(img_px) - self.prefix) * self.patch_weights


def step_cost(settings: PretrainSettings) -> StepCost:
    """Sizes and arithmetic. The cost of the encoder that the preset ``distill`` learns from is not in it.

    Raises:
        UsageError: an impossible backbone.
    """
    return _cost(settings, _on_meta(settings))


def _cost(settings: PretrainSettings, backbone: MaskedViT) -> StepCost:
    shape, crops = _shape(backbone), settings.crops
    views = [(2, crops.global_px), (crops.local_count, crops.local_px)]
    # Backward costs twice forward, less the gradient of the images.
    student = sum(
        count * (3 * (1 - settings.drop_path) * shape.block_flops(px) + 2 * shape.patch_flops(px)) for count, px in views
    )
    teacher = 0.0 if settings.preset == "distill" else 2 * _forward_flops(shape, crops.global_px)
    larger_px = crops.global_px * max(1.0, settings.gram.scale)
    anchor = 2 * _forward_flops(shape, larger_px) * (1 - settings.gram.start)
    masked, (head_weights, head_rest) = _masked(settings, shape), _head(settings, shape.features)
    heads = 2 * head_weights * (3 * (2 + crops.local_count + masked) + 2 + masked)
    head_parameters = (head_weights + head_rest) * (2 if settings.separate_ibot_head else 1)
    return StepCost(
        backbone_parameters=_count(backbone),
        head_parameters=head_parameters,
        block_parameters=_count(backbone.blocks[0]),
        trained_parameters=_trained(settings, backbone) + head_parameters,
        flops_per_tile=student + teacher + anchor + heads,
    )


def process_memory(settings: PretrainSettings, compute: ComputeSettings, processes: int, *, on_gpu: bool) -> float:
    """Estimated peak of one process [byte], data workers left out.

    Args:
        settings: of pretraining, with the crops that are really cut.
        compute: ``strategy`` and ``checkpoint_activations`` are read.
        processes: that share a step's batch.
        on_gpu: else on a CPU, where attention in bf16 is not fused.
    """
    backbone = _on_meta(settings)
    cost, shape = _cost(settings, backbone), _shape(backbone)
    networks = cost.backbone_parameters + cost.head_parameters
    copies = 2 + (settings.gram.start < 1)  # student, teacher, anchor
    states: float = FP32_BYTES * (copies * networks + 3 * cost.trained_parameters)  # gradients, two moments
    if compute.strategy == "fsdp":
        states = states / processes + 2 * FP32_BYTES * max(cost.block_parameters, cost.head_parameters)
    casts = 2 * networks if settings.precision == "bf16" else 0
    tiles = settings.batch_size / (processes * settings.accumulate)
    fused = on_gpu or settings.precision == "fp32"
    kept = tiles * _activations(settings, shape, fused=fused, recomputed=compute.checkpoint_activations)
    masked, views = _masked(settings, shape), 2 + settings.crops.local_count
    logits = tiles * settings.prototypes * (LOGIT_BYTES["student"] * (views + masked) + LOGIT_BYTES["teacher"] * (2 + masked))
    logits = 0 if settings.preset == "distill" else logits
    return float(states + casts + kept + logits + RUNTIME_BYTES["gpu" if on_gpu else "cpu"])


def _on_meta(settings: PretrainSettings) -> MaskedViT:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return MaskedViT(build_backbone(settings, settings.crops.global_px))


def _shape(backbone: MaskedViT) -> _Shape:
    block: Any = backbone.blocks[0]
    layers = _linear(block)
    inner = block.mlp.fc2.in_features
    widened = sum(layer.out_features for layer in _linear(block.mlp)) - block.mlp.fc2.out_features
    gated = hasattr(block.mlp, "fc1_g") or widened > inner
    scaled = any("ls1" in name or "gamma" in name for name, _ in block.named_parameters())
    turned = getattr(backbone.vit, "rope", None) is not None
    return _Shape(
        blocks=len(backbone.blocks),
        features=backbone.embed_dim,
        heads=block.attn.num_heads,
        block_weights=sum(layer.weight.numel() for layer in layers),
        patch_weights=3 * backbone.patch_px**2 * backbone.embed_dim,
        kept_qkv=backbone.embed_dim * (6 if turned else 3),
        # What comes out of norms, attention and the layers before both LayerScales, and what is between layers of the MLP.
        kept_rest=backbone.embed_dim * (2 + 1 + 2 * scaled) + widened + inner * (1 + gated),
        prefix=backbone.vit.num_prefix_tokens,
        patch_px=backbone.patch_px,
    )


def _forward_flops(shape: _Shape, img_px: float) -> float:
    return shape.block_flops(img_px) + shape.patch_flops(img_px)


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _trained(settings: PretrainSettings, backbone: MaskedViT) -> int:
    """Parameters of the backbone that the optimiser moves."""
    if settings.train == "last":
        last = sum(_count(module) for module in [*backbone.blocks[-settings.train_blocks :], backbone.vit.norm])
        return last + backbone.embed_dim  # the mask token
    if settings.train == "lora":
        thin = sum(layer.in_features + layer.out_features for block in backbone.blocks for layer in _linear(block))
        return settings.lora_rank * thin + backbone.embed_dim
    return _count(backbone)


def _head(settings: PretrainSettings, features: int) -> tuple[int, int]:
    """Of one projection head: weights that rows are multiplied with, and other parameters."""
    if settings.preset == "distill":
        return 0, 0
    hidden, bottleneck = settings.head_hidden, settings.head_bottleneck
    lengths = 0 if settings.prototype_norm == "none" else settings.prototypes
    weights = features * hidden + hidden * hidden + hidden * bottleneck + bottleneck * settings.prototypes
    return weights, 2 * hidden + bottleneck + lengths


def _masked(settings: PretrainSettings, shape: _Shape) -> float:
    """Masked patches per tile, in both global crops."""
    patches = shape.tokens(settings.crops.global_px) - shape.prefix
    return settings.mask_probability * sum(settings.mask_ratio) * patches


def _activations(settings: PretrainSettings, shape: _Shape, *, fused: bool, recomputed: bool) -> float:
    """What autograd keeps of the student per tile [byte]; with recomputing, the inputs of blocks and all of one block."""
    total, number = 0.0, NUMBER_BYTES[settings.precision]
    streams = 4 if settings.drop_path else 2  # norms' inputs; of a part of the images, also what is added back
    for images, px in ((2, settings.crops.global_px), (settings.crops.local_count, settings.crops.local_px)):
        tokens = shape.tokens(px)
        # Else as ``attention`` does it: queries, keys and values as they are multiplied, and the softmax.
        plain = number * (3 * shape.features + shape.heads * tokens)
        attention = shape.kept_qkv * number if fused else plain
        block = tokens * (attention + shape.kept_rest * number + streams * shape.features * FP32_BYTES)
        block *= 1 - settings.drop_path
        total += images * (shape.blocks * tokens * shape.features * FP32_BYTES + block if recomputed else shape.blocks * block)
    return total
