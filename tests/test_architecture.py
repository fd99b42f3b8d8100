"""The house rules (layers, doors, sizes, unsafe calls), read from the source; and proof that breaking one is noticed."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pathfm"

# Imports point down: to a lower layer, or (first and last layer only) sideways. Networks save themselves through the store, so
# models and compute sit above slides and store.
LAYERS = (
    {
        "errors",
        "addresses",
        "chain",
        "events",
        "faults",
        "geometry",
        "jpeg",
        "log",
        "settings",
        "presets",
        "pretrain_settings",
        "mil_settings",
        "study",
        "config",
        "stats",
        "workers",
    },
    {"slides", "store"},
    {"models", "compute"},
    {"tile", "pretrain", "extract", "mil", "evaluate", "report"},
    {
        "cli",
        "cli_mil",
        "cli_options",
        "cli_run",
        "workflow",
        "running",
        "replaying",
        "jobs",
        "job_history",
        "study_plan",
        "snakemake_engine",
        "snakemake_progress",
        "encoder_pin",
        "retraining_price",
        "audit",
        "verification",
        "run_manifest",
        "batch",
        "offline",
        "sbom",
        "prediction",
        "classification",
        "tiling",
        "pretraining",
        "planning",
        "exporting",
        "extraction",
        "feature_export",
        "encoder_listing",
        "looking",
        "attending",
        "inspection",
        "feature_inspection",
        "doctor",
        "demo",
        "__main__",
    },
)
SIDEWAYS = {0, len(LAYERS) - 1}
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

DOORS = {
    "openslide": {"slides"},
    "tifffile": {"slides"},
    "fsspec": {"slides"},
    "aiohttp": {"slides"},
    "cyclonedx": {"sbom"},
    "highdicom": {"store"},
    "pydicom": {"store"},
    "zarr": {"store"},
    "h5py": {"store"},
    "simplejpeg": {"jpeg"},
    "timm": {"models"},
    "transformers": {"models"},
    "huggingface_hub": {"models"},
    "lightning": {"compute", "pretrain"},
    "typer": {"cli", "cli_mil", "cli_options", "cli_run"},
    "snakemake": {"workflow"},
    "jinja2": {"report"},
    "matplotlib": {"report"},
    "umap": {"stats"},
    "torch": {"models", "compute", "tile", "pretrain", "extract", "mil", "evaluate", "report", *LAYERS[-1]},
    "torchvision": {"models", "compute", "pretrain", "extract"},
}
UNSAFE = {
    f"{library}.{name}" for library in ("pickle", "cloudpickle", "dill", "joblib") for name in ("load", "loads", "Unpickler")
}
UNSAFE |= {"yaml.unsafe_load", "yaml.full_load"}
MAX_FILE, MAX_SETTINGS_PAGE = 400, 450
MAX_FUNCTION, MAX_USUAL_FUNCTION, USUAL_SHARE = 60, 35, 0.9
MAX_PARAMETERS, MAX_DEPTH = 7, 3
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source(NamedTuple):
    """A file of the package: its place, the unit (top-level module or folder) it belongs to, its text and its tree."""

    place: str
    unit: str
    lines: int
    tree: ast.Module


def violations(package: Path) -> list[str]:
    """Everything in a package that the house does not allow, as ``file:line: what``."""
    sources = [_read(path, package) for path in sorted(package.rglob("*.py"))]
    rules = (_bad_names, _bad_layers, _bad_doors, _bad_sizes, _bad_calls)
    return [problem for source in sources for rule in rules for problem in rule(source)] + _too_many_long_functions(sources)


def _read(path: Path, package: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    inside = path.relative_to(package)
    return Source(inside.as_posix(), inside.parts[0].removesuffix(".py"), len(text.splitlines()), ast.parse(text))


def _imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported, at any depth of the code, also for type checking."""
    parents = ["pathfm", *Path(source.place).parent.parts]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"import_module", "importlib.import_module", "__import__"}:
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _bad_names(source: Source) -> Iterator[str]:
    stem = Path(source.place).stem
    if stem == "utils" or "utils" in Path(source.place).parts:
        yield f"{source.place}:1: a utils module says nothing about what is in it"
    if stem in sys.stdlib_module_names:
        yield f"{source.place}:1: shadows the standard library's {stem}"
    if source.unit != "__init__" and source.unit not in LEVEL:
        yield f"{source.place}:1: {source.unit} is in no layer"


