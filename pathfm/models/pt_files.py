"""Features as torch files (``.pt``): those of CLAM, TRIDENT and slide2vec are read, CLAM's are written.

Whatever else a file holds is never run: only tensors and arrays of numbers are unpickled.
"""

from __future__ import annotations

import _codecs
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pathfm.errors import StoreError
from pathfm.store.interop.features import place_features
from pathfm.store.interop.foreign_features import ForeignFeatures

REBUILD: Callable[..., Any] = np.zeros(0).__reduce__()[0]  # type: ignore[assignment]
"""NumPy's function that unpickles an array; its place differs between versions of NumPy."""
ARRAYS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (REBUILD, "numpy.core.multiarray._reconstruct"),
    (REBUILD, "numpy._core.multiarray._reconstruct"),
    *(np.ndarray, np.dtype, _codecs.encode, bytes),
    *(type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64)),
]
"""What a pickled NumPy array of numbers is made of (TRIDENT saves such)."""


def read_pt_features(path: Path) -> ForeignFeatures:
    """Reads features from a torch file; where their tiles lie is taken from the files that the tool puts beside it.

    Args:
        path: ``pt_files/<slide_id>.pt`` of CLAM, ``<slide_id>.pt`` of TRIDENT or slide2vec, or any other tensor [N, D].

    Raises:
        StoreError: absent, damaged, something else than features, or at odds with what lies beside it.
    """
    if not path.is_file():
        raise StoreError("no feature file", where=str(path))
    try:
        with torch.serialization.safe_globals(ARRAYS), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # that it might not know a newer pickle protocol: then it says so below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise StoreError("damaged, or something else than features", where=str(path)) from error
    return place_features(path, _numbers(path, content))


def write_pt(path: Path, features_ND: npt.NDArray[Any]) -> None:
    """Writes features as one float32 tensor [N, D], as CLAM does, at the place given. The same features give the same bytes."""
    with path.open("wb") as stream:  # a stream, because torch writes the name of a file into it
        torch.save(torch.from_numpy(np.array(features_ND, dtype=np.float32)), stream)


def _numbers(path: Path, content: object) -> npt.NDArray[Any]:
    if isinstance(content, np.ndarray):
        return content
    if not isinstance(content, torch.Tensor) or content.layout != torch.strided:
        raise StoreError(f"holds a {type(content).__name__} that is no features", where=str(path))
    tensor = content.detach()
    values: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values
