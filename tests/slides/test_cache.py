"""The cache: in order, within its bound at every moment, never in the way, and nothing left of it."""

from __future__ import annotations

import http.server
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from pathfm.errors import UsageError
from pathfm.slides import cache as cache_module
from pathfm.slides.cache import SlideCache
from pathfm.slides.source import LocalSource
from pathfm.workers import ProcessName, map_isolated

MB = 10**6


@pytest.fixture
def slides(tmp_path):
    """Makes slides of the given sizes [bytes]."""

    def make(*sizes, suffix=".svs"):
        folder = tmp_path / "slides"
        folder.mkdir(exist_ok=True)
        paths = [folder / f"slide {number}{suffix}" for number in range(len(sizes))]
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
            path.write_bytes(bytes([number % 256]) * size)
        return paths

    return make


def bytes_in(folder):
    sizes = []
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                sizes.append(Path(place, name).stat().st_size)
    return sum(sizes)


def use(folder, paths, gigabytes, lookahead=2):
    """Reads all slides one after the other; which were copies, and the most bytes that were there at any moment."""
    most, copies, copy_file = [0], [], SlideCache._copy_file

    def copy_and_look(cache, file, target):  # the folder is never fuller than right after a file was copied
        copy_file(cache, file, target)
        most[0] = max(most[0], bytes_in(folder))

    with pytest.MonkeyPatch.context() as patch, SlideCache(folder, gigabytes, lookahead) as cache:
        patch.setattr(SlideCache, "_copy_file", copy_and_look)
        for task, path in cache.ahead(list(enumerate(paths)), lambda task: task[1]):
            assert task == (len(copies), paths[len(copies)])
            assert path.name == task[1].name
            assert path.read_bytes() == task[1].read_bytes()
            copies.append(path != task[1])
            cache.done(path)
            assert path == task[1] or not path.exists()
    assert list(folder.iterdir()) == []
    return copies, most[0]


def test_slides_come_in_order_from_the_cache_and_go(tmp_path, slides):
    copies, most = use(tmp_path / "cache", slides(*[1000] * 30), 1)
    assert copies == [True] * 30
    assert most <= 3000, "one in use and two ahead"


@hypothesis.settings(max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.integers(0, 400_000), max_size=8), st.sampled_from([1000, 300_000, 900_000]), st.integers(1, 4))
def test_the_bound_holds_at_every_moment(tmp_path, slides, sizes, bound, lookahead):
    copies, most = use(tmp_path / "cache", slides(*sizes), bound / 1e9, lookahead)
    assert most <= bound
    assert all(size <= bound for size, copied in zip(sizes, copies, strict=True) if copied)
    assert all(copied for size, copied in zip(sizes, copies, strict=True) if size <= bound), (
        "one worker never has to go without"
    )


def test_the_next_slides_are_copied_while_one_is_worked_on(tmp_path, slides):
    paths = slides(*[1000] * 6)
    drawn = []

    def tasks():
        for path in paths:
            drawn.append(path)
            yield path

    with SlideCache(tmp_path / "cache", 1, lookahead=2) as cache:
        running = cache.ahead(tasks(), lambda path: path)
        next(running)
        until = time.monotonic() + 5
        while bytes_in(tmp_path / "cache") < 3000 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert bytes_in(tmp_path / "cache") == 3000
        assert len(drawn) == 3, "no more is taken from other machines than is used soon"


def test_a_slide_larger_than_the_bound_is_read_in_place(tmp_path, slides, caplog):
    with caplog.at_level(logging.WARNING):
        copies, _ = use(tmp_path / "cache", slides(1000, 3000, 1000), 2000 / 1e9)
    assert copies == [True, False, True]
    assert "slide 1.svs: read where it is: larger than compute.cache_gb" in caplog.text


def test_a_full_cache_holds_nobody_up(tmp_path, slides):
    """Four workers, room for two slides, and nobody is done before all have begun."""
    paths = slides(*[1000] * 6)
    with SlideCache(tmp_path / "cache", 2000 / 1e9) as cache:
        given = [path for _, path in cache.ahead(paths, lambda path: path)]
    assert [path in paths for path in given] == [False, False, True, True, True, True]


def test_a_copy_that_fails_is_read_in_place(tmp_path, slides, caplog, monkeypatch):
    real = LocalSource.read_many

    def failing(source, ranges):
        if source.name.endswith("slide 1.svs"):
            raise OSError(5, "Input/output error")
        if source.name.endswith("slide 2.svs"):
            Path(source.name).write_bytes(b"x")  # another program writes the slide while it is copied
        return real(source, ranges)

    monkeypatch.setattr(LocalSource, "read_many", failing)
    paths = [*slides(1000, 1000, 1000, 1000), tmp_path / "absent.svs"]
    with caplog.at_level(logging.WARNING), SlideCache(tmp_path / "cache", 3000 / 1e9) as cache:
        given = []
        for _, path in cache.ahead(paths, lambda path: path):
            given.append(path)
            cache.done(path)
        assert cache._used == 0
    assert [path in paths for path in given] == [False, True, True, False, True]
    assert len(caplog.records) == 3
    assert list((tmp_path / "cache").iterdir()) == []