def _bad_layers(source: Source) -> Iterator[str]:
    level = LEVEL.get(source.unit, -1)
    for line, name in _imports(source):
        parts = name.split(".")
        if parts[0] != "pathfm" or len(parts) < 2 or parts[1] in {source.unit, "__version__"}:
            continue
        other = LEVEL.get(parts[1])
        if other is None or other > level or (other == level and level not in SIDEWAYS):
            yield f"{source.place}:{line}: {source.unit} must not import {name}"


def _bad_doors(source: Source) -> Iterator[str]:
    for line, name in _imports(source):
        library = name.split(".")[0]
        if library in DOORS and source.unit not in DOORS[library]:
            yield f"{source.place}:{line}: {library} is imported outside {', '.join(sorted(DOORS[library]))}"


def _bad_sizes(source: Source) -> Iterator[str]:
    limit = MAX_SETTINGS_PAGE if source.place == "study.py" else MAX_FILE
    if source.lines > limit:
        yield f"{source.place}:1: {source.lines} lines, more than {limit}"
    for function in _functions(source):
        where = f"{source.place}:{function.lineno}: {function.name}"
        if _length(function) > MAX_FUNCTION:
            yield f"{where} has {_length(function)} lines, more than {MAX_FUNCTION}"
        # The command line declares its options as parameters.
        if _parameters(function) > MAX_PARAMETERS and not source.unit.startswith("cli"):
            yield f"{where} has {_parameters(function)} parameters, more than {MAX_PARAMETERS}"
        if _depth(function) > MAX_DEPTH:
            yield f"{where} nests {_depth(function)} deep, more than {MAX_DEPTH}"


def _bad_calls(source: Source) -> Iterator[str]:
    for line, imported in _imports(source):
        if imported in UNSAFE:
            yield f"{source.place}:{line}: {imported} runs whatever the file says"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name.endswith("torch.load") and keywords.get("weights_only") != "True":
                yield f"{source.place}:{node.lineno}: torch.load without weights_only=True runs whatever the file says"
            if keywords.get("allow_pickle", "False") != "False":
                yield f"{source.place}:{node.lineno}: allow_pickle runs whatever the file says"
            if name in UNSAFE:
                yield f"{source.place}:{node.lineno}: {name} runs whatever the file says"


def _functions(source: Source) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(source.tree) if isinstance(node, FUNCTIONS)]


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    spec = function.args
    names = [arg.arg for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg) if arg]
    return len([name for name in names if name not in {"self", "cls"}])


