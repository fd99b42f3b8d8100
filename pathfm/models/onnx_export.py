"""An encoder as an ONNX file, checked against torch. The libraries are the extra ``onnx``."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pathfm.errors import MissingExtraError, StoreError

LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
OPSET = 18
TOLERANCE = 1e-4
"""Largest difference of any feature that is let pass; LayerNorm at the end keeps features near 1."""
ONE_FILE_BYTES = 1_800_000_000
"""Larger networks keep their weights in a second file beside: an ONNX file cannot be larger than 2 GB."""
CHATTER = ("torch.onnx", "onnxscript", "onnx_ir")
BATCHES = (1, 3)
"""Batch sizes that are compared; neither is the one that is traced."""


class _Features(nn.Module):
    """Class token and mean patch of a timm transformer: what ``pathfm extract`` pools."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> [N, D] and [N, D]."""
        tokens_NTD: Tensor = self.vit.forward_features(images)  # type: ignore[operator]
        return tokens_NTD[:, 0], tokens_NTD[:, self.vit.num_prefix_tokens :].mean(dim=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's notes about itself from the user."""
    levels = {name: logging.getLogger(name).level for name in CHATTER}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in CHATTER:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def check_libraries() -> None:
    """Raises before any work.

    Raises:
        MissingExtraError: one of the libraries is not installed.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"ONNX export needs {' and '.join(missing)}", where="--onnx", extra="onnx")


def write_onnx(vit: nn.Module, input_px: int, path: Path) -> float:
    """Writes ``images`` [N, 3, H, W] (normalised, any N) -> ``cls`` and ``patch_mean`` [N, D], in fp32.

    Args:
        vit: a timm transformer with a class token, on the CPU.
        input_px: H = W [px], fixed in the file.
        path: the file, written in place; call it within a commit.

    Returns:
        The largest difference from torch over random images.

    Raises:
        MissingExtraError: the extra ``onnx`` is not installed.
        StoreError: the difference is more than ``TOLERANCE``.
    """
    check_libraries()
    features = _Features(vit.float()).eval().requires_grad_(requires_grad=False)
    with _quiet():
        program = torch.onnx.export(
            features,
            (torch.zeros(2, 3, input_px, input_px),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["cls", "patch_mean"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    size = sum(4 * parameter.numel() for parameter in vit.parameters())
    program.save(str(path), external_data=size > ONE_FILE_BYTES)
    difference = _difference(features, input_px, path)
    if not difference <= TOLERANCE:
        what = f"the ONNX network differs from torch by {difference:.2g}, more than {TOLERANCE:g}"
        raise StoreError(what, where=path.name, fix="export without --onnx")
    return difference


def _difference(features: nn.Module, input_px: int, path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in BATCHES:
        images = np.random.default_rng(batch).standard_normal((batch, 3, input_px, input_px), dtype=np.float32)
        with torch.inference_mode():
            expected = features(torch.from_numpy(images))
        for ours, theirs in zip(expected, session.run(["cls", "patch_mean"], {"images": images}), strict=True):
            largest = max(largest, float(np.abs(ours.numpy() - theirs).max()))
    return largest
