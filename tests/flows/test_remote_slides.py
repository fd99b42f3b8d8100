"""Slides on servers: the same stores as from local files, in few requests, and no secret of an address anywhere."""

from __future__ import annotations

import csv
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.slides.synthetic_tiff import TiffOptions, write_pyramid
from pathfm.store.commit import content_digest
from tests.flows.conftest import run
from tests.slides.crosses import pyramid

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
pytest.importorskip("fsspec", reason="the extra `remote` is not installed")

SECRETS = ("hushhush", "topsecret", "jane")
"""Signature, password and user of the addresses."""
FEW = 60
"""Requests for one of these slides, whose stored tiles are about ten times as many."""
WAYS = {
    "shrunk": ["--mpp", "0.5", "--tile-px", "64"],
    "stitched": ["--mpp", "0.25", "--tile-px", "100", "--set", "tile.codec=zstd"],
    "passed through": ["--mpp", "native", "--tile-px", "128"],
    "coordinates": ["--mpp", "native", "--tile-px", "128", "--set", "tile.codec=none"],
}


class Server(ThreadingHTTPServer):
    """Serves the files of a folder by range; ``asked`` lists the names that were asked for, ``broken`` those it fails on."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.fails_after = folder, [], 10**9

    def handle_error(self, *_: object) -> None:
        """Clients that go away are part of the tests."""

    def url(self, name: str) -> str:
        return f"http://jane:topsecret@127.0.0.1:{self.server_port}/{name}?signature=hushhush"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        file = self.server.folder / unquote(urlsplit(self.path).path.lstrip("/"))
        self.server.asked.append(file.name)
        if len(self.server.asked) > self.server.fails_after:
            return self.answer(400, b"")
        if not file.is_file():
            return self.answer(404, b"")
        data = file.read_bytes()
        first, last = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
        body = data[first : last + 1]
        return self.answer(206, body, {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(data)}", "ETag": "1"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Tiled JPEG slides, several MB each so that no server's first answer holds them."""
    folder = tmp_path_factory.mktemp("slides")
    tissue = draw_slide(SyntheticSpec(size_px=Size(2048, 1800), seed=7))[0]
    options = {
        "aperio.svs": TiffOptions("aperio", Size(128, 128), shared_tables=True, quality=95),
        "ome.tif": TiffOptions("ome", Size(128, 128), quality=95),
    }
    for name, each in options.items():
        write_pyramid(folder / name, pyramid(tissue, (1, 4)), each)
    return folder