def _depth(node: ast.AST) -> int:
    """Deepest nesting of blocks below a node; an ``elif`` is as deep as its ``if``, inner functions count for themselves."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, _depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def _too_many_long_functions(sources: list[Source]) -> list[str]:
    lengths = [
        (_length(function), f"{source.place}:{function.lineno}") for source in sources for function in _functions(source)
    ]
    long = sorted((pair for pair in lengths if pair[0] > MAX_USUAL_FUNCTION), reverse=True)
    if len(lengths) - len(long) >= USUAL_SHARE * len(lengths):
        return []
    return [f"{long[0][1]}: {len(long)} of {len(lengths)} functions are longer than {MAX_USUAL_FUNCTION} lines"]


def test_the_package_keeps_the_house_rules():
    assert violations(PACKAGE) == []


PLANTED = {
    "a stage imports a stage": ("tile/stage.py", "from pathfm.mil import fit", "tile must not import pathfm.mil.fit"),
    "a stage is imported as a name": ("tile/stage.py", "from pathfm import mil", "tile must not import pathfm.mil"),
    "an import points up": ("store/commit.py", "import pathfm.models.vit", "store must not import pathfm.models.vit"),
    "store imports slides": ("store/commit.py", "from pathfm.slides import open_slide", "store must not import pathfm.slides"),
    "only for type checking": (
        "stats/splits.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pathfm.store.cohort import Cohort",
        "stats/splits.py:3: stats must not import pathfm.store.cohort.Cohort",
    ),
    "inside a function": ("geometry.py", "def f():\n    import pathfm.cli", "geometry.py:2: geometry must not import"),
    "relative": ("tile/stage.py", "from ..mil import fit", "tile must not import pathfm.mil.fit"),
    "by name": ("tile/stage.py", "import importlib\nimportlib.import_module('pathfm.mil')", "tile must not import pathfm.mil"),
    "no layer": ("helpers.py", "", "helpers is in no layer"),
    "openslide in a stage": ("tile/stage.py", "import openslide", "openslide is imported outside slides"),
    "tifffile in the store": ("store/tiles.py", "from tifffile import imread", "tifffile is imported outside slides"),
    "zarr in a stage": ("extract/stage.py", "import zarr.storage", "zarr is imported outside store"),
    "h5py in a stage": ("mil/bags.py", "import h5py", "h5py is imported outside store"),
    "timm in a stage": ("extract/stage.py", "from timm.models import vit", "timm is imported outside models"),
    "lightning in a stage": ("mil/fit.py", "import lightning as L", "lightning is imported outside compute, pretrain"),
    "typer below": ("workflow.py", "import typer", "typer is imported outside cli"),
    "matplotlib in a stage": ("mil/heatmap.py", "import matplotlib.pyplot", "matplotlib is imported outside report"),
    "torch in slides": ("slides/tiff.py", "import torch", "torch is imported outside"),
    "torch in the store": ("store/tiles.py", "from torch import Tensor", "torch is imported outside"),
    "torch in the statistics": ("stats/metrics.py", "import torch.nn", "torch is imported outside"),
    "torch in the workers": ("workers.py", "import torch", "torch is imported outside"),
    "pickle": ("mil/bundle.py", "import pickle\npickle.load(open('x'))", "mil/bundle.py:2: pickle.load runs"),
    "pickle by name": ("mil/bundle.py", "from pickle import loads", "mil/bundle.py:1: pickle.loads runs"),
    "torch.load": ("models/vit.py", "import torch\ntorch.load('x', weights_only=False)", "models/vit.py:2: torch.load without"),
    "allow_pickle": ("stats/metrics.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle runs"),
    "utils": ("store/utils.py", "", "store/utils.py:1: a utils module"),
    "a shadow": ("mil/statistics.py", "", "shadows the standard library's statistics"),
    "a long file": ("log.py", "x = 1\n" * 401, "log.py:1: 401 lines"),
    "a long settings page": ("study.py", "x = 1\n" * 451, "study.py:1: 451 lines"),
    "a long function": ("log.py", "def f():\n" + "    x = 1\n" * 60, "log.py:1: f has 61 lines"),
    "many parameters": ("log.py", "def f(a, b, c, d, /, e, *f, g, **h):\n    pass", "log.py:1: f has 8 parameters"),
    "deep nesting": (
        "log.py",
        "class C:\n def f(self):\n  for a in b:\n   if a:\n    pass\n   elif b:\n    with a:\n     while b:\n      pass",
        "log.py:2: f nests 4 deep",
    ),
}


@pytest.mark.parametrize(("file", "text", "named"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_named(tmp_path, file, text, named):
    planted = tmp_path / "pathfm" / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(text)
    assert [problem for problem in violations(tmp_path / "pathfm") if named in problem]


def test_what_the_house_allows_is_not_named(tmp_path):
    allowed = {
        "__init__.py": "__version__ = '1'",
        "config.py": "from pathfm.study import Study\nimport yaml",
        "mil/fit.py": "import torch\nfrom pathfm.store import cohort\nfrom pathfm.mil import bags\nfrom . import bags",
        "models/vit.py": "import timm, torch\nfrom pathfm.store.commit import commit_dir\ntorch.load('x', weights_only=True)",
        "cli.py": "import typer\nfrom pathfm import __version__, workflow\ndef f():\n    from pathfm.mil import fit",
        "study.py": "x = 1\n" * 450,
        "log.py": "def f(self, a, b, c, d, e, f, g):\n" + "    x = 1\n" * 34,
        "stats/splits.py": "for a in b:\n if a:\n  pass\n elif b:\n  pass\n elif c:\n  with d:\n   pass",
    }
    for file, text in allowed.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []


def test_most_functions_must_be_short(tmp_path):
    short, long = "def f():\n    pass\n", "def f():\n" + "    x = 1\n" * 35
    (tmp_path / "log.py").write_text(short * 18 + long * 2)
    assert violations(tmp_path) == []
    (tmp_path / "log.py").write_text(short * 8 + long)
    assert violations(tmp_path) == ["log.py:17: 1 of 9 functions are longer than 35 lines"]


def test_importing_the_lower_layers_brings_no_torch():
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if LEVEL.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), 9) <= 1
    ]
    heavy = "{'torch', 'timm', 'lightning', 'matplotlib', 'rich', 'typer'}"
    code = f"import sys, {', '.join(modules)}; print(*sorted({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert output.stdout.strip() == ""
