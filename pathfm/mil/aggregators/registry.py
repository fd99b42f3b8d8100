"""Aggregators by name, and how one is made of settings. What others wrote is imported when it is asked for."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pathfm.config import did_you_mean
from pathfm.errors import UsageError
from pathfm.mil.aggregators.attention import Abmil, AbmilPlain, ClassQueries
from pathfm.mil.aggregators.clam import ClamMb, ClamSb
from pathfm.mil.aggregators.contract import Aggregator
from pathfm.mil.aggregators.dsmil import Dsmil
from pathfm.mil.aggregators.dtfd import Dtfd
from pathfm.mil.aggregators.pooling import Max, Mean
from pathfm.mil.aggregators.transformer import Perceiver, Transformer
from pathfm.mil.aggregators.transmil import TransMil

WHERE = "mil.aggregator"
AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": Mean,
    "max": Max,
    "abmil": Abmil,
    "abmil-plain": AbmilPlain,
    "clam-sb": ClamSb,
    "clam-mb": ClamMb,
    "dsmil": Dsmil,
    "transmil": TransMil,
    "dtfd": Dtfd,
    "transformer": Transformer,
    "perceiver": Perceiver,
    "class-queries": ClassQueries,
}
"""By the name of ``mil.aggregator``; beside these, slide encoders and one's own ``MODULE:CLASS``."""
FIXED = ("width", "outputs")
SETTINGS = ("attention", "heads")
"""Settings of the page ``mil`` that an aggregator is given if its constructor takes them."""


def find_aggregator(name: str) -> tuple[type[Aggregator], dict[str, Any]]:
    """The class behind a name, and arguments that the name stands for.

    Raises:
        UsageError: there is none of this name, or one's own class cannot be imported or is no ``Aggregator``.
    """
    if name in AGGREGATORS:
        return AGGREGATORS[name], {}
    from pathfm.models.slide_encoders import SLIDE_ENCODERS

    if name in SLIDE_ENCODERS or name.startswith("python:"):
        from pathfm.mil.aggregators.pretrained import Pretrained

        return Pretrained, {"encoder": name}
    if ":" in name:
        return _own_class(name), {}
    known = [*AGGREGATORS, *(name for name in SLIDE_ENCODERS if name not in AGGREGATORS)]
    fix = f"use {', '.join(known)}, or your own MODULE:CLASS"
    raise UsageError(f"no aggregator is named {name!r}{did_you_mean(name, known)}", where=WHERE, fix=fix)


def aggregator_identity(aggregator: Aggregator) -> str:
    """What besides settings and weights decides what a network says; empty for pathfm's own aggregators.

    A slide encoder's identity, or the SHA-256 of the file of one's own class.
    """
    if identity := getattr(aggregator, "identity", ""):
        return str(identity)
    if type(aggregator) in AGGREGATORS.values():
        return ""
    source = inspect.getsourcefile(type(aggregator))
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""


def check_options(name: str, kind: type[Aggregator], options: Mapping[str, object], fixed: Collection[str] = ()) -> None:
    """Whether an aggregator has these options, of these types.

    Args:
        name: in ``mil.aggregator``.
        kind: its class.
        options: of the settings.
        fixed: arguments that the name stands for.

    Raises:
        UsageError: an unknown option, or a value of another type.
    """
    parameters = inspect.signature(kind).parameters
    taken = {key: value for key, value in parameters.items() if key not in (*FIXED, *SETTINGS, *fixed)}
    if any(value.kind is inspect.Parameter.VAR_KEYWORD for value in parameters.values()):
        return
    for key, value in options.items():
        if key in SETTINGS and key in parameters:
            raise UsageError(f"{key} is a setting, not an option", where="mil.options", fix=f"set mil.{key}")
        if key not in taken:
            fix = f"it has {', '.join(taken)}" if taken else "it has none"
            what = f"{name} has no option {key!r}{did_you_mean(key, taken)}"
            raise UsageError(what, where="mil.options", fix=fix)
        default = taken[key].default
        if default not in (inspect.Parameter.empty, None) and not _fits(value, default):
            what = f"{key} is {value!r}, which is no {type(default).__name__}"
            raise UsageError(what, where="mil.options", fix=f"its default is {default!r}")


def _fits(value: object, default: object) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _own_class(name: str) -> type[Aggregator]:
    module_name, _, class_name = name.rpartition(":")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, ValueError, AttributeError) as error:
        fix = "install the module where pathfm runs, and check both names"
        raise UsageError(f"the aggregator {name} cannot be imported: {error}", where=WHERE, fix=fix) from error
    if not (isinstance(kind, type) and issubclass(kind, Aggregator)):
        fix = "derive it from pathfm.mil.aggregators.contract.Aggregator"
        raise UsageError(f"{name} is no aggregator", where=WHERE, fix=fix)
    return kind
