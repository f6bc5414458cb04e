"""Against a server on this machine that can break off, ignore ranges, or serve something else."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from vgpt_jax import UserError
from vgpt_jax.pretrained import fetch as fetch_module
from vgpt_jax.pretrained.fetch import fetch

CONTENT = np.random.default_rng(0).bytes(10_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content``; what was asked for is in ``server.asked``."""

    def do_GET(self):
        server, start = self.server, 0
        server.asked.append(self.headers["Range"])
        if self.headers["Range"] and server.knows_ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", server.content_type)
        if server.says_length:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        return self.wfile.write(server.content[start : server.breaks_at])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch_module, "CHUNK", 1024)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.asked, server.breaks_at = CONTENT, [], None
        server.knows_ranges = server.says_length = True
        server.content_type = "application/octet-stream"
        server.url = f"http://127.0.0.1:{server.server_port}/models/weights.pth"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "weights.pth"


def test_a_file_is_fetched_once(server, path, capsys):
    assert fetch(server.url, path, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert fetch(server.url, path, SHA256) == path
    assert server.asked == [None]
    assert [p.name for p in path.parent.iterdir()] == ["weights.pth"]
    assert "fetching weights.pth (MiB): 10/10 done" in capsys.readouterr().err


def test_a_broken_connection_is_taken_up_where_it_broke(server, path):
    server.breaks_at = 3000
    with pytest.raises(UserError, match=r"weights.pth could not be fetched \(the connection broke\): run this again"):
        fetch(server.url, path, SHA256)
    assert not path.exists()
    server.breaks_at = 7000
    with pytest.raises(UserError, match="the connection broke"):
        fetch(server.url, path, SHA256)
    server.breaks_at = None
    fetch(server.url, path, SHA256)
    assert server.asked == [None, "bytes=3000-", "bytes=7000-"]
    assert path.read_bytes() == CONTENT


def test_a_server_without_ranges_begins_again(server, path):
    server.breaks_at = 3000
    with pytest.raises(UserError, match="the connection broke"):
        fetch(server.url, path, SHA256)
    server.breaks_at, server.knows_ranges = None, False
    assert fetch(server.url, path, SHA256).read_bytes() == CONTENT


def test_what_another_process_has_completed_is_taken(server, path):
    path.parent.mkdir()
    path.with_name("weights.pth.partial").write_bytes(CONTENT)
    assert fetch(server.url, path, SHA256).read_bytes() == CONTENT
    assert server.asked == ["bytes=10000-"]


def test_a_file_that_another_process_has_moved_meanwhile_is_taken(server, path, monkeypatch):
    continue_ = fetch_module._continue

    def and_the_other_is_faster(url, partial):
        continue_(url, partial)
        partial.replace(path)

    monkeypatch.setattr(fetch_module, "_continue", and_the_other_is_faster)
    assert fetch(server.url, path, SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("start", [b"", b"something else", CONTENT + b"and more"])
def test_another_file_is_not_kept(server, path, start):
    path.parent.mkdir()
    path.with_name("weights.pth.partial").write_bytes(start)
    server.content = CONTENT if start else CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=f"what came from {server.url} is not the file .*put it at {path}$"):
        fetch(server.url, path, SHA256)
    assert not list(path.parent.iterdir())


def test_another_file_in_its_place_is_named(server, path):
    path.parent.mkdir()
    path.write_bytes(b"put here by hand, but not all of it")
    with pytest.raises(UserError, match=f"{path} is not the file that {server.url} is .*delete it"):
        fetch(server.url, path, SHA256)
    assert path.exists()
    assert not server.asked


def test_no_network_is_one_line_that_says_what_to_put_where(server, path):
    url = server.url.replace(str(server.server_port), "1")  # where nobody listens
    with pytest.raises(UserError) as found:
        fetch(url, path, SHA256)
    assert "\n" not in str(found.value)
    assert "refused" in str(found.value)
    assert str(found.value).endswith(f"get {url} by other means and put it at {path}")


def test_a_missing_page_and_an_unknown_length_are_errors(server, path):
    server.says_length = False
    with pytest.raises(UserError, match="does not say how long the file is"):
        fetch(server.url, path, SHA256)
    with pytest.raises(UserError, match=r"could not be fetched \(unknown url type"):
        fetch("nowhere", path, SHA256)


def test_a_folder_that_cannot_be_made_is_an_error(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"weights.pth could not be fetched \(.*file"):
        fetch(server.url, tmp_path / "file" / "weights.pth", SHA256)


def test_a_file_without_a_published_hash_is_fetched_and_its_hash_is_said(server, path, capsys):
    server.breaks_at = 3000
    with pytest.raises(UserError, match="the connection broke"):
        fetch(server.url, path, None)
    server.breaks_at = None
    assert fetch(server.url, path, None).read_bytes() == CONTENT
    assert f"weights.pth: SHA-256 {SHA256}, not checked: none is published" in capsys.readouterr().err
    server.content = b"another"
    assert fetch(server.url, path, None).read_bytes() == CONTENT  # what is there is taken
    assert server.asked == [None, "bytes=3000-"]


def test_without_a_hash_the_length_is_checked(server, path):
    with pytest.raises(UserError, match=r"is not the file that was expected \(by its length\)"):
        fetch(server.url, path, None, len(CONTENT) + 1)
    assert not list(path.parent.iterdir())
    fetch(server.url, path, None, len(CONTENT))
    with pytest.raises(UserError, match=r"is not the file .* \(by its length\): delete it"):
        fetch(server.url, path, None, len(CONTENT) + 1)


@pytest.mark.parametrize(("more", "fits"), [(b"", True), (b"and more", False)])
def test_without_a_hash_the_server_says_whether_a_partial_file_is_whole(server, path, more, fits):
    path.parent.mkdir()
    path.with_name("weights.pth.partial").write_bytes(CONTENT + more)
    if fits:
        assert fetch(server.url, path, None).read_bytes() == CONTENT
    else:
        with pytest.raises(UserError, match="by its length"):
            fetch(server.url, path, None)
        assert not list(path.parent.iterdir())


def test_a_web_page_is_not_taken_for_a_file(server, path):
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(UserError, match=r"could not be fetched \(the server answers with a web page"):
        fetch(server.url, path, None)
    assert not path.exists()
