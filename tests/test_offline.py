"""The folder for machines without internet: what is in it, what an interrupted run keeps, and its script, which is run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from pathfm import offline
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.mil.bundle import write_bundle
from tests.mil.bundles import facts_in

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "import sys\ndef main():\n    print('pathfm', *sys.argv[1:])\n"


class Installed:
    """A distribution that is installed from an index, or from a folder."""

    def __init__(self, version, source=None, requires=None):
        self.version = version
        self.source = source
        self.requires = requires

    def read_text(self, name):
        is_asked = self.source and name == "direct_url.json"
        return json.dumps({"url": self.source.as_uri(), "dir_info": {}}) if is_asked else None


def write_wheel(folder, name, version):
    """A wheel as small as they come; that of pathfm has a command that says its arguments."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": COMMAND,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index with two packages, which are what is installed; nothing else is asked."""
    write_wheel(tmp_path / "index", "alpha", "1.0")
    write_wheel(tmp_path / "index", "pathfm", "7.0")
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(offline, "installed", lambda: {"alpha": Installed("1.0"), "pathfm": Installed("7.0")})
    return tmp_path / "index"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "carry"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_bundle(folder / "bundle", facts_in(folder))
    return folder / "bundle"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_wheels_that_an_interrupted_run_got_are_kept_and_the_folder_is_whole_or_absent(index, out, capsys, monkeypatch):
    (index / "pathfm-7.0-py3-none-any.whl").rename(index / "gone")
    monkeypatch.setenv("PIP_INDEX_URL", "https://name:secret@localhost/simple")
    with pytest.raises(UsageError, match=r"cannot get a wheel of pathfm 7\.0: no index is in reach") as caught:
        offline.carry(out)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not out.exists()
    (index / "gone").rename(index / "pathfm-7.0-py3-none-any.whl")
    (index / "alpha-1.0-py3-none-any.whl").unlink()
    assert offline.carry(out) == ExitCode.DONE
    assert names(out) == ["README.txt", "SHA256SUMS", "constraints.txt", "install.sh", "sbom.json", "wheels"]
    assert names(out / "wheels") == ["alpha-1.0-py3-none-any.whl", "pathfm-7.0-py3-none-any.whl"]
    assert (out / "constraints.txt").read_text() == "alpha==1.0\n"
    assert not list(out.parent.glob(".carry*"))
    written = "".join(path.read_text() for path in out.iterdir() if path.is_file())
    assert "secret" not in written and str(index) not in written and sys.prefix not in written
    assert offline.check_carried(out) == ExitCode.DONE
    assert "2 packages" in capsys.readouterr().out


def test_models_are_checked_before_and_after_they_are_copied(index, out, bundle, tmp_path):
    from pathfm.encoder_listing import fetch

    fetch("untrained:resnet10t", tmp_path / "small")
    assert offline.carry(out, [bundle], [tmp_path / "small"], wheels=False) == ExitCode.DONE
    (copy,) = (out / "bundles").iterdir()
    assert copy.name.startswith("bundle-") and names(copy) == names(bundle)
    assert [name.partition("-")[0] for name in names(out / "encoders")] == ["small"] and not (out / "wheels").exists()
    assert offline.check_carried(out) == ExitCode.DONE
    assert offline.carry(out, [bundle], wheels=False) == ExitCode.DONE  # an earlier folder is replaced
    assert not (out / "encoders").exists() and (out / "constraints.txt").read_text() == ""
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    next(damaged.glob("members/*.safetensors")).write_bytes(b"other")
    for models in ({"bundles": [damaged]}, {"encoders": [bundle]}):
        with pytest.raises((StoreError, UsageError)):
            offline.carry(tmp_path / "second", wheels=False, **models)
    assert not (tmp_path / "second").exists()


def test_a_change_on_the_way_is_found(index, out, bundle, monkeypatch):
    offline.carry(out, [bundle])
    monkeypatch.setattr(offline, "installed", lambda: {"pathfm": Installed("7.0")})
    assert offline.check_carried(out) == ExitCode.SOME_FAILED
    (out / "more.txt").write_text("")
    with pytest.raises(StoreError, match=r"more\.txt is too many"):
        offline.check_carried(out)
    (out / "more.txt").unlink()
    (out / "constraints.txt").write_text("alpha==1.1\n")
    with pytest.raises(StoreError, match=r"constraints\.txt is not the file that was carried"):
        offline.check_carried(out)
    (out / "constraints.txt").unlink()
    with pytest.raises(StoreError, match=r"constraints\.txt is missing"):
        offline.check_carried(out)


def test_the_own_wheel_is_made_from_all_of_the_source_that_runs_and_no_other(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["data-files"].values()
    assert {file.partition("/")[0] for files in data for file in files} <= set(offline.SOURCE)
    copy = Path(offline._requirement("pathfm", Installed("7.0", ROOT), tmp_path))
    assert copy != ROOT and (copy / "pipelines" / "Snakefile").is_file() and not list(copy.rglob("__pycache__"))
    with pytest.raises(UsageError, match="the folder that pathfm was installed from is gone"):
        offline._requirement("pathfm", Installed("7.0", tmp_path / "gone"), tmp_path)
    metadata, code = "Name: pathfm\nRequires-Dist: alpha>=1\n", (ROOT / "pathfm" / "cli.py").read_text()
    for text, needs, same in ((code, ["alpha>=1"], True), ("changed since", ["alpha>=1"], False), (code, ["alpha"], False)):
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
            archive.writestr("pathfm/cli.py", text)
            archive.writestr("pathfm-7.0.dist-info/METADATA", metadata)
        assert offline._is_what_runs(tmp_path / "a.whl", Installed("7.0", requires=needs)) is same


def test_what_is_not_a_carried_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="something else already"):
        offline.carry(tmp_path, wheels=False)
    with pytest.raises(StoreError, match="no carried folder"):
        offline.check_carried(tmp_path)


@pytest.mark.parametrize("named", [".", "the whole path"])
def test_the_current_folder_and_a_drive_are_refused_before_any_work(tmp_path, monkeypatch, named):
    """They cannot be replaced by a rename."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(offline, "sbom", None)
    with pytest.raises(UsageError, match=r"current one, or a drive.*name a folder in it, e\.g\. .*carry"):
        offline.carry(Path(named) if named == "." else tmp_path, wheels=False)
    (tmp_path / "drive").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "drive")
    with pytest.raises(UsageError, match="drive"):
        offline.carry(tmp_path / "drive", wheels=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "drive"]


