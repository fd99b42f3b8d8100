"""How close an approximation of an encoder is to the encoder: half precision and merged tokens, judged before they are used.

Half precision is whole (weights and all values, fastest on a GPU) or mixed (weights of products in half precision, sums along
the blocks and norms in float32; on a processor as fast as whole, and closer). A GPU tries whole first. What does not stay close
enough runs in float32.

Shapes: B tiles, C channels, D features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathfm.errors import UsageError
from pathfm.log import say
from pathfm.models.pooling import patch_map, pooling
from pathfm.models.processor import cpu_has_bf16
from pathfm.models.token_merging import check_mergeable, merged_features
from pathfm.study import ExtractSettings

Precision = Literal["fp32", "bf16", "fp16"]
Arithmetic = Literal["plain", "whole", "mixed"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLER_SHARES = (0.75, 0.5, 0.25, 0.1)
"""Parts of a share of merged tokens that is too large, tried for the advice."""


class Forward:
    """A network in one arithmetic: normalised images in, features out.

    Args:
        model: on its device, in float32.
        pool: rule of ``pooling``.
        merge_share: share of the patches that is merged (``token_merging``).

    Attributes:
        arithmetic: plain float32, or half precision, whole or mixed.

    Raises:
        UsageError: the network cannot be pooled or merged like this.
    """

    def __init__(self, model: nn.Module, pool: str, merge_share: float = 0.0) -> None:
        if merge_share:
            check_mergeable(model)
        self.model, self.pool, self._merge_share = model, pool, merge_share
        self._pooled = pooling(model, pool)
        self._device_type = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device.type
        self.arithmetic: Arithmetic = "plain"
        self.dtype, self._autocast = torch.float32, torch.float32

    def lowered(self, precision: Precision, mixed: bool) -> Forward:
        """A copy in half precision, whole or mixed."""
        lower = Forward(copy.deepcopy(self.model), self.pool, self._merge_share)
        half = DTYPES[precision]
        lower.arithmetic = "mixed" if mixed else "whole"
        if mixed:
            lower._autocast = half
        else:
            lower.dtype = half
            lower.model.to(half)
        for module in lower.model.modules():
            # Kept in half precision, weights need no conversion at every batch. Subclasses may first compute with theirs.
            if mixed and type(module) in {nn.Linear, nn.Conv2d}:
                module.to(half)
            # On a processor plain products are faster than torch's fused attention in bf16 (see models/attention.py).
            if self._device_type == "cpu" and hasattr(module, "fused_attn"):
                vars(module)["fused_attn"] = False
        return lower

    def output(self, images_BCHW: Tensor) -> Tensor:
        """Tokens or a feature map, as the network gives them."""
        images_BCHW = images_BCHW.to(self.dtype)
        with self._mixing():
            if self._merge_share:
                return merged_features(self.model, images_BCHW, self._merge_share)
            output: Tensor = self.model.forward_features(images_BCHW)  # type: ignore[operator]
            return output

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Features [B, D] float32 of normalised images."""
        output = self.output(images_BCHW)
        with self._mixing():
            return self._pooled(output).float()

    def patch_map(self, images_BCHW: Tensor) -> Tensor:
        """Patch features [B, h, w, D] float32 of normalised images."""
        return patch_map(self.model, self.output(images_BCHW))

    def _mixing(self) -> torch.autocast:
        mixed = self._autocast != torch.float32
        return torch.autocast(self._device_type, self._autocast if mixed else None, enabled=mixed)


class Judged(NamedTuple):
    """What runs.

    Attributes:
        forward: the network.
        precision: of its arithmetic.
        dim: length of its features.
        cosine: least cosine with plain float32; None: it is that.
        compiled: what runs in place of ``forward``; None: nothing does.
    """

    forward: Forward
    precision: Precision
    dim: int
    cosine: float | None = None
    compiled: Callable[[Tensor], Tensor] | None = None


def least_cosine(features_BD: Tensor, reference_BD: Tensor) -> float:
    """The smallest cosine between the rows of two matrices; NaN where a feature is not finite."""
    return float(functional.cosine_similarity(features_BD.double(), reference_BD.double()).min())


def wanted_precision(asked: str, of_card: Precision | None, device: torch.device, name: str) -> Precision:
    """What to try: as asked, else what the card says, else bf16.

    A processor has no fp16, bf16 stands in for it, which is said when it was asked for. Where the device does not multiply bf16
    itself, ``auto`` is fp32.
    """
    wanted: Precision = (of_card or "bf16") if asked == "auto" else asked  # type: ignore[assignment]
    native: Precision = "bf16" if _multiplies_bf16(device) else "fp32"
    if device.type == "cpu" and wanted == "fp16":
        if asked == "fp16":
            say(f"{name}: fp16 is not for processors; {native} is used")
        return native
    return native if asked == "auto" and wanted == "bf16" else wanted


