"""What the processor computes by itself."""

from __future__ import annotations

import torch


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 itself (AMX, AVX-512 BF16); elsewhere it is emulated, slower than float32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
