"""What this machine can do, in ten lines: ``ok``, ``note`` (worth knowing) or ``missing`` (something will not work)."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from pathfm import __version__
from pathfm.workers import usable_cores

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "report": ("jinja2", "matplotlib"),
    "formats": ("imagecodecs",),
    "dicom": ("pydicom", "highdicom"),
    "remote": ("fsspec",),
    "interop": ("pyarrow", "openpyxl"),
    "tensorboard": ("tensorboard",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "pipelines": ("snakemake", "snakemake-executor-plugin-slurm"),
    "audit": ("cyclonedx-python-lib",),
    "transformers": ("transformers",),
    "umap": ("umap-learn",),
}
"""Optional libraries by the extra that installs them."""
CPU_FEATURES: Mapping[str, str] = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "bf16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "bf16": "bf16",
}
"""Flags of /proc/cpuinfo that decide how fast networks run, as people call them."""
GIB = 1 << 30
LEAST_MEMORY, LEAST_DISK = 8 * GIB, 20 * GIB
"""Below these a usual study gets into trouble [bytes]."""
BF16_CAPABILITY = (8, 0)
"""CUDA compute capability from which bf16 is done in hardware."""
_TROUBLE = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)


def diagnose() -> list[str]:
    """Ten lines about this machine. Never fails: what cannot be found out is a ``note``. Tells no host name."""
    probes: tuple[tuple[str, Callable[[], str]], ...] = (
        ("Python", _python),
        ("CPU", _cpu),
        ("memory", _memory),
        ("torch", _torch),
        ("GPU", _gpus),
        ("OpenSlide", _openslide),
        ("decoders", _decoders),
        ("storage", _storage),
        ("extras", _extras),
        ("disk", _disk),
    )
    return [_safely(name, probe) for name, probe in probes]


def _safely(name: str, probe: Callable[[], str]) -> str:
    try:
        return probe()
    except _TROUBLE as error:
        return _line("note", f"{name}: cannot be found out ({type(error).__name__}: {' '.join(str(error).split())[:120]})")


def _line(status: str, text: str) -> str:
    return f"{status:<7}  {text}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _named(package: str) -> str:
    return f"{package} {_version(package) or 'absent'}"


def _python() -> str:
    system = f"{platform.system()} {platform.machine()}"
    return _line("ok", f"pathfm {__version__}, Python {platform.python_version()}, {system}")


def _cpu() -> str:
    facts = _cpu_facts(Path("/proc/cpuinfo"))
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    model = facts.get("model name") or platform.processor() or platform.machine()
    features = list(dict.fromkeys(name for flag, name in CPU_FEATURES.items() if flag in flags))
    known = f"; {', '.join(features)}" if features else ""
    speed = "" if not flags or flags & {"avx512_bf16", "amx_bf16", "bf16"} else "; no bf16: keep precision fp32 here"
    return _line("ok", f"CPU: {model}, {usable_cores()} of {os.cpu_count()} cores usable{known}{speed}")


def _cpu_facts(path: Path) -> dict[str, str]:
    """The first processor's facts; none where there is no such file."""
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n", maxsplit=1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _memory_limit((Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")))
    usable = min(total, limit or total)
    limited = f" (limited, of {total / GIB:.1f} GiB)" if usable < total else ""
    free = _available(Path("/proc/meminfo"))
    available = "" if free is None else f", {min(free, usable) / GIB:.1f} GiB free"
    return _line("ok" if usable >= LEAST_MEMORY else "note", f"memory: {usable / GIB:.1f} GiB{limited}{available}")


def _memory_limit(files: tuple[Path, ...]) -> int | None:
    """The limit of this process's container [bytes], None without one."""
    texts = [path.read_text(encoding="ascii").strip() for path in files if path.is_file()]
    return min((int(text) for text in texts if text.isdigit()), default=None)


def _available(path: Path) -> int | None:
    if not path.is_file():
        return None
    rows = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return next((int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:"), None)


def _torch() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        return _line("missing", f"torch: cannot be loaded ({' '.join(str(error).split())[:120]})")
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return _line("ok", f"torch {torch.__version__}, {build}, {torch.get_num_threads()} threads")


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return _line("note", "GPU: none that torch can use; everything runs on the CPU")
    names = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if (facts.major, facts.minor) >= BF16_CAPABILITY else "no bf16"
        names.append(f"cuda:{index} {facts.name}, {facts.total_memory / GIB:.0f} GiB, {bf16}")
    return _line("ok", f"GPU: {'; '.join(names)}")


def _openslide() -> str:
    try:
        importlib.import_module("pathfm.slides.openslide_reader")
    except (ImportError, OSError) as error:
        return _line("missing", f"OpenSlide: cannot be loaded ({' '.join(str(error).split())[:120]})")
    library = _version("openslide-bin")
    native = (
        f"OpenSlide {library} (openslide-bin)" if library else "OpenSlide of the system (pip install openslide-bin is safer)"
    )
    return _line("ok" if library else "note", f"{native}, binding {_version('openslide-python') or 'unknown'}")


def _decoders() -> str:
    if not _version("simplejpeg"):
        return _line("missing", "decoders: simplejpeg is absent (pip install simplejpeg)")
    optional = {"imagecodecs": "formats", "pydicom": "dicom"}
    absent = [
        f"{package} absent: pip install 'pathfm[{extra}]'" for package, extra in optional.items() if not _version(package)
    ]
    present = [_named(package) for package in ("simplejpeg", "tifffile", *optional) if _version(package)]
    dicom = "DICOM slides through OpenSlide"
    return _line(
        "note" if absent else "ok", f"decoders: {', '.join(present)}; {dicom}{''.join(f'; {text}' for text in absent)}"
    )


def _storage() -> str:
    absent = [package for package in ("zarr", "h5py") if not _version(package)]
    return _line("missing" if absent else "ok", f"storage: {_named('zarr')}, {_named('h5py')}")


def _extras() -> str:
    absent = [extra for extra, packages in EXTRAS.items() if not all(_version(package) for package in packages)]
    present = [extra for extra in EXTRAS if extra not in absent]
    have = f"extras: {', '.join(present) or 'none'}"
    return _line("note", f"{have}; absent: pip install 'pathfm[{','.join(absent)}]'") if absent else _line("ok", have)


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    workers = usable_cores()
    plural = "worker" if workers == 1 else "workers"
    return _line(
        "ok" if free >= LEAST_DISK else "note", f"disk: {free / GIB:.0f} GiB free in this folder; {workers} {plural} by default"
    )
