"""The lock file of the environment fits what the package asks for."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def test_constraints_hold_a_fitting_version_of_every_direct_dependency_and_nothing_else():
    text = (ROOT / "constraints.txt").read_text().splitlines()
    comments, lines = ([line for line in text if line.startswith("#") is wanted] for wanted in (True, False))
    assert "make constraints" in " ".join(comments) and re.search(r"Python 3\.\d+", " ".join(comments))
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!]+", line) for line in lines)  # no paths, addresses or builds of one machine
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) and "pathfm" not in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name != "pathfm":
            assert name in pins, f"{requirement}: run `make constraints`"
            assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement}, not {pins[name]}"
