import platform
import re
import tomllib
from pathlib import Path

import pytest

from pathfm import doctor
from pathfm.doctor import diagnose

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_ten_readable_lines_without_host() -> None:
    lines = diagnose()
    assert len(lines) == 10
    assert all(line.split()[0] in {"ok", "note", "missing"} and "\n" not in line for line in lines)
    text = "\n".join(lines)
    for word in (
        "Python",
        "CPU",
        "memory",
        "torch",
        "GPU",
        "OpenSlide",
        "simplejpeg",
        "zarr",
        "extras",
        "GiB free in this folder",
    ):
        assert word in text
    assert not platform.node() or platform.node() not in text
    assert "cannot be found out" not in text


def test_never_crashes_when_nothing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise OSError("no such thing\nhere")

    for module, name in (
        (doctor.shutil, "disk_usage"),
        (doctor.importlib, "import_module"),
        (doctor.os, "sysconf"),
        (doctor, "usable_cores"),
    ):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    lines = diagnose()
    assert len(lines) == 10 and not any("\n" in line for line in lines)
    starts = {line.split(":")[0].split(maxsplit=1)[1]: line.split()[0] for line in lines if ":" in line}
    assert starts["OpenSlide"] == starts["decoders"] == starts["storage"] == "missing"
    assert starts["disk"] == starts["memory"] == starts["CPU"] == "note"


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    declared = {
        extra: tuple(sorted(re.split(r"[>\[]", line)[0] for line in lines))
        for extra, lines in project["optional-dependencies"].items()
        if extra != "dev"
    }
    assert {extra: tuple(sorted(packages)) for extra, packages in doctor.EXTRAS.items()} == declared


def test_cpu_facts_and_limits(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Fast\nflags\t\t: avx2 amx_tile\n\nmodel name\t: Other\n", encoding="utf-8")
    assert doctor._cpu_facts(info) == {"model name": "Fast", "flags": "avx2 amx_tile"}
    assert doctor._cpu_facts(tmp_path / "absent") == {}
    limit, unlimited = tmp_path / "a", tmp_path / "b"
    limit.write_text("1024\n", encoding="ascii")
    unlimited.write_text("max\n", encoding="ascii")
    assert doctor._memory_limit((limit, unlimited)) == 1024
    assert doctor._memory_limit((unlimited, tmp_path / "absent")) is None
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8 kB\nMemAvailable: 4 kB\n", encoding="ascii")
    assert doctor._available(meminfo) == 4096
