"""The list of software: valid CycloneDX, the same every time, and licences that need a look."""

import hashlib
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from pathfm import __version__, sbom
from pathfm.errors import ExitCode, MissingExtraError

pytest.importorskip("cyclonedx", reason="pip install 'pathfm[audit]'")


class Metadata(dict):
    def get_all(self, name):
        return self.get(name)


Made = namedtuple("Made", "metadata version requires record", defaults=({}, "1.0", (), ""))


class Fake(Made):
    """A distribution as importlib.metadata has it."""

    def read_text(self, name):
        return self.record if name == "RECORD" else None


def fake(requires=(), record="", **fields):
    return Fake(Metadata({name.replace("_", "-"): [text] for name, text in fields.items()}), "1.0", requires, record)


@pytest.fixture(scope="module")
def content():
    return sbom.sbom()


def test_the_list_is_valid_names_everything_and_no_machine(content):
    validation = pytest.importorskip("cyclonedx.validation.json", reason="pip install 'cyclonedx-python-lib[json-validation]'")
    from cyclonedx.schema import SchemaVersion

    text = json.dumps(content)
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert content["specVersion"] == "1.6" and "timestamp" not in content["metadata"]
    assert content["metadata"]["component"]["name"] == "pathfm"
    components = {part["name"]: part for part in content["components"]}
    assert components.keys() >= {"torch", "numpy", "zarr", "openslide-bin", "CPython"}
    torch = components["torch"]
    assert torch["purl"] == f"pkg:pypi/torch@{torch['version']}"
    assert torch["licenses"] and torch["hashes"][0]["alg"] == "SHA-256"
    assert sys.prefix not in text and str(Path.cwd()) not in text


def test_the_graph_says_what_pathfm_needs(content):
    graph = {part["ref"]: part.get("dependsOn", []) for part in content["dependencies"]}
    direct = {reference.partition("@")[0].removeprefix("pkg:pypi/") for reference in graph[f"pkg:pypi/pathfm@{__version__}"]}
    assert direct >= {"torch", "zarr", "pydantic", "jinja2"}
    assert all(reference in graph for others in graph.values() for reference in others)


def test_extras_are_followed_and_markers_of_other_machines_are_not(monkeypatch):
    here = {
        "a": fake(["B[fast]>=1", "d; sys_platform == 'nowhere'"]),
        "b": fake(["c; extra == 'fast'", "absent; extra == 'slow'"]),
        "c": fake(),
        "d": fake(),
    }
    monkeypatch.setattr(sbom, "installed", lambda: here)
    assert sbom.dependencies() == {"a": ["b"], "b": ["c"], "c": [], "d": []}


@pytest.mark.long
def test_two_processes_write_the_same_bytes(tmp_path):
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        code = "from pathlib import Path; from pathfm.sbom import write_sbom; write_sbom(Path('sbom.json'))"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True)
    assert (tmp_path / "1" / "sbom.json").read_bytes() == (tmp_path / "2" / "sbom.json").read_bytes()


@pytest.mark.parametrize(
    ("licence", "refused"),
    [
        ("MIT", False),
        ("GPL-3.0-only", True),
        ("GPLv3", True),
        ("AGPL-3.0-or-later", True),
        ("LGPL-2.1-or-later", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("GNU General Public License (GPL)", True),
        ("GNU Affero General Public License v3", True),
        ("Mozilla Public License 2.0 (MPL 2.0)", False),
        ("CC-BY-NC-ND-4.0", True),
        ("free for non-commercial use", True),
        ("MIT OR GPL-2.0-only", False),
        ("BSD-3-Clause AND GPL-2.0-only", True),
        ("MIT AND (BSD-3-Clause OR GPL-2.0-only)", False),
        ("MIT AND (BSD-3-Clause AND (MIT OR GPL-2.0-only AND Zlib) AND AGPL-3.0-only)", True),
        ("BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1", False),
    ],
)
def test_licences_that_need_a_look(licence, refused):
    assert sbom.is_refused(licence) is refused


def test_where_a_licence_is_stated():
    assert sbom.licences(fake(License_Expression="MIT AND Zlib", License="BSD")) == ("MIT AND Zlib",)
    assert sbom.licences(fake(License="Apache 2.0")) == ("Apache 2.0",)
    assert sbom.licences(fake(License="UNKNOWN")) == ()
    classifier = "License :: OSI Approved :: MIT License"
    assert sbom.licences(fake(License="Permission is\nhereby granted", Classifier=classifier)) == ("MIT License",)


def test_findings_are_listed_with_exit_code_3_and_the_file_is_there(monkeypatch, tmp_path, capsys):
    here = {
        "bad": fake(Name="bad", License_Expression="AGPL-3.0-only"),
        "docutils": fake(Name="docutils", License="GPL"),
        "gpu": fake(Name="gpu", License_Expression="LicenseRef-NVIDIA-Proprietary"),
        "pathfm": fake(["bad", "gpu"], Name="pathfm", License_Expression="Apache-2.0"),
        "silent": fake(Name="silent"),
    }
    monkeypatch.setattr(sbom, "installed", lambda: here)
    assert sbom.write_sbom(tmp_path / "sbom.json") == ExitCode.SOME_FAILED
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("licence")] == [
        "licence: bad 1.0: AGPL-3.0-only",
        f"licence: docutils is fine: {sbom.KNOWN['docutils']}",
    ]
    assert "note: proprietary, with terms of their own: gpu" in said and "note: no licence in the metadata: silent" in said
    assert "bad" in {part["name"] for part in json.loads((tmp_path / "sbom.json").read_text())["components"]}
    del here["bad"]
    assert sbom.write_sbom(tmp_path / "sbom.json") == ExitCode.DONE


def test_this_environment_has_no_finding():
    assert sbom.licence_findings() == []


def test_the_hash_is_of_what_came_and_not_of_where_it_lies():
    record = "a.py,sha256=aa,3\na-1.0.dist-info/METADATA,sha256=bb,4\n"
    place = (
        "../../bin/a,sha256=cc,5\na-1.0.dist-info/direct_url.json,sha256=dd,6\n__pycache__/a.pyc,,\na-1.0.dist-info/RECORD,,\n"
    )
    assert sbom.installed_hash(fake(record=record)) == sbom.installed_hash(fake(record=place + record))
    assert sbom.installed_hash(fake(record=record.replace("aa", "ab"))) != sbom.installed_hash(fake(record=record))
    assert sbom.installed_hash(fake()) == sbom.installed_hash(fake(record="__editable___a_finder.py,sha256=aa,3\n")) == ""


def test_the_digest_of_an_environment_is_of_names_and_versions(monkeypatch):
    assert sbom.environment_digest() == sbom.environment_digest()
    monkeypatch.setattr(sbom, "installed", lambda: {"a": fake(), "pip": fake()})
    plain = "a==1.0\n"
    assert sbom.environment_digest() == hashlib.sha256(plain.encode()).hexdigest()


def test_without_the_library_its_install_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cyclonedx.model.bom", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pathfm\[audit\]'"):
        sbom.sbom()
