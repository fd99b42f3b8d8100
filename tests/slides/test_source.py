"""Bytes by range from files and servers: exact, checked, retried, and without secrets in any message."""

import hashlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile

from pathfm.addresses import is_remote, public_name, remote_url
from pathfm.errors import MissingExtraError, UnreadableSlideError
from pathfm.slides.reader import slide_identity
from pathfm.slides.source import file_identity, open_source

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
from pathfm.slides import remote  # noqa: E402 - it needs the extra

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()


class Server(ThreadingHTTPServer):
    """Serves one file in several well and ill behaved ways; ``asked`` lists the ranges it was asked for."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.version = content, "1"
        self.asked: list[str] = []
        self.failures = self.under_way = self.peak = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """Clients that go away are part of the tests."""

    def url(self, way: str = "ranges") -> str:
        return f"http://jane:topsecret@127.0.0.1:{self.server_port}/{way}/slide.svs?signature=hush"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        way = self.path.split("/")[1]
        with self.server.lock:
            self.server.asked.append(self.headers.get("Range", ""))
            fails = self.server.failures > 0
            self.server.failures -= fails
        if fails:
            return self.answer(503, b"")
        if way in {"403", "404", "400"}:
            return self.answer(int(way), b"")
        if way == "whole":
            return self.answer(200, self.server.content)
        first, last = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
        size = len(self.server.content)
        if first >= size:
            return self.answer(416, b"")
        if way == "slow":
            self.dawdle()
        shift = 10 if way == "shifted" else 0
        body = self.server.content[first + shift : last + 1 + shift]
        place = {"Content-Range": f"bytes {first + shift}-{first + shift + len(body) - 1}/{size}", "ETag": self.server.version}
        if way == "cut" and first:
            return self.answer(206, body, place, body[: len(body) // 2])
        return self.answer(206, body, place)

    def dawdle(self) -> None:
        with self.server.lock:
            self.server.under_way += 1
            self.server.peak = max(self.server.peak, self.server.under_way)
        time.sleep(0.4)
        with self.server.lock:
            self.server.under_way -= 1

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: bytes | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if sent is None else sent)
        self.close_connection = self.close_connection or sent is not None


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(CONTENT) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_S", (0.0, 0.01, 0.01))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "slide.svs"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["local", "http", "store"])
def source(request, file, server):
    if request.param == "store":
        fsspec.filesystem("memory").pipe_file("/bucket/slide.svs", CONTENT)
    with open_source({"local": file, "http": server.url(), "store": "memory://bucket/slide.svs"}[request.param]) as opened:
        yield opened


RANGES = [(0, 10), (2_999_990, 10), (5, 0), (1_500_000, 700_000), (100, 2_000_000), (1_500_010, 5), (0, 10)]


def test_every_range_is_exact(source):
    assert source.size == len(CONTENT)
    expected = [CONTENT[offset : offset + length] for offset, length in RANGES]
    assert [source.read_at(*each) for each in RANGES] == expected
    assert source.read_many(RANGES) == expected
    assert source.read_many([]) == []


def test_threads_do_not_disturb_each_other(source):
    ranges = [(offset, 1000) for offset in range(0, 2_900_000, 145_001)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda each: source.read_at(*each), ranges)) == [CONTENT[at : at + 1000] for at, _ in ranges]


@pytest.mark.parametrize("place", [(2_999_995, 10), (4_000_000, 1), (-1, 1), (0, -1)])
def test_what_the_file_does_not_have(source, place):
    with pytest.raises(UnreadableSlideError, match="the file ends too early"):
        source.read_at(*place)
    with pytest.raises(UnreadableSlideError, match="the file ends too early"):
        source.read_many([place])


def test_as_a_file(source):
    with source.open_file() as file:
        assert file.seek(-10, 2) == len(CONTENT) - 10
        assert file.read() == CONTENT[-10:]
        file.seek(1_048_570)
        assert file.read(20) == CONTENT[1_048_570:1_048_590]
        assert file.seek(5, 1) == 1_048_595
        file.seek(0)
        assert file.read() == CONTENT
        assert file.read(1) == b""
    with source.open_file() as file:
        assert file.read(4) == CONTENT[:4]


def test_closing_twice_is_allowed(source):
    source.read_many([(0, 1), (2_000_000, 1)])
    source.close()
    source.close()


def test_identity_is_that_of_the_bytes_wherever_they_are(source, file):
    assert file_identity(source) == slide_identity(file)


@pytest.mark.parametrize("size", [0, 1, 4096, 262_144, 262_145, 300_000])
def test_identity_of_any_size(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:size])
    with open_source(path) as source:
        identity = file_identity(source)
    whole = size <= 262_144
    assert (identity == hashlib.sha256(size.to_bytes(8, "little") + CONTENT[:size]).hexdigest()) == whole
    changed = bytearray(CONTENT[:size])
    if size:
        changed[-1] ^= 1
        path.write_bytes(changed)
        with open_source(path) as source:
            assert file_identity(source) != identity


def test_local_files_that_are_absent_or_shrink(tmp_path, file):
    with pytest.raises(UnreadableSlideError, match="there is no such file"):
        open_source(tmp_path / "absent.svs")
    with pytest.raises(UnreadableSlideError, match="cannot be read"):
        open_source(tmp_path)
    with open_source(file) as source:
        file.write_bytes(CONTENT[:1000])
        with pytest.raises(UnreadableSlideError, match="the file ends too early"):
            source.read_at(900, 200)


def test_a_tiff_directory_costs_few_requests(tmp_path, server):
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path) as tiff:
        for side in (2048, 1024, 512):
            tiff.write(np.zeros((side, side, 3), np.uint8), tile=(64, 64), photometric="rgb", metadata=None)
    server.content = path.read_bytes()
    with open_source(server.url()) as source, source.open_file() as file, tifffile.TiffFile(file, name=source.name) as tiff:
        assert [page.imagewidth for page in tiff.pages] == [2048, 1024, 512]
        assert tiff.pages[0].dataoffsets[-1] > 12_000_000
    assert len(server.asked) <= 4


def test_neighbours_come_in_one_request_and_others_side_by_side(server):
    with open_source(server.url("slow")) as source:
        server.asked.clear()
        near = [(1_100_000 + 20_000 * index, 10_000) for index in range(20)]
        source.read_many(near)
        assert len(server.asked) == 1
        source.read_many([(1_200_000 + 200_000 * index, 100) for index in range(8)])
        assert len(server.asked) == 9
        assert server.peak > 2


def test_joining_has_a_limit():
    ranges = [remote.ByteRange(index * 2**20, 2**20) for index in range(20)]
    spans = remote.joined(ranges)
    assert [number for _, members in spans for number in members] == list(range(20))
    assert max(span.length for span, _ in spans) == remote.MAX_REQUEST_BYTES


def test_failures_that_pass_are_survived(server):
    server.failures = 2
    with open_source(server.url()) as source:
        server.failures = 3
        assert source.read_at(2_000_000, 10) == CONTENT[2_000_000:2_000_010]
        server.failures = 99
        with pytest.raises(UnreadableSlideError, match="HTTP 503, 4 times"):
            source.read_at(2_000_000, 10)


@pytest.mark.parametrize(
    ("way", "word"),
    [
        ("whole", "whole files only"),
        ("403", "refuses access"),
        ("404", "no such file"),
        ("400", "HTTP 400"),
        ("shifted", "another range"),
    ],
)
def test_servers_that_cannot_be_used_are_named_at_once(server, way, word):
    with pytest.raises(UnreadableSlideError, match=word) as caught:
        open_source(server.url(way))
    assert len(server.asked) == 1
    assert caught.value.where == f"http://127.0.0.1:{server.server_port}/{way}/slide.svs"


def test_an_empty_file(server):
    server.content = b""
    with pytest.raises(UnreadableSlideError, match="empty"):
        open_source(server.url())


def test_a_server_that_cuts_off(server):
    with open_source(server.url("cut")) as source, pytest.raises(UnreadableSlideError, match=r"connection failed .*4 times"):
        source.read_at(2_000_000, 1000)


def test_a_server_that_hangs(server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.1)
    with pytest.raises(UnreadableSlideError, match=r"no answer within 0.1 s, 4 times"):
        open_source(server.url("slow"))


def test_a_server_that_is_not_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UnreadableSlideError, match="connection failed"):
            open_source(f"http://127.0.0.1:{unused.getsockname()[1]}/slide.svs")


@pytest.mark.parametrize(("version", "content"), [("2", CONTENT), ("1", CONTENT[:-1]), ("1", CONTENT[:1_500_000])])
def test_a_file_that_changes_while_it_is_read(server, version, content):
    with open_source(server.url()) as source:
        server.version, server.content = version, content
        with pytest.raises(UnreadableSlideError, match=r"changed on the server|become shorter"):
            source.read_at(2_000_000, 10)


def test_a_store_whose_file_changes_or_goes(monkeypatch):
    monkeypatch.setattr(remote, "RECHECK_S", 0.0)
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/changing.svs", CONTENT)
    with open_source("memory://bucket/changing.svs") as source:
        store.pipe_file("/bucket/changing.svs", CONTENT[::-1])
        with pytest.raises(UnreadableSlideError, match="changed on the server"):
            source.read_at(2_000_000, 10)
        store.rm("/bucket/changing.svs")
        with pytest.raises(UnreadableSlideError, match="no such file"):
            source.read_at(2_000_000, 10)


def test_no_secret_gets_out(server, caplog):
    caplog.set_level(0)
    messages = []
    for way in ("ranges", "whole", "403", "cut"):
        try:
            with open_source(server.url(way)) as source:
                messages.append(source.name)
                source.read_at(2_000_000, 10)
        except UnreadableSlideError as error:
            messages.append(f"{error} {error!r} {error.__cause__} {error.reason}")
    assert len(messages) == 5
    assert not [word for word in ("jane", "topsecret", "hush", "signature") if word in " ".join(messages) + caplog.text]


def test_a_library_that_is_missing_has_an_install_line(monkeypatch):
    with pytest.raises(MissingExtraError, match=r"pip install 'fsspec\[adl\]'"):
        monkeypatch.setitem(sys.modules, "adlfs", None)
        open_source("adl://store/slide.svs")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pathfm\[remote\]'"):
        open_source("https://host/slide.svs")


@pytest.mark.parametrize(
    "address", ["https://host/a b.svs", "http://u:p@host:80/a.svs?x=1%2F%2F2#f", "s3://bucket/key.svs", "GS://b/k"]
)
def test_addresses_survive_being_paths(address):
    assert is_remote(address)
    assert is_remote(Path(address))
    assert remote_url(Path(address)) == remote_url(address) == address


@pytest.mark.parametrize(
    "path", ["a.svs", "/data/a.svs", "C:/data/a.svs", "https", "https:", "folder:/a.svs", "./https:/a.svs", "http:///a"]
)
def test_local_paths_are_no_addresses(path):
    assert not is_remote(path)
    assert public_name(path) == path


def test_public_names():
    assert public_name(Path("https://jane:pw@host:8080/a/b.svs?sig=1#x")) == "https://host:8080/a/b.svs"
    assert public_name("s3://key:secret@bucket/a.svs") == "s3://bucket/a.svs"