def install(out, target, **environment):
    command = ["sh", str(out / "install.sh"), str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def write_python(path, says):
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return path


@pytest.mark.long
def test_wheels_that_cannot_be_installed_leave_nothing(index, out, tmp_path):
    offline.carry(out)
    wheel = out / "wheels" / "alpha-1.0-py3-none-any.whl"
    wheel.rename(wheel.with_name("alpha-1.0-cp27-none-beos_ppc.whl"))
    (out / "SHA256SUMS").unlink()
    offline._write_sums(out)
    failed = install(out, tmp_path / "there", PYTHON=sys.executable)
    assert failed.returncode == 1 and not (tmp_path / "there").exists()
    assert failed.stderr.splitlines()[-1] == "nothing was installed" and "here is glibc" in failed.stderr


@pytest.mark.long
def test_the_script_checks_installs_and_verifies_from_nothing_but_the_folder(index, out, tmp_path):
    offline.carry(out)
    shutil.rmtree(index)
    python = {"PYTHON": sys.executable}
    done = install(out, tmp_path / "there", **python)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "checked: all files are as they were made",
        f"installed: {tmp_path / 'there'}",
        "pathfm doctor",
        "pathfm verify .",
    ]
    assert names(tmp_path / "there" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages" / "alpha")
    (out / "wheels" / "more.whl").write_bytes(b"")
    refused = install(out, tmp_path / "two", **python)
    assert refused.returncode == 3 and refused.stderr.startswith("wheels/more.whl\nthese files are not of this folder")
    (out / "wheels" / "more.whl").unlink()
    refused = install(out, tmp_path / "there", **python)
    assert refused.returncode == 2 and "something in" in refused.stderr and (tmp_path / "there" / "bin" / "pathfm").exists()
    other = write_python(tmp_path / "python", "2.7 beos-ppc")
    refused = install(out, tmp_path / "two", PYTHON=str(other))
    assert refused.returncode == 2 and f"and {other} is 2.7 beos-ppc" in refused.stderr
    with (out / "wheels" / "alpha-1.0-py3-none-any.whl").open("ab") as wheel:
        wheel.write(b"x")
    refused = install(out, tmp_path / "two", **python)
    assert refused.returncode == 3 and "copy it again" in refused.stderr and not (tmp_path / "two").exists()
    assert install(out, "", **python).returncode == 2
    shutil.rmtree(out)
    offline.carry(out, wheels=False)
    assert install(out, tmp_path / "there").stdout.splitlines()[-1] == "pathfm verify ."


@pytest.mark.long
def test_killed_after_a_wheel_nothing_is_there_and_the_next_run_goes_on(index, out):
    code = (
        "import sys; from pathlib import Path; from pathfm import offline; from tests.test_offline import Installed;"
        "offline.installed = lambda: {'alpha': Installed('1.0'), 'pathfm': Installed('7.0')};"
        "offline.carry(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(out)]
    for point, kept in (("offline.wheel", 1), ("offline.wheel:1", 2), ("store.commit.before_rename", 2)):
        environment = {**os.environ, "PATHFM_CRASH_AT": point}
        killed = subprocess.run(command, env=environment, check=False, cwd=ROOT, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists() and len(list((out.parent / ".carry.wheels").glob("*.whl"))) == kept
    shutil.rmtree(index)
    assert offline.carry(out) == ExitCode.DONE
    assert len(names(out / "wheels")) == 2 and offline.check_carried(out) == ExitCode.DONE