@pytest.fixture
def server(slides):
    with Server(slides) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def tiled(folder, slides, *options):
    """Tiles a table of (slide_id, path): exit code, folder of the stores, what was said."""
    folder.mkdir()
    with (folder / "cohort.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("slide_id", "path"), *slides])
    code, out, err = run("tile", folder / "cohort.csv", "--out", folder / "out", "--set=compute.threads=2", *options)
    return code, next((folder / "out" / "tiles").glob("*-*")), out + err


def written(folder):
    """Every byte of an output folder, and the names in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"".join(path.read_bytes() + str(path).encode() for path in files)


def facts(store):
    return json.loads((store / "zarr.json").read_text())["attributes"]["pathfm"]


@pytest.mark.parametrize(
    "way",
    ["shrunk", *(pytest.param(way, marks=pytest.mark.long) for way in ("passed through", "stitched", "coordinates"))],
)
def test_a_slide_on_a_server_gives_the_store_of_the_local_file(tmp_path, slides, server, way):
    code, near, said = tiled(tmp_path / "near", [("slide", slides / "ome.tif")], *WAYS[way])
    assert code == 0, said
    code, far, said = tiled(tmp_path / "far", [("slide", server.url("ome.tif"))], *WAYS[way])
    assert code == 0, said
    assert content_digest(far / "slide.zarr") == content_digest(near / "slide.zarr")
    assert len(server.asked) < FEW < facts(far / "slide.zarr")["tiles"]
    assert not any(secret.encode() in written(tmp_path / "far" / "out") + said.encode() for secret in SECRETS)


@pytest.mark.long
def test_an_aperio_slide_differs_in_who_read_its_scale_alone(tmp_path, slides, server):
    _, near, _ = tiled(tmp_path / "near", [("slide", slides / "aperio.svs")])
    code, far, said = tiled(tmp_path / "far", [("slide", server.url("aperio.svs"))])
    assert code == 0, said
    for array in ("tiles", "xy_level0", "quality", "thumbnail"):
        assert content_digest(far / "slide.zarr" / array) == content_digest(near / "slide.zarr" / array)
    ours, theirs = facts(far / "slide.zarr"), facts(near / "slide.zarr")
    assert {name for name in theirs if ours[name] != theirs[name]} == {"vendor", "mpp_source"}
    assert len(server.asked) < FEW


@pytest.mark.long
def test_addresses_on_the_command_line(tmp_path, slides, server):
    address = f"http://127.0.0.1:{server.server_port}/ome.tif"
    code, out, err = run("tile", address, "--out", tmp_path / "out")
    assert code == 0, err
    assert (next((tmp_path / "out" / "tiles").glob("*-*")) / "ome.zarr").is_dir()
    assert "tile: 1 done" in out
    code, out, err = run("tile", tmp_path / "out")
    assert (code, "1 kept" in out) == (0, True), err


@pytest.mark.long
def test_with_a_cache_any_kind_of_slide_is_downloaded_whole(tmp_path, slides, server):
    with (slides / "flat.tif").open("wb") as file:
        file.write((slides / "aperio.svs").read_bytes())
    sources = [("aperio", "aperio.svs"), ("renamed", "flat.tif")]
    _, near, _ = tiled(tmp_path / "near", [(name, slides / file) for name, file in sources])
    options = ["--cache-dir", tmp_path / "cache", "--set=compute.workers=1"]
    code, far, said = tiled(tmp_path / "far", [(name, server.url(file)) for name, file in sources], *options)
    assert code == 0, said
    for name, _ in sources:
        assert facts(far / f"{name}.zarr")["vendor"] == "aperio"  # by OpenSlide, which needs a file
        assert content_digest(far / f"{name}.zarr") == content_digest(near / f"{name}.zarr")
    assert not any(secret.encode() in written(tmp_path / "far" / "out") + said.encode() for secret in SECRETS)
    assert not list((tmp_path / "cache").rglob("*.svs"))


@pytest.mark.parametrize("requests", [0, *(pytest.param(requests, marks=pytest.mark.long) for requests in (6, 12))])
def test_a_server_that_fails_is_a_row_with_one_clear_line(tmp_path, slides, server, requests):
    server.fails_after = requests
    sources = [("far", server.url("ome.tif")), ("near", slides / "ome.tif")]
    code, far, said = tiled(tmp_path / "run", sources, "--tile-px=64", "--set=compute.workers=1")
    assert code == 3, said
    rows = {row["slide_id"]: row for row in json.loads((far / "record.json").read_text())["outcomes"]}
    assert (rows["far"]["status"], rows["near"]["status"]) == ("failed", "done")
    assert rows["far"]["reason"] == "the server answers HTTP 400 (check the address)"
    assert said.count("failed  far") == 1
    assert "Traceback" not in said
    assert not (far / "far.zarr").exists()
    assert not any(secret.encode() in written(tmp_path / "run" / "out") + said.encode() for secret in SECRETS)


def test_an_address_without_a_slide(tmp_path, slides, server):
    (slides / "words.svs").write_bytes(b"no slide, but long enough to be read " * 100)
    sources = [("gone", server.url("gone.svs")), ("words", server.url("words.svs"))]
    code, far, said = tiled(tmp_path / "run", sources)
    assert code == 3, said
    rows = {row["slide_id"]: row["reason"] for row in json.loads((far / "record.json").read_text())["outcomes"]}
    assert rows["gone"] == "there is no such file (check the address)"
    assert rows["words"].startswith(
        "not a TIFF, the only kind that is read from afar (copy it here first, or set compute.cache_dir"
    )
    assert not any(secret.encode() in written(tmp_path / "run" / "out") + said.encode() for secret in SECRETS)
