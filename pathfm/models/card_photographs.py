"""Networks that were trained on photographs, to compare with: what does training on tissue give?"""

from __future__ import annotations

from pathfm.models.encoder_card import EncoderCard

_DINOV3 = {
    "s16": ("vit_small_patch16_dinov3", 384, 21_586_944),
    "b16": ("vit_base_patch16_dinov3", 768, 85_641_216),
    "l16": ("vit_large_patch16_dinov3", 1024, 303_079_424),
    "h16plus": ("vit_huge_plus_patch16_dinov3", 1280, 840_509_440),
    "7b16": ("vit_7b_patch16_dinov3", 4096, 6_716_030_976),
}
PHOTOGRAPHS: tuple[EncoderCard, ...] = (
    EncoderCard(
        "resnet50-trunc",
        "timm/resnet50.tv_in1k",
        "timm",
        "resnet50.tv_in1k",
        1024,
        {"num_classes": 0},
        mpp=(),
        tile_px=256,
        interpolation="bilinear",
        pooling="average",
        parameters=23_508_032,
        precision="fp32",
        licence="BSD-3-Clause",
        source="T, CLAM",
        note="the third of its four stages, averaged over the tile",
        stage=3,
    ),
    EncoderCard(
        "dinov2-b14",
        "timm/vit_base_patch14_dinov2.lvd142m",
        "timm",
        "vit_base_patch14_dinov2.lvd142m",
        768,
        {"num_classes": 0, "dynamic_img_size": True},
        mpp=(),
        tile_px=None,
        parameters=86_579_712,
        precision="fp16",
        licence="Apache-2.0",
        source="S",
    ),
    *[
        EncoderCard(
            f"dinov3-{key}",
            f"timm/{architecture}.lvd1689m",
            "timm",
            f"{architecture}.lvd1689m",
            dim,
            {"num_classes": 0, "dynamic_img_size": True},
            mpp=(),
            tile_px=None,
            parameters=parameters,
            licence="DINOv3",
            source="AtlasPatch (class token at 224 px); timm's copy of the weights",
        )
        for key, (architecture, dim, parameters) in _DINOV3.items()
    ],
)
"""timm's own weights; they come from timm's place on the hub."""