def test_slides_of_several_files_are_copied_whole(tmp_path):
    folder = tmp_path / "slides"
    (folder / "a" / "deep").mkdir(parents=True)
    (folder / "dicom").mkdir()
    for name in ("a.mrxs", "a/Slidedat.ini", "a/deep/Data.dat", "other.svs", "dicom/1.dcm", "dicom/2.dcm", "x.vms", "x.jpg"):
        (folder / name).write_bytes(name.encode())
    paths = [folder / name for name in ("a.mrxs", "dicom", "x.vms", "dicom/1.dcm")]
    seen = []
    with SlideCache(tmp_path / "cache", 1) as cache:
        for task, path in cache.ahead(paths, lambda path: path):
            base = path.parent
            seen.append(sorted(each.relative_to(base).as_posix() for each in base.rglob("*") if each.is_file()))
            assert all((base / name).read_bytes() == (task.parent / name).read_bytes() for name in seen[-1])
            seen[-1] = seen[-1] if path != task else "in place"
            cache.done(path)
    assert seen == [["a.mrxs", "a/Slidedat.ini", "a/deep/Data.dat"], ["dicom/1.dcm", "dicom/2.dcm"], "in place", "in place"]


def test_an_ome_slide_of_several_files_is_read_in_place(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    import numpy as np

    pixels = np.zeros((16, 16), np.uint8)
    uuid = '<TiffData><UUID FileName="{}">urn:uuid:0</UUID></TiffData>'
    xml = '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image>{}</Image></OME>'
    paths = [tmp_path / name for name in ("one.ome.tif", "first.ome.tif", "plain.tif")]
    for path, named in zip(paths, ("one.ome.tif", "second.ome.tif", ""), strict=True):
        description = xml.format(uuid.format(named)) if named else None
        tifffile.imwrite(path, pixels, description=description, metadata=None)
    with SlideCache(tmp_path / "cache", 1) as cache:
        given = [path for _, path in cache.ahead(paths, lambda path: path)]
    assert [path in paths for path in given] == [False, True, False]


def test_a_slide_on_a_server_is_downloaded(tmp_path, slides):
    (path,) = slides(3 * MB)
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")

    class Ranges(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            data = path.read_bytes()
            first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = Path(f"http://127.0.0.1:{server.server_port}/a.svs?signature=secret")
        with SlideCache(tmp_path / "cache", 1) as cache:
            ((_, local),) = cache.ahead([url], lambda url: url)
            assert local.name == "a.svs"
            assert local.read_bytes() == path.read_bytes()
        server.shutdown()


def test_what_the_tasks_raise_is_raised(tmp_path, slides):
    def tasks():
        yield from slides(10)
        raise UsageError("no more")

    with SlideCache(tmp_path / "cache", 1) as cache, pytest.raises(UsageError, match="no more"):
        list(cache.ahead(tasks(), lambda path: path))


@pytest.mark.parametrize("stuck", ["source", "full"])
def test_closing_waits_for_nothing(tmp_path, slides, stuck, monkeypatch):
    """A drive that does not answer, or a cache that is full."""
    monkeypatch.setattr(cache_module, "_PATIENCE_S", 0.2)
    released = threading.Event()
    paths = slides(*[1000] * 4)
    if stuck == "source":
        monkeypatch.setattr(LocalSource, "read_many", lambda source, ranges: released.wait(30) and [b""])
    cache = SlideCache(tmp_path / "cache", 2000 / 1e9)
    running = cache.ahead(paths, lambda path: path)
    threading.Timer(0.3, cache.close).start()
    started = time.monotonic()
    assert len(list(zip(range(2), running, strict=False))) == (2 if stuck == "full" else 0)
    assert time.monotonic() - started < 5
    cache.close()
    released.set()
    assert list((tmp_path / "cache").iterdir()) == []


def read(task):
    """What a worker process does with a slide of this test."""
    path, kills = task
    if kills:
        os.kill(os.getpid(), signal.SIGKILL)
    return path.read_bytes()[:1]


def _local(cache, paths):
    for number, (_, path) in enumerate(cache.ahead(paths, lambda path: path)):
        yield path, number % 3 == 2


def test_with_worker_processes_some_of_which_die(tmp_path, slides):
    paths = slides(*[1000] * 12)
    with SlideCache(tmp_path / "cache", 4000 / 1e9) as cache:
        outcomes = {}
        for (path, _), outcome in map_isolated(read, _local(cache, paths), workers=2):
            outcomes[path.name] = outcome
            cache.done(path)
        assert bytes_in(tmp_path / "cache") == 0
    for number in range(12):
        outcome = outcomes[f"slide {number}.svs"]
        assert outcome == bytes([number]) or (number % 3 == 2 and "SIGKILL" in str(outcome))


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_uses_is_not(tmp_path, slides):
    slides(1000, 1000)
    code = (
        "import sys; from pathlib import Path; from pathfm.slides.cache import SlideCache\n"
        "cache = SlideCache(Path(sys.argv[1]), 1)\n"
        "task, path = next(cache.ahead(sorted(Path(sys.argv[2]).iterdir()), lambda path: path))\n"
        "print(path, flush=True); sys.stdin.readline()"
    )
    folder = tmp_path / "cache"
    arguments = [sys.executable, "-c", code, folder, tmp_path / "slides"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        local = Path(process.stdout.readline().strip())
        SlideCache(folder, 1).close()
        assert local.exists(), "it is in use"
        process.kill()
    assert local.exists(), "the kill landed while it was in use"
    foreign = folder / f"pathfm-cache-{ProcessName.here()._replace(boot='0', machine='0', pid=2**30)}"
    foreign.mkdir()
    (folder / "something else").touch()
    SlideCache(folder, 1).close()
    assert sorted(folder.iterdir()) == sorted([foreign, folder / "something else"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"the cache folder cannot be written: .* \(choose another local folder"):
        SlideCache(tmp_path / "file" / "cache", 1)
