"""The zarr v3 codec ``imagecodecs_jpeg``, so that plain ``zarr.open`` reads our JPEG stores wherever pathfm is installed.

Name and configuration are those of the public ``imagecodecs-zarr`` package (Python >= 3.12), which reads the same stores
without pathfm. It is registered only if that package has not registered its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import get_codec_class, register_codec

from pathfm import jpeg

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

NAME = "imagecodecs_jpeg"
COLORSPACE = {"colorspace_data": "RGB", "colorspace_jpeg": "YCBCR", "subsampling": "420"}


def configuration(quality: int) -> dict[str, Any]:
    """The codec's metadata for tiles encoded by ``jpeg.encode``."""
    return {"name": NAME, "configuration": {"level": quality, **COLORSPACE}}


@dataclass(frozen=True)
class JpegCodec(ArrayBytesCodec):
    """One RGB tile per chunk as a JPEG image."""

    level: int = 90
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Builds the codec from array metadata; options that only matter to other writers are passed over."""
        return cls(level=int(data.get("configuration", {}).get("level") or 90))

    def to_dict(self) -> dict[str, Any]:
        """The codec's metadata."""
        return configuration(self.level)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Not known before encoding."""
        raise NotImplementedError

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        pixels = await asyncio.to_thread(jpeg.decode, chunk_data.to_bytes())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(pixels.reshape(chunk_spec.shape))

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        pixels = chunk_data.as_numpy_array().astype(np.uint8).reshape(chunk_spec.shape[-3:])
        data = await asyncio.to_thread(jpeg.encode, pixels, self.level)
        return chunk_spec.prototype.buffer.from_bytes(data)


def register() -> None:
    """Makes the codec known to zarr unless a codec of that name is there already."""
    try:
        get_codec_class(NAME)
    except KeyError:
        register_codec(NAME, JpegCodec)