def _multiplies_bf16(device: torch.device) -> bool:
    return cpu_has_bf16() if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)


def judge(
    plain: Forward, precision: Precision, settings: ExtractSettings, images_BCHW: Tensor, name: str, *, compiled: bool = False
) -> Judged:
    """The fastest way to compute features that stays as close to plain float32 as ``extract.min_fidelity`` asks.

    Args:
        plain: the network in float32.
        precision: what to try.
        settings: share of merged tokens, least cosine.
        images_BCHW: calibration tiles, normalised, on the device.
        name: of the encoder; when fp32 has to be used after all, it is said.
        compiled: compile it; where that fails or features suffer, which is said, it runs as it is.

    Raises:
        UsageError: tokens cannot be merged, or features would suffer; it says which share would do.
    """
    reference_BD = plain(images_BCHW)
    judged = Judged(plain, "fp32", reference_BD.shape[1])
    if settings.merge_tokens:
        judged = _merging(judged, settings, images_BCHW, reference_BD)
    if precision != "fp32":
        judged = _lowered(judged, precision, settings.min_fidelity, images_BCHW, reference_BD, name)
    return _compiled(judged, settings.min_fidelity, images_BCHW, reference_BD, name) if compiled else judged


def _lowered(
    judged: Judged, precision: Precision, min_fidelity: float, images_BCHW: Tensor, reference_BD: Tensor, name: str
) -> Judged:
    missed = -1.0
    # Measured on 2 cores with AVX512-BF16, tiles per second and core: ViT-S 37 mixed, 39 whole, 32 with torch's autocast.
    ways = (True,) if images_BCHW.device.type == "cpu" else (False, True)
    for mixed in ways:
        lower = judged.forward.lowered(precision, mixed)
        cosine = _cosine_if_it_runs(lower, images_BCHW, reference_BD)
        if cosine >= min_fidelity:
            return Judged(lower, precision, judged.dim, cosine)
        missed = max(missed, cosine)
    how = f"agree with fp32 only to a cosine of {missed:.5f}, extract.min_fidelity is {min_fidelity:g}"
    say(f"{name}: features in {precision} {how}; fp32 is used")
    return judged


def _compiled(judged: Judged, min_fidelity: float, images_BCHW: Tensor, reference_BD: Tensor, name: str) -> Judged:
    """The same, compiled for each size of a batch when it first comes."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(judged.forward.__call__, dynamic=False)
    try:
        cosine = least_cosine(compiled(images_BCHW), reference_BD)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        say(f"{name}: cannot be compiled here, it runs as it is ({str(error).strip().splitlines()[0][:200]})")
        return judged
    if cosine >= min_fidelity:
        return judged._replace(cosine=cosine, compiled=compiled)
    how = f"agree with fp32 only to a cosine of {cosine:.5f}, extract.min_fidelity is {min_fidelity:g}"
    say(f"{name}: features of the compiled network {how}; it runs as it is")
    return judged


def _cosine_if_it_runs(lower: Forward, images_BCHW: Tensor, reference_BD: Tensor) -> float:
    try:
        return least_cosine(lower(images_BCHW), reference_BD)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # some networks make float32 values of their own, which do not go with half weights
        return -1.0


def _merging(judged: Judged, settings: ExtractSettings, images_BCHW: Tensor, reference_BD: Tensor) -> Judged:
    share, plain = settings.merge_tokens, judged.forward
    merging = Forward(plain.model, plain.pool, share)
    cosine = least_cosine(merging(images_BCHW), reference_BD)
    if cosine >= settings.min_fidelity:
        return judged._replace(forward=merging, cosine=cosine)
    fix = "set extract.merge_tokens: 0"
    for smaller in (math.floor(1000 * share * part) / 1000 for part in SMALLER_SHARES):
        tried_BD = Forward(plain.model, plain.pool, smaller)(images_BCHW)
        if smaller and least_cosine(tried_BD, reference_BD) >= settings.min_fidelity:
            fix = f"{smaller:g} would pass"
            break
    least = f"less than extract.min_fidelity {settings.min_fidelity:g}"
    what = f"with {share:g} of the tokens merged, features agree only to a cosine of {cosine:.5f}, {least}"
    raise UsageError(what, where="extract.merge_tokens", fix=fix)
