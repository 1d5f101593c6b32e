"""Downloads: kept whole, verified and inside their folder, or not at all."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from gn_det import InputError
from gn_det.checkpoint import download
from gn_det.checkpoint.download import fetch, kept_at
from gn_det.checkpoint.reading import read_weights
from gn_det.checkpoint.weights_file import find_weights

PAGE = b"<html>not found</html>"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gn_det"


@pytest.fixture
def weights(tmp_path: Path) -> bytes:
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "weights.pth")
    return (tmp_path / "weights.pth").read_bytes()


class Server:
    """Serves files from memory on this machine, /slow... late and /short... a byte short."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                body = outer.files.get(self.path.partition("?")[0])
                self.send_response(404 if body is None else 200)
                body = PAGE if body is None else body
                self.send_header("Content-Length", str(len(body) + ("short" in self.path)))
                self.end_headers()
                if "slow" in self.path:
                    time.sleep(3)
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()


def test_a_file_is_downloaded_once_and_found_again(
    server: Server, cache: Path, weights: bytes
) -> None:
    server.files["/a/w.pth"] = weights
    for _ in range(2):
        file, heuristics = find_weights(f"{server.address}/a/w.pth?matching_heuristics=True")
        assert file.read_bytes() == weights and heuristics
    assert server.asked == ["/a/w.pth"]
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_the_same_path_on_two_servers_and_two_queries_are_different_files(
    server: Server, cache: Path, weights: bytes
) -> None:
    other = Server()
    try:
        for each, content in ((server, weights), (other, weights + b" ")):
            each.files["/w.bin"] = content
        addresses = [f"{server.address}/w.bin", f"{server.address}/w.bin?v=2"]
        files = [fetch(a, lambda file: None) for a in (*addresses, f"{other.address}/w.bin")]
    finally:
        other.http.shutdown()
    assert len(set(files)) == 3
    assert [f.read_bytes() for f in files] == [weights, weights, weights + b" "]


@pytest.mark.parametrize(
    "path",
    [
        "/a/../../../.local/lib/python3.11/site-packages/evil.pth",
        "/a/%2e%2e/%2e%2e/evil.pth",
        "/..%2f..%2fevil.pth",
        "/a/.pth",
        "/a/%00.pth",
        "/evil%0a.pth",
    ],
)
def test_an_address_never_leads_out_of_the_folder(path: str, cache: Path) -> None:
    with pytest.raises(InputError, match=r"has \.\., or no plain file name"):
        find_weights(f"https://a.org{path}")
    assert not cache.exists()


@pytest.mark.parametrize("address", ["ftp://a.org/w.pth", "s3://b/w.pth", "file:///etc/passwd"])
def test_other_schemes_are_refused(address: str) -> None:
    with pytest.raises(InputError, match="addresses begin with https:// or http://"):
        find_weights(address)


def test_a_page_in_place_of_weights_is_not_kept(server: Server, cache: Path) -> None:
    server.files["/w.pth"] = PAGE
    with pytest.raises(InputError, match="not what it should be: the file cannot be read as wei"):
        find_weights(f"{server.address}/w.pth")
    with pytest.raises(InputError, match="cannot be fetched .*Not Found"):
        find_weights(f"{server.address}/gone.pth")
    assert not [*cache.iterdir()]


def test_checksums_are_verified(server: Server, cache: Path, weights: bytes) -> None:
    right = hashlib.sha256(weights).hexdigest()
    for path in (f"/w-{right[:16]}.pth", "/w-0000000a.pth", "/w-20230115.pth", "/w.pth"):
        server.files[path] = weights
    assert find_weights(f"{server.address}/w-{right[:16]}.pth")[0].exists()
    assert find_weights(f"{server.address}/w-20230115.pth")[0].exists()  # a date
    assert find_weights(f"{server.address}/w.pth#sha256={right}")[0].exists()
    before = {*cache.iterdir()}
    for wrong in ("/w-0000000a.pth", f"/w.pth?v=2#sha256={right[::-1]}"):
        with pytest.raises(InputError, match=f"has the SHA-256 {right} and not"):
            find_weights(server.address + wrong)
    assert {*cache.iterdir()} == before


def test_a_transfer_that_breaks_off_or_never_answers_leaves_nothing(
    server: Server, cache: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files |= {"/short.pth": weights, "/slow.pth": weights}
    monkeypatch.setattr(download, "SECONDS", 0.3)
    for path, reason in (("/short.pth", "bytes came|Incomplete"), ("/slow.pth", "timed out")):
        with pytest.raises(InputError, match=f"cannot be fetched .*({reason})"):
            fetch(server.address + path, read_weights)
    assert not [*cache.iterdir()]
    assert not kept_at(f"{server.address}/short.pth").exists()
