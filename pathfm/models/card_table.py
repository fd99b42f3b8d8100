"""The public encoders, with the values that their model cards and the tools that run them state.

Sources: M the publisher's model card, T TRIDENT, S slide2vec, L lazyslide-models, E eva, P STAMP. Where they disagree the
publisher's card counts, then the tool that follows it; how other tools do it is in ``card_rivals``. Licences are as the
registries of these tools state them. Arguments are plain JSON: where a model card passes classes of layers (SwiGLU), the timm
model that has these layers by itself is named, which builds the same network.
"""

from __future__ import annotations

from pathfm.models.card_photographs import PHOTOGRAPHS
from pathfm.models.encoder_card import EncoderCard, Triple

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
OPTIMUS_MEAN: Triple = (0.707223, 0.578729, 0.703617)
OPTIMUS_STD: Triple = (0.211883, 0.230117, 0.177517)
HIBOU_MEAN: Triple = (0.7068, 0.5755, 0.722)
HIBOU_STD: Triple = (0.195, 0.2316, 0.1816)
LUNIT_MEAN: Triple = (0.70322989, 0.53606487, 0.66096631)
LUNIT_STD: Triple = (0.21716536, 0.26081574, 0.20723464)
RUDOLF_MEAN: Triple = (0.7072, 0.5787, 0.7036)
RUDOLF_STD: Triple = (0.2119, 0.2301, 0.1775)
HALF: Triple = (0.5, 0.5, 0.5)
SCALES = (0.5, 0.25, 1.0, 2.0)
NC_ND = "CC-BY-NC-ND-4.0"

_VIT_L = {"img_size": 224, "init_values": 1e-5, "num_classes": 0, "dynamic_img_size": True}
_VIRCHOW = _VIT_L | {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 5.3375}
_OPTIMUS = _VIT_L | {"global_pool": "token"}


_TIMM: tuple[EncoderCard, ...] = (
    EncoderCard(
        "uni",
        "MahmoodLab/UNI",
        "timm",
        "vit_large_patch16_224",
        1024,
        _VIT_L,
        tile_px=256,
        interpolation="bilinear",
        parameters=303_350_784,
        precision="fp16",
        licence=NC_ND,
        gated=True,
        source="M, T, S",
    ),
    EncoderCard(
        "uni2-h",
        "MahmoodLab/UNI2-h",
        "timm",
        "vit_giant_patch14_dinov2",
        1536,
        _VIT_L
        | {"embed_dim": 1536, "depth": 24, "num_heads": 24, "mlp_ratio": 5.33334, "reg_tokens": 8, "no_embed_class": True},
        tile_px=256,
        interpolation="bilinear",
        parameters=681_394_176,
        precision="bf16",
        licence=NC_ND,
        gated=True,
        source="M, T; precision T (the publisher's own tool), S runs fp16",
    ),
    EncoderCard(
        "virchow",
        "paige-ai/Virchow",
        "timm",
        "vit_giant_patch14_dinov2",
        2560,
        _VIRCHOW,
        pooling="cls+mean",
        parameters=631_229_184,
        precision="fp16",
        licence="Apache-2.0",
        gated=True,
        source="M, T, S",
    ),
    EncoderCard(
        "virchow2",
        "paige-ai/Virchow2",
        "timm",
        "vit_giant_patch14_dinov2",
        2560,
        _VIRCHOW | {"reg_tokens": 4},
        mpp=SCALES,
        pooling="cls+mean",
        parameters=631_239_424,
        precision="fp16",
        licence=NC_ND,
        gated=True,
        source="M, T, S",
        note="the mean leaves the four registers out",
    ),
    EncoderCard(
        "gigapath",
        "prov-gigapath/prov-gigapath",
        "timm",
        "vit_giant_patch14_dinov2",
        1536,
        _VIT_L | {"patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 5.33334},
        resize_px=256,
        tile_px=256,
        parameters=1_134_953_984,
        precision="fp16",
        licence="Apache-2.0 with conditions",
        gated=True,
        source="M, T, S",
        note="sees the middle 224 px of 256, without the rim",
    ),
    EncoderCard(
        "h-optimus-0",
        "bioptimus/H-optimus-0",
        "timm",
        "vit_giant_patch14_reg4_dinov2",
        1536,
        _OPTIMUS,
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        parameters=1_134_774_272,
        precision="fp16",
        licence="Apache-2.0",
        source="M, S; the model card takes tiles of 224 px and resizes nothing",
    ),
    EncoderCard(
        "h-optimus-1",
        "bioptimus/H-optimus-1",
        "timm",
        "vit_giant_patch14_reg4_dinov2",
        1536,
        _OPTIMUS,
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        parameters=1_134_774_272,
        precision="fp16",
        licence=NC_ND,
        gated=True,
        source="M, S; the model card takes tiles of 224 px and resizes nothing",
    ),
    EncoderCard(
        "h0-mini",
        "bioptimus/H0-mini",
        "timm",
        "vit_giant_patch14_reg4_dinov2",
        1536,
        _VIT_L | {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 5.33334},
        mean=OPTIMUS_MEAN,
        std=OPTIMUS_STD,
        pooling="cls+mean",
        parameters=85_739_520,
        precision="fp16",
        licence=NC_ND,
        gated=True,
        source="S, L; width of the gated layers from the stated 85.7 M parameters, loading is strict",
    ),
    EncoderCard(
        "openmidnight",
        "SophontAI/OpenMidnight",
        "timm",
        "vit_giant_patch14_reg4_dinov2",
        1536,
        _OPTIMUS,
        mpp=(),
        interpolation="bilinear",
        parameters=1_134_774_272,
        precision="fp16",
        licence="Apache-2.0",
        gated=True,
        source="T, L",
        note="an official DINOv2 checkpoint (ViT-g/14, registers); its names are translated to timm's",
        weights_file="teacher_checkpoint_load.pt",
    ),
    EncoderCard(
        "gpfm",
        "majiabo/GPFM",
        "timm",
        "vit_large_patch14_dinov2",
        1024,
        _VIT_L,
        parameters=303_227_904,
        precision="fp32",
        licence=NC_ND,
        source="T, S, L; precision S, as published",
        weights_file="GPFM.pth",
    ),
    EncoderCard(
        "lunit-s8",
        "1aurent/vit_small_patch8_224.lunit_dino",
        "timm",
        "vit_small_patch8_224",
        384,
        {"img_size": 224, "num_classes": 0, "dynamic_img_size": True},
        resize_px=248,
        mean=LUNIT_MEAN,
        std=LUNIT_STD,
        parameters=21_670_272,
        precision="fp32",
        licence="Lunit, non-commercial",
        source="L, E; resize and crop of the hub's timm configuration",
    ),
    EncoderCard(
        "mstar",
        "Wangyh/mSTAR",
        "timm",
        "vit_large_patch16_224",
        1024,
        _VIT_L,
        tile_px=256,
        interpolation="bilinear",
        parameters=303_350_784,
        precision="fp32",
        licence=NC_ND,
        gated=True,
        source="P; precision S",
    ),
    EncoderCard(
        "pathorchestra",
        "AI4Pathology/PathOrchestra",
        "timm",
        "vit_large_patch16_224",
        1024,
        _VIT_L,
        mpp=(),
        tile_px=None,
        parameters=303_350_784,
        licence=NC_ND,
        gated=True,
        source="L; ViT-L/16 with layer scale, loading is strict",
    ),
    EncoderCard(
        "prost40m",
        "waticlems/Prost40M",
        "timm",
        "",
        384,
        tile_px=None,
        precision="fp32",
        licence="see its card",
        source="S",
        note="network, resize and crop are as the hub's configuration says",
    ),
)


def _kaiko() -> list[EncoderCard]:
    """Kaiko's ViTs (towards_large_pathology_fms)."""
    rows = {
        "s16": ("vit_small_patch16_224", 384, 21_665_664, 224),
        "s8": ("vit_small_patch8_224", 384, 21_670_272, 224),
        "b16": ("vit_base_patch16_224", 768, 85_798_656, 224),
        "b8": ("vit_base_patch8_224", 768, 85_807_872, 224),
        "l14": ("vit_large_patch14_reg4_dinov2", 1024, 304_370_688, 518),
    }
    return [
        EncoderCard(
            f"kaiko-{key}",
            f"1aurent/{architecture}.kaiko_ai_towards_large_pathology_fms",
            "timm",
            architecture,
            dim,
            {"img_size": built_px, "num_classes": 0, "dynamic_img_size": True},
            mpp=(),
            tile_px=256,
            mean=HALF,
            std=HALF,
            interpolation="bilinear",
            parameters=parameters,
            precision="fp32",
            licence="Kaiko, non-commercial",
            source="T",
        )
        for key, (architecture, dim, parameters, built_px) in rows.items()
    ]


_TRANSFORMERS: tuple[EncoderCard, ...] = (
    EncoderCard(
        "phikon",
        "owkin/phikon",
        "transformers",
        "ViTModel",
        768,
        {},
        interpolation="bilinear",
        parameters=85_798_656,
        precision="fp32",
        licence="Owkin, non-commercial",
        source="T, S",
    ),
    EncoderCard(
        "phikon-v2",
        "owkin/phikon-v2",
        "transformers",
        "Dinov2Model",
        1024,
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16, "image_size": 224},
        interpolation="bilinear",
        parameters=303_351_808,
        precision="fp32",
        licence="Owkin, non-commercial",
        source="T, S",
    ),
    EncoderCard(
        "midnight",
        "kaiko-ai/midnight",
        "transformers",
        "Dinov2Model",
        3072,
        {
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "patch_size": 14,
            "image_size": 518,
            "use_swiglu_ffn": True,
        },
        mpp=SCALES,
        mean=HALF,
        std=HALF,
        interpolation="bilinear",
        pooling="cls+mean",
        parameters=1_136_480_768,
        precision="fp16",
        licence="MIT",
        gated=True,
        source="M, S, L",
    ),
    EncoderCard(
        "plip",
        "vinid/plip",
        "transformers",
        "CLIPVisionModelWithProjection",
        512,
        {"patch_size": 32, "projection_dim": 512},
        mpp=(),
        tile_px=None,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        pooling="average",
        parameters=87_849_216,
        licence="see its card",
        source="L",
        note="the projected vector, not normalised",
    ),
)


PUBLIC: tuple[EncoderCard, ...] = (*_TIMM, *_kaiko(), *PHOTOGRAPHS, *_TRANSFORMERS)
"""Encoders that load through timm or transformers."""
